"""A converted directory: written beside its name, checked, then put in place whole."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mcore_rl.checkpoint.manifest import sync_directory
from mcore_rl.directories import MARK, make
from mcore_rl.errors import CheckpointError, ConfigError
from mcore_rl.terminal import printable


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """An empty directory that becomes `target` when the block ends well; what a crash left is removed first.

    Raises:
        ConfigError: `target` exists, or what lies where it is to be written is not ours.
        CheckpointError: it cannot be written, or another process is writing it.
    """
    target = Path(target)
    if target.exists():
        raise ConfigError(f"{target} exists; remove it or name another directory")
    partial = target.with_name(target.name + ".partial")
    try:
        with _locked(target.with_name(target.name + ".lock")):
            make(partial, "name another target", kind="conversion")
            try:
                yield partial
                (partial / MARK).unlink()  # what is complete is never removed
                sync_directory(partial)
                partial.rename(target)
                sync_directory(target.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or partial}: {error.strerror or error}; nothing is left of the conversion. "
            "Make room or make it writable, and convert again"
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process; it ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{path}: another process is converting to this directory") from None
        yield
        path.unlink(missing_ok=True)


class ConversionProgress:
    """A line on stderr every few seconds: parameters and bytes done, of how many."""

    def __init__(self, parameters: int, seconds: float = 2.0) -> None:
        """`parameters` to come; at most one line in `seconds`."""
        self._total, self._every = parameters, seconds
        self.parameters, self.bytes = 0, 0
        self._begin = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._begin

    def add(self, size: int) -> None:
        """One parameter of `size` bytes is done."""
        self.parameters += 1
        self.bytes += size
        if time.monotonic() - self._last >= self._every or self.parameters == self._total:
            self._last = time.monotonic()
            rate = self.bytes / max(self.seconds, 1e-9) / 1e9
            line = f"{self.parameters}/{self._total} parameters, {self.bytes / 1e9:.2f} GB, {rate:.2f} GB/s"
            print(printable(line), file=sys.stderr, flush=True)
