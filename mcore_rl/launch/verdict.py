"""What became of a launch: told from what its ranks wrote, and from how their processes left.

A rank that is ended from outside, or by os._exit, writes nothing; the others then meet broken connections and
write about those. So the silent one is the cause, unless it was silent because the launcher ended it.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mcore_rl.errors
from mcore_rl.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RETRYABLE, DataError, McoreRLError, StorageError
from mcore_rl.log import METRICS, append_event, read_metrics
from mcore_rl.training.faults.exits import LOST, read_events, say
from mcore_rl.training.faults.watchdog import HANG

_BY_LAUNCHER = (-signal.SIGTERM, -signal.SIGHUP, -signal.SIGKILL)
"""how torch's agent ends the other ranks after a failure: the second one after its shutdown timeout"""


@dataclass(frozen=True)
class Left:
    """How the process of a rank left, where its exit code was not 0."""

    exit_code: int
    """negative: the signal that ended it"""
    time: int
    """when the launcher saw it, in unix seconds"""


def exit_code_of_launch(run_dir: Path, since: int, ranks: int, failed: Mapping[int, Left]) -> int:
    """0 only when every rank has left its `end` with code 0; otherwise the cause's code, after naming it.

    Args:
        since: the byte of events.jsonl where this launch begins.
        failed: rank -> how it left, of those that left otherwise than with exit code 0.
    """
    events = read_events(run_dir, since)
    ends = {event["rank"]: event["exit_code"] for event in events if event["kind"] == "end"}
    errors = [event for event in events if event["kind"] == "error" and event["type"] != LOST]
    if cause := next((event for event in errors if not _may_be_echo(event)), None):
        return int(cause["exit_code"])
    silent = set(range(ranks)) - ends.keys() - {event["rank"] for event in errors}
    if silent:
        return _name_silent(run_dir, _culprits(silent, failed), failed)
    if errors:
        return int(errors[0]["exit_code"])
    if code := next((code for code in ends.values() if code != EXIT_DONE), EXIT_DONE):
        return int(code)
    for rank, left in failed.items():
        say(f"rank {rank} was done, but {_how(left)} after its `end` event")
    return EXIT_RETRYABLE if failed else EXIT_DONE


def _may_be_echo(event: Mapping[str, Any]) -> bool:
    """A broken connection looks like this; a typed error and the watchdog's do not."""
    known = getattr(mcore_rl.errors, event["type"], None)
    typed = isinstance(known, type) and issubclass(known, McoreRLError)
    return event["exit_code"] == EXIT_RETRYABLE and not typed and event["type"] != HANG


def _culprits(silent: set[int], failed: Mapping[int, Left]) -> list[int]:
    """Those of `silent` that the launcher had no part in; all of them where it ended each one."""
    first = min((left.time for left in failed.values()), default=0)

    def by_launcher(rank: int) -> bool:
        left = failed.get(rank)
        if left is None or left.exit_code not in _BY_LAUNCHER:
            return False
        return left.exit_code == -signal.SIGTERM or left.time > first + 1

    return [rank for rank in sorted(silent) if not by_launcher(rank)] or sorted(silent)


def _name_silent(run_dir: Path, ranks: list[int], failed: Mapping[int, Left]) -> int:
    for rank in ranks[:8]:
        left = failed.get(rank, Left(EXIT_DONE, 0))
        message = f"rank {rank} {_how(left)}, without an `end` event{_after(run_dir)}; {_remedy(left)}"
        say(message)
        with suppress(StorageError):  # the run directory may be the reason
            append_event(
                run_dir, "error", rank=rank, type=LOST, message=message, exit_code=_code(left.exit_code)
            )
    return _code(failed.get(ranks[0], Left(EXIT_DONE, 0)).exit_code)


def _code(exit_code: int) -> int:
    """A configuration that the command refuses in the rank itself is no reason for a retry."""
    return EXIT_CONFIG if exit_code == EXIT_CONFIG else EXIT_RETRYABLE


def _how(left: Left) -> str:
    if left.exit_code >= 0:
        return f"left with exit code {left.exit_code}"
    number = -left.exit_code
    name = f" ({signal.Signals(number).name})" if number in set(signal.Signals) else ""
    return f"was ended by signal {number}{name}"


def _after(run_dir: Path) -> str:
    """Where the run stood, by its metrics."""
    with suppress(DataError):
        steps = [record["step"] for record in read_metrics(run_dir / METRICS) if "step" in record]
        if steps:
            return f", after step {steps[-1]}"
    return ", before its first step"


def _remedy(left: Left) -> str:
    if left.exit_code == -signal.SIGKILL:
        return "mostly the kernel's out-of-memory killer: see dmesg, and use less memory"
    if left.exit_code < 0:
        return "its stack is above where the signal is that of a crash"
    if left.exit_code == EXIT_DONE:
        return "something in it called os._exit: look for that in a loss of your own"
    return "its last words are above; without any, something in it called os._exit"
