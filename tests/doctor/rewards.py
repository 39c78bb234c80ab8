"""Reward functions that give no reward."""

import signal
import time


def nothing(sample) -> None:
    """Not a number."""


def nothing_taken(candidate) -> float:
    """A curriculum that takes no prompt."""
    return 0.0


def never(sample) -> float:
    """As one that waits for a service that is gone."""
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
