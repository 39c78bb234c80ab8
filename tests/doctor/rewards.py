"""Reward functions that give no reward."""

import signal
import time

from mcore_rl.rewards import Void


def nothing(sample) -> None:
    """Not a number."""


def nothing_taken(candidate) -> float:
    """A curriculum that takes no prompt."""
    return 0.0


def never(sample) -> float:
    """It waits for a service that is gone."""
    time.sleep(600)
    return 0.0


def alarmed(sample) -> float:
    """With a deadline by SIGALRM, which Python allows in the main thread alone; math-verify has one."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.alarm(5)
    try:
        return float(sample.text == sample.prompt.label)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def equals_label(sample) -> float:
    """Never, where the label is a number."""
    return float(sample.text == sample.prompt.label)


def equals_label_text(sample) -> float:
    return float(sample.text == sample.prompt.label_text)


def half(sample) -> float | Void:
    """Every other label cannot be judged."""
    return 1.0 if int(sample.prompt.label) % 2 else Void("even")


def judged_by_nobody(sample) -> Void:
    """Its service is gone."""
    return Void("unreachable", "no route")


def by_token(sample) -> dict:
    """A reward at every token: the digits of the label and the end."""
    return {place: float(place == len(sample.prompt.label)) for place in range(len(sample.prompt.label) + 1)}
