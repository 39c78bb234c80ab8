"""How a rank ends before its time: it records why, says it once for all, and never outlives its launcher.

An error on one rank breaks the connections of all others, which then fail too. RUN_DIR/events.jsonl tells the
cause from its echoes: a rank appends its error BEFORE it closes its groups, so the first in the file is it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mcore_rl.errors import EXIT_CONFIG, EXIT_NUMERICS, EXIT_RETRYABLE, McoreRLError, StorageError
from mcore_rl.metrics import EVENTS, append_event, read_metrics

EXIT_BUG = 1
"""an exception that nobody foresaw"""
_PR_SET_PDEATHSIG = 1


def exit_code_of(error: BaseException) -> int:
    """What the process ends with: the error's own code, 75 for OSError and RuntimeError, else 1.

    A full disk, a peer that is gone, a collective past its deadline, a GPU out of memory: worth a retry.
    """
    if isinstance(error, McoreRLError):
        return error.exit_code
    return EXIT_RETRYABLE if isinstance(error, OSError | RuntimeError) else EXIT_BUG


def rank() -> int:
    """This process's, of torchrun."""
    return int(os.environ.get("RANK", "0"))


def append(run_dir: Path, kind: str, **fields: Any) -> None:
    """An event of this rank; a directory that cannot be written must not hide an error."""
    with suppress(OSError, StorageError):
        append_event(run_dir, kind, rank=rank(), **fields)


def record(run_dir: Path, error: Exception) -> None:
    """Append `error` to events.jsonl, once; what all ranks share is written, and said, by the first.

    The others end as soon as they can, and torchrun then ends it while it still closes what it has opened.
    """
    shared = getattr(error, "shared", False)
    if error.__dict__.setdefault("recorded", False) or (shared and rank()):
        return
    error.__dict__["recorded"] = True
    fields = {"type": type(error).__name__, "message": str(error), "exit_code": exit_code_of(error)}
    append(run_dir, "error", **fields)
    if shared:
        say(f"{type(error).__name__}: {error}")


@contextmanager
def recorded(run_dir: Path) -> Iterator[None]:
    """An error inside is recorded; to be put within what takes time to close, process groups and servers."""
    try:
        yield
    except Exception as error:
        record(run_dir, error)
        raise


def end_of_events(run_dir: Path) -> int:
    """Bytes of events.jsonl: what earlier attempts have written."""
    path = run_dir / EVENTS
    return path.stat().st_size if path.exists() else 0


def last_words(run_dir: Path, error: Exception, since: int) -> int:
    """Print `error`, unless another rank's is its cause or the same. Returns the (cause's) exit code.

    Typed errors are one line, others come with their traceback. `since`: where this attempt's events begin.
    """
    typed = isinstance(error, McoreRLError)
    if not (typed and any(_is_same(event, error) for event in _errors(run_dir, since))):
        record(run_dir, error)
    before = _before_mine(run_dir, error, since)
    if typed:
        if not getattr(error, "shared", False) and not any(_is_same(e, error) for e in before):
            say(f"{type(error).__name__}: {error}")
        return exit_code_of(error)
    if before and isinstance(error, OSError | RuntimeError):
        return int(before[0]["exit_code"])
    traceback.print_exception(error, file=sys.stderr)
    say(f"{type(error).__name__} on rank {rank()}: {error}")
    return exit_code_of(error)


def _before_mine(run_dir: Path, error: Exception, since: int) -> list[dict[str, Any]]:
    """Errors that other ranks had recorded when this one recorded `error`."""
    events = _errors(run_dir, since)
    mine = [i for i, event in enumerate(events) if event["rank"] == rank() and _is_same(event, error)]
    return [event for event in events[: mine[0] if mine else None] if event["rank"] != rank()]


def _errors(run_dir: Path, since: int) -> list[dict[str, Any]]:
    path = run_dir / EVENTS
    events = read_metrics(path, since) if path.exists() else []
    return [event for event in events if event["kind"] == "error"]


def _is_same(event: dict[str, Any], error: Exception) -> bool:
    return event["type"] == type(error).__name__ and event["message"] == str(error)


def say(what: str) -> None:
    """A line for people."""
    print(f"mcore-rl: {what}", file=sys.stderr, flush=True)


def not_worth_a_restart(run_dir: Path) -> dict[str, Any] | None:
    """The error that ended the attempt before this one, where torchrun restarted what would only fail again.

    To be asked before this attempt's own `start` event is written.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 or not (run_dir / EVENTS).exists():
        return None
    last: dict[str, Any] | None = None
    for event in read_metrics(run_dir / EVENTS):
        if event["kind"] == "start":
            last = None
        elif event["kind"] == "error" and event.get("exit_code") in (EXIT_CONFIG, EXIT_NUMERICS):
            last = last or event
    return last


def end_with_parent() -> None:
    """The kernel kills this rank when its launcher is killed: ranks are in sessions of their own.

    Servers that the rank has started go the same way (rollout.child).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
