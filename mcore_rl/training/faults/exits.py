"""How a rank ends before its time: it records why, says it once for all, and never outlives its launcher.

An error on one rank breaks the connections of all others, which then fail too. RUN_DIR/events.jsonl tells the
cause from its echoes: a rank appends its error BEFORE it closes its groups, so the first in the file is it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import resource
import signal
import sys
import threading
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mcore_rl.errors import (
    EXIT_CONFIG,
    EXIT_NUMERICS,
    EXIT_RETRYABLE,
    AskedToLeave,
    ConfigError,
    McoreRLError,
    NothingToDo,
    ResourceError,
    StorageError,
)
from mcore_rl.log import EVENTS, append_event, read_metrics
from mcore_rl.screen import SCREEN
from mcore_rl.terminal import printable
from mcore_rl.training.faults.siblings import lost_ranks, siblings
from mcore_rl.user_code import place, said

EXIT_BUG = 1
"""an exception that nobody foresaw"""
LOST = "RankLost"
"""the type of an error event by which a rank names another one that left without any"""
_PR_SET_PDEATHSIG = 1
_LAUNCH = "mcore_rl_"
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory|bad_alloc")
"""in the errors of torch's allocators, which are no MemoryError"""
_spare: list[int] = []
leaving = threading.Event()
"""set once this rank has met an error, and closes what it has opened"""


def exit_code_of(error: BaseException) -> int:
    """What the process ends with: the error's own code, 75 for OSError, RuntimeError and MemoryError, else 1.

    A full disk, a peer that is gone, a collective past its deadline, no memory: worth a retry.
    """
    if isinstance(error, McoreRLError):
        return error.exit_code
    if isinstance(error, AskedToLeave):
        return int(error.code or 0)
    return EXIT_RETRYABLE if isinstance(error, OSError | RuntimeError | MemoryError) else EXIT_BUG


def rank() -> int:
    """This process's, of torchrun."""
    return int(os.environ.get("RANK", "0"))


def append(run_dir: Path, kind: str, **fields: Any) -> None:
    """An event of this rank; a directory that cannot be written must not hide an error."""
    with suppress(OSError, StorageError):
        try:
            append_event(run_dir, kind, rank=rank(), **fields)
        except StorageError as error:
            cause = error.__cause__
            if not (isinstance(cause, OSError) and cause.errno == errno.EMFILE and _spare):
                raise
            os.close(_spare.pop())
            append_event(run_dir, kind, rank=rank(), **fields)


def keep_a_file() -> None:
    """Hold one file open that is given up when no other can be opened: the event that says so needs one."""
    _spare.append(os.open(os.devnull, os.O_RDONLY))


def record(run_dir: Path, error: BaseException) -> None:
    """Append `error` to events.jsonl, once; what all ranks share is written, and said, by the first.

    The others end as soon as they can, and torchrun then ends it while it still closes what it has opened.
    """
    if isinstance(error, NothingToDo):
        return
    leaving.set()
    shared = getattr(error, "shared", False)
    if error.__dict__.setdefault("recorded", False) or (shared and rank()):
        return
    error.__dict__["recorded"] = True
    fields = {"type": type(error).__name__, "message": _text(error), "exit_code": exit_code_of(error)}
    append(run_dir, "error", **fields)
    if shared:
        say(f"{type(error).__name__}: {error}")


@contextmanager
def recorded(run_dir: Path) -> Iterator[None]:
    """An error inside is recorded; to be put within what takes time to close, process groups and servers."""
    try:
        yield
    except BaseException as error:  # SystemExit too: the other ranks fail because of it
        known = typed(error)
        record(run_dir, known)
        if known is error:
            raise
        raise known from error


def launch_name() -> str:
    """A name for one launch by `launch_node`: its processes, and theirs, carry it in their environment."""
    return _LAUNCH + uuid.uuid4().hex


