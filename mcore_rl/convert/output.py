"""A converted directory: written beside its name, checked, then put in place whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mcore_rl.checkpoint.manifest import sync_directory
from mcore_rl.directories import check_free, keeps_no_files, locked, mark, remove
from mcore_rl.errors import CheckpointError, ConfigError
from mcore_rl.terminal import printable

_NO_PLACE = (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
"""errors of a path that stays wrong, however often it is tried"""


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """An empty directory that becomes `target` when the block ends well; what a crash left is removed first.

    Raises:
        ConfigError: `target` exists, or what lies where it is to be written is not ours.
        CheckpointError: it cannot be written, or another process is writing it.
    """
    target = _without_dots(Path(target))
    if os.path.lexists(target):  # a link that leads nowhere too: nothing can take its place
        raise ConfigError(f"{target} exists; remove it or name another directory")
    partial, remedy = target.with_name(target.name + ".partial"), "name another target"
    try:
        check_free(partial, remedy, kind="conversion")
        with _parents(partial):
            partial.mkdir(exist_ok=True)
            mark(partial, "conversion")
            with locked(partial, remedy, CheckpointError):
                try:
                    yield _emptied(partial / "whole")
                    sync_directory(partial / "whole")
                    (partial / "whole").rename(target)
                    sync_directory(target.parent)
                finally:
                    remove(partial, remedy, kind="conversion")
    except OSError as error:
        place = f"{error.filename or partial}: {error.strerror or error}"
        if error.errno in _NO_PLACE or keeps_no_files(partial):
            raise ConfigError(f"{place}; nothing was converted. Name another target") from error
        raise CheckpointError(
            f"{place}; nothing is left of the conversion. Make room or make it writable, and convert again"
        ) from error


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make the directories above `path`; those that are new and empty in the end go again."""
    new = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in new:
            with contextlib.suppress(OSError):  # it holds what was converted
                parent.rmdir()


def _without_dots(target: Path) -> Path:
    """The same place without `..`, which would need the directory before it to be made."""
    if target.name in ("", ".."):
        return Path(os.path.realpath(target))
    return Path(os.path.realpath(target.parent)) / target.name


def _emptied(directory: Path) -> Path:
    """The directory without what a conversion that was killed left in it."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir()
    return directory


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
