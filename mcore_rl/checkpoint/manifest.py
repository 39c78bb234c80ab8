"""Two files make a directory a whole checkpoint, of a run or converted.

manifest.json has the size and SHA-256 of every other file, and what is known of them; COMMITTED, written
last, has the checksum of the manifest. Each is durable before the next.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mcore_rl.checkpoint.image import Written, write_file
from mcore_rl.errors import ConfigError, DamagedCheckpointError

COMMITTED = "COMMITTED"
MANIFEST = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint whose manifest is intact."""

    path: Path
    step: int
    files: Mapping[str, tuple[int, str]]
    """name, with slashes where it is in a folder -> (bytes, SHA-256)"""
    document: Mapping[str, Any]
    """what the run keeps besides tensors, as JSON"""

    def check(self, names: Sequence[str] | None = None) -> None:
        """Compare files (all by default) with the manifest.

        Raises:
            DamagedCheckpointError: names all that are missing, cut, changed or no plain files.
        """
        known = self.files if names is None else {name: self.files[name] for name in names}
        wrong = {self.path / name: _wrong(self.path / name, *form) for name, form in known.items()}
        if any(wrong.values()):
            raise _damaged(", ".join(f"{path} {what}" for path, what in wrong.items() if what))


def commit(directory: Path, files: Sequence[Written], *, step: int = 0, **content: Any) -> None:
    """Make `directory`, in which `files` lie, a checkpoint; `content` is kept in its manifest.

    Raises:
        OSError: a file cannot be written; the directory is none.
    """
    entries = {file.name: [file.size, file.sha256] for file in files}
    manifest = {"format": FORMAT, "step": step, "run": {}, "files": entries} | content
    written = write_file(directory / MANIFEST, json.dumps(manifest).encode())
    for place in {directory, *((directory / file.name).parent for file in files)}:
        sync_directory(place)
    write_file(directory / COMMITTED, f"{written.sha256}\n".encode())
    sync_directory(directory)


def read(path: Path) -> Saved:
    """The checkpoint in `path`, its manifest checked; `Saved.check` checks the rest.

    Raises:
        ConfigError: there is none.
        DamagedCheckpointError: its manifest is not what was committed.
    """
    try:
        if not all((path / name).is_file() for name in (COMMITTED, MANIFEST)):
            raise FileNotFoundError(path)
        mark, manifest = (path / COMMITTED).read_text(), (path / MANIFEST).read_bytes()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"{path} is no committed checkpoint (it lacks {COMMITTED} or {MANIFEST}); give the path of one"
        ) from None
    if mark.strip() != hashlib.sha256(manifest).hexdigest() or (path / MANIFEST).is_symlink():
        raise _damaged(f"{path / MANIFEST} is not the one that {COMMITTED} stands for")
    try:
        content = json.loads(manifest)
        version = content["format"]
        files = {str(name): (int(size), str(sha256)) for name, (size, sha256) in content["files"].items()}
        saved = Saved(path, int(content["step"]), files, dict(content["run"]))
        escaping = [name for name in files if not _is_inside(name)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(f"{path / MANIFEST} cannot be read ({error})") from None
    if version != FORMAT or escaping:
        raise ConfigError(f"{path / MANIFEST}: format {version} {escaping}, this version reads {FORMAT}")
    return saved


def checksum(directory: Path, name: str) -> Written:
    """Name, size and digest of a file that another library wrote; it is durable when this returns."""
    with (directory / name).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return Written(name, os.fstat(file.fileno()).st_size, digest)


def sync_directory(directory: Path) -> None:
    """Make its entries durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_inside(name: str) -> bool:
    """Whether it is the plain name of a file in the checkpoint, or in a folder of it."""
    return name == PurePosixPath(name).as_posix() and not (
        {"..", "/", "."} & {*PurePosixPath(name).parts, name}
    )


def _wrong(path: Path, size: int, sha256: str) -> str:
    if path.is_symlink() or not path.is_file():
        return "is missing or not a plain file"
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes, {size} were written"
    with path.open("rb") as file:
        same = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    return "" if same else "does not have the checksum that was written"


def _damaged(what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{what}: this checkpoint is damaged; resume with --resume previous, or convert again"
    )