def launched_here() -> bool:
    """This rank was started by `launch_node`, not by torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(_LAUNCH)


def typed(error: BaseException) -> BaseException:
    """`error`, or one that says what to do where the system caused it.

    Its limits are ResourceErrors: that of open files, and memory: Python's, the system's, or that of torch's
    allocators. A current directory that is gone is a ConfigError.
    """
    limited = _of_memory(error)
    if limited is None and not isinstance(error, McoreRLError):
        limited = _of_open_files(error) or _of_no_directory(error)
    if limited is None:
        return error
    limited.__cause__ = error
    return limited


def _of_open_files(error: BaseException) -> ResourceError | None:
    if os.strerror(errno.EMFILE) not in said(error):
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ResourceError(
        f"rank {rank()} may open {soft} files and has no more (ulimit -n, {hard} at most): {error}. Raise "
        "it: `ulimit -n 65536` before the command, LimitNOFILE= of a service, --ulimit nofile=65536 of docker"
    )


def _of_no_directory(error: BaseException) -> ConfigError | None:
    """A current directory that somebody removed: nothing has an absolute path, and modules are not found."""
    if not isinstance(error, FileNotFoundError) or os.path.isabs(error.filename or ""):
        return None
    try:
        os.getcwd()
    except FileNotFoundError:
        return ConfigError(f"the current directory has been removed ({error}); cd to one that is there")
    return None


def _of_memory(error: BaseException) -> ResourceError | None:
    """Also of an error that calls a file or a configuration wrong because memory for it was missing."""
    cause: BaseException | None = error
    while cause is not None and not _lacks_memory(cause):
        cause = (
            (cause.__cause__ or cause.__context__) if getattr(cause, "exit_code", 0) == EXIT_CONFIG else None
        )
    if cause is None:
        return None
    frames = traceback.extract_tb(cause.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    what = str(error).partition("\n")[0] or type(error).__name__
    return ResourceError(
        f"process {os.getpid()} gets no more memory{where}: {what}. Give it more (ulimit -v, the limit of "
        "its container), or let it need less: train.tokens_per_micro_batch, a layout of more ranks (mcore-rl "
        "plan counts it)"
    )


def _lacks_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    in_torch = isinstance(error, RuntimeError) and not isinstance(error, McoreRLError)
    return isinstance(error, MemoryError) or (in_torch and bool(_NO_MEMORY.search(said(error))))


def end_of_events(run_dir: Path) -> int:
    """Bytes of events.jsonl: what earlier attempts have written."""
    path = run_dir / EVENTS
    return path.stat().st_size if path.exists() else 0


def last_words(run_dir: Path, error: BaseException, since: int) -> int:
    """Print `error`, unless another rank's is its cause or the same. Returns the (cause's) exit code.

    Typed errors are one line, others come with their traceback. `since`: where this attempt's events begin.
    """
    typed = isinstance(error, McoreRLError)
    if not (typed and any(_is_same(event, error) for event in errors(run_dir, since))):
        record(run_dir, error)
    before = _before_mine(run_dir, error, since)
    if typed:
        if not getattr(error, "shared", False) and not any(_is_same(e, error) for e in before):
            say(f"{type(error).__name__}: {error}")
        return exit_code_of(error)
    if isinstance(error, AskedToLeave):
        return _asked_to_leave(error, errors(run_dir, since)[:1])
    if isinstance(error, OSError | RuntimeError):
        if before:
            return int(before[0]["exit_code"])
        if _is_echo_of_a_death(run_dir, since):
            return EXIT_RETRYABLE
    print(printable("".join(traceback.format_exception(error)).rstrip()), file=sys.stderr)
    say(f"{type(error).__name__} on rank {rank()}: {said(error)}{place(error)}")
    return exit_code_of(error)


def _asked_to_leave(error: AskedToLeave, first: list[dict[str, Any]]) -> int:
    """The code of the `first` error of all; torchrun sends SIGTERM to the other ranks when one has failed."""
    if first and not (first[0]["rank"] == rank() and _is_same(first[0], error)):
        return int(first[0]["exit_code"])
    if error.number == signal.SIGTERM:  # Ctrl-C needs no explanation
        say(f"rank {rank()}: {error}")
    return exit_code_of(error)


def _is_echo_of_a_death(run_dir: Path, since: int) -> bool:
    """A rank of this host has left without a word of its own; the first of those that are left names it."""
    spoken = {event["rank"] for event in read_events(run_dir, since) if event["kind"] in ("end", "error")}
    lost = lost_ranks(rank(), spoken)
    if lost and rank() == min(siblings(), default=rank()):
        message = f"rank {', '.join(map(str, lost))} left without a word, and took its connections with it"
        append(run_dir, "error", type=LOST, message=message, exit_code=EXIT_RETRYABLE)
        if not launched_here():
            say(f"{message}; torchrun says how, unless it was with exit code 0")
    return bool(lost)


def _before_mine(run_dir: Path, error: BaseException, since: int) -> list[dict[str, Any]]:
    """Errors that other ranks had recorded when this one recorded `error`."""
    events = errors(run_dir, since)
    mine = [i for i, event in enumerate(events) if event["rank"] == rank() and _is_same(event, error)]
    return [event for event in events[: mine[0] if mine else None] if event["rank"] != rank()]


def errors(run_dir: Path, since: int) -> list[dict[str, Any]]:
    """The errors that ranks have recorded since that byte, in order."""
    return [event for event in read_events(run_dir, since) if event["kind"] == "error"]


def read_events(run_dir: Path, since: int) -> list[dict[str, Any]]:
    """Every event in events.jsonl since that byte; nothing where there is no such file yet."""
    path = run_dir / EVENTS
    return [event for event in read_metrics(path, since) if _is_event(event)] if path.exists() else []


def _is_event(event: dict[str, Any]) -> bool:
    """Whether a run wrote the line: one of something else must not hide why this run ends."""
    kind = event.get("kind")
    numbers = ("rank", "exit_code") if kind in ("error", "end") else ()
    texts = ("kind", "type", "message") if kind == "error" else ("kind",)
    return all(type(event.get(name)) is int for name in numbers) and all(
        isinstance(event.get(name), str) for name in texts
    )


def _is_same(event: dict[str, Any], error: BaseException) -> bool:
    return event["type"] == type(error).__name__ and event["message"] == _text(error)


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, McoreRLError) else said(error)


def say(what: str) -> None:
    """A line for people."""
    SCREEN.say(f"mcore-rl: {what}")


def not_worth_a_restart(run_dir: Path) -> dict[str, Any] | None:
    """The error that ended the attempt before this one, where torchrun restarted what would only fail again.

    To be asked before this attempt's own `start` event is written.
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return None
    last: dict[str, Any] | None = None
    for event in read_events(run_dir, 0):
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
