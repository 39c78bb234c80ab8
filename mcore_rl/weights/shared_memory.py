"""Files of /dev/shm that torch in another process maps as a tensor's storage (its `file_system` sharing).

Written by hand: torch's own way starts a daemon that inherits our streams and lives as long as a server that
has opened a file, and is chosen by a switch for the whole process. A server runs such a daemon of its own.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from mcore_rl.errors import ConfigError

_ROOT = Path("/dev/shm")
_PREFIX = "mcore_rl_"
_HEADER = 64
"""bytes before the data: torch's RefcountedMapAllocator keeps the count of users in the first four"""
_USERS = 1 << 30
"""so that no user is the last one, who would remove the file: that is for us to do"""


class SharedBytes:
    """`nbytes` of memory that processes of this machine open by name; removed by `close`.

    Raises:
        ConfigError: the machine has not as much shared memory.
    """

    def __init__(self, nbytes: int) -> None:
        _sweep()
        self._links: set[Path] = set()
        self._kept: set[Path] = set()
        self._round = 0
        name = f"{_PREFIX}{uuid.uuid4().hex}"
        self._path = _ROOT / f".{name}"  # not swept before it is locked
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._path = self._path.rename(_ROOT / name)
            # Now, since a write to memory that is not there ends the process.
            os.posix_fallocate(self._file, 0, _HEADER + nbytes)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"{_ROOT} has no room for a bucket of {nbytes} bytes ({error}); enlarge it (docker: "
                "--shm-size), or lower publish.bucket_mib"
            ) from error
        mapped = torch.frombuffer(mmap.mmap(self._file, _HEADER + nbytes), dtype=torch.uint8)
        mapped[:4].view(torch.int32).fill_(_USERS)
        self.data: Tensor = mapped[_HEADER:]
        """[nbytes] uint8"""

    def handle(self, nbytes: int, user: int) -> object:
        """Pickles to what another process unpickles to the tensor [nbytes] of the first bytes.

        Every process is a `user` with a name of its own for the file: when it ends, its daemon of torch
        removes the names that it was told, and others may still have to open theirs.
        """
        link = self._path.with_name(f"{self._path.name}.{self._round}.{user}")
        if link not in self._links:
            link.hardlink_to(self._path)
            self._links.add(link)
        name, size = f"/{link.name}".encode(), self.data.numel()
        storage = Rebuilt(reductions.rebuild_storage_filename, torch.UntypedStorage, b"", name, size)
        typed = Rebuilt(reductions.rebuild_typed_storage, storage, torch.uint8)
        view = (0, torch.Size([nbytes]), (1,), False)
        return Rebuilt(reductions.rebuild_tensor, Tensor, typed, view)

    def renew(self, *, keep: bool) -> None:
        """The next names are others; those that were handed out go, unless some may still be opened: `keep`.

        Never the same again: the daemon of a user that ends removes those that it was told, late.
        """
        self._round += 1
        if keep:
            self._kept |= self._links
        else:
            _remove(self._links)
        self._links = set()

    def close(self) -> None:
        """Remove the file; who has it open keeps its memory. May be called again."""
        _remove({*self._links, *self._kept, self._path})
        with suppress(OSError):
            os.close(self._file)


def _remove(paths: set[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


class Rebuilt:
    """Unpickles to `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def _sweep() -> None:
    """Remove what a process left that was killed: nobody holds its lock."""
    for path in _ROOT.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another one's, or removed meanwhile
            file = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(file)
