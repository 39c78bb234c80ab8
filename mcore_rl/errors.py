"""Typed errors. Every message names the place and the remedy; the exit code says whether a retry can help."""

from __future__ import annotations

import signal
from typing import Self

EXIT_DONE = 0
EXIT_CONFIG = 2
EXIT_NUMERICS = 70
EXIT_RETRYABLE = 75
EXIT_INTERRUPTED = 130


class McoreRLError(Exception):
    """Base of all errors that mcore_rl raises on purpose."""

    exit_code = EXIT_CONFIG
    """what `mcore-rl` ends with"""
    shared = False
    """every rank of the run has raised it: one of them need say it"""

    def on_every_rank(self) -> Self:
        """Itself, to be raised where every rank raises it alike, of values that all of them hold."""
        self.shared = True
        return self


class ConfigError(McoreRLError, ValueError):
    """The configuration cannot be run: unknown key, value out of range, contradiction, unknown model."""


class LayoutError(ConfigError):
    """The parallel layout is illegal for this model or world size."""


class DataError(McoreRLError, ValueError):
    """Bad input data; the message starts with `file:line:field` where there is one."""


class ChangedFileError(DataError):
    """A file was written into while a run was reading it."""


class MalformedRowError(DataError):
    """A row is malformed, which was not seen before its turn came."""

    def __init__(self, message: str, row: int = -1) -> None:
        super().__init__(message)
        self.row = row
        """its number among all rows of the set, from 0"""


class RewardError(McoreRLError, ValueError):
    """A reward function failed or returned something that is not a finite number."""


class BlockedLoopError(McoreRLError, RuntimeError):
    """An environment keeps the event loop on which all rollouts of a replica run."""


class NoSignalError(McoreRLError, RuntimeError):
    """Too few prompts whose samples get unequal rewards: a retry would meet the same prompts again."""


class RolloutError(McoreRLError, RuntimeError):
    """No usable reply from the rollout servers within the deadline."""

    exit_code = EXIT_RETRYABLE


class WeightSyncError(McoreRLError, RuntimeError):
    """The servers do not hold the weights that were published."""

    exit_code = EXIT_RETRYABLE


class MismatchError(McoreRLError, RuntimeError):
    """What the servers sampled is not what the weights in training say, with publish.mismatch_action set.

    Worth a retry: nothing of the step was trained or saved, and a restart starts the servers anew. Where the
    cause persists, it ends the next attempt in the same step.
    """

    exit_code = EXIT_RETRYABLE


class StorageError(McoreRLError, RuntimeError):
    """A file of the run cannot be written, or another process holds its directory."""

    exit_code = EXIT_RETRYABLE


class CheckpointError(StorageError):
    """A checkpoint cannot be written."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what was saved, or not safe to read: a retry would meet it again."""

    exit_code = EXIT_CONFIG


class ResourceError(McoreRLError, RuntimeError):
    """The operating system gives this process no more of something that it limits, such as open files."""

    exit_code = EXIT_RETRYABLE


class RendezvousError(McoreRLError, RuntimeError):
    """The ranks of a run did not find each other: a host has no address, or some rank never came."""

    exit_code = EXIT_RETRYABLE


class PreemptedError(McoreRLError, RuntimeError):
    """The run was asked to leave and has saved its state."""

    exit_code = EXIT_RETRYABLE


class NumericsError(McoreRLError, ArithmeticError):
    """A loss or gradient is not finite, or an exact identity does not hold."""

    exit_code = EXIT_NUMERICS


class NothingToDo(McoreRLError):
    """The checkpoint that a run continues from is that of its last step."""

    exit_code = EXIT_DONE


def requests_to_leave() -> tuple[signal.Signals, ...]:
    """The signals that ask a run to end: the hangup of a terminal too, unless `nohup` has it ignored."""
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return signal.SIGTERM, signal.SIGINT, *hangup


class AskedToLeave(SystemExit):
    """SIGTERM, SIGINT or SIGHUP was delivered to this process; only its signal handler raises this.

    The SystemExit or KeyboardInterrupt of user code is another thing: nobody has asked, and no step is done.
    """

    def __init__(self, number: int) -> None:
        super().__init__(EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_RETRYABLE)
        self.number = number

    def __str__(self) -> str:
        return f"{signal.Signals(self.number).name} was delivered"
