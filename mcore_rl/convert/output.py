"""A converted directory: written beside its name, checked, then put in place whole.

Two files make it what a training checkpoint is (docs/models.md): manifest.json with the size and SHA-256
of every other file, and COMMITTED with the checksum of the manifest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mcore_rl.errors import CheckpointError, ConfigError

MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"
FORMAT = 1
"""of manifest.json"""


@contextlib.contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """An empty directory that becomes `target` when the block ends well; what a crash left is removed first.

    Raises:
        ConfigError: `target` exists.
        CheckpointError: it cannot be written, or another process is writing it.
    """
    target = Path(target)
    if target.exists():
        raise ConfigError(f"{target} exists; remove it or name another directory")
    partial = target.with_name(target.name + ".partial")
    try:
        with _locked(target.with_name(target.name + ".lock")):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                yield partial
                _sync(partial)
                partial.rename(target)
                _sync(target.parent)
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


def write_manifest(directory: Path, conversion: dict[str, Any]) -> None:
    """Describe every file in `directory`, durably; `conversion` says what was done."""
    files = {}
    for path in sorted(directory.iterdir()):
        with path.open("rb") as file:
            files[path.name] = [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
            os.fsync(file.fileno())
    manifest = {"format": FORMAT, "step": 0, "files": files, "run": {}, "conversion": conversion}
    content = json.dumps(manifest, indent=1).encode()
    _write(directory / MANIFEST, content)
    _write(directory / COMMITTED, f"{hashlib.sha256(content).hexdigest()}\n".encode())


def check_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a committed directory, every file compared with it.

    Raises:
        ConfigError: it has none.
        CheckpointError: names every file that is missing, cut or changed.
    """
    try:
        mark, content = (directory / COMMITTED).read_text(), (directory / MANIFEST).read_bytes()
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}: this is no committed checkpoint") from None
    if mark.strip() != hashlib.sha256(content).hexdigest():
        raise CheckpointError(f"{directory / MANIFEST}: not what {COMMITTED} stands for; convert again")
    manifest = json.loads(content)
    wrong = [name for name, form in manifest["files"].items() if not _intact(directory / name, *form)]
    if wrong:
        raise CheckpointError(f"{directory}: {wrong} are missing, cut or changed; convert again")
    return manifest


def _intact(path: Path, size: int, sha256: str) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Progress:
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
            print(line, file=sys.stderr, flush=True)
