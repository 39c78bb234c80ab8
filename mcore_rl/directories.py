"""What is ours on a disk: marked directories, locks that end with their process, files that appear whole.

A directory that is removed or replaced as a whole carries a mark, the file MARK, from the moment it is made.
What has no mark was written by somebody else, and is never removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mcore_rl.errors import ConfigError, StorageError

MARK = ".mcore_rl"
LOCK = "LOCK"
_PARTIAL = ".partial"


def is_ours(directory: Path) -> bool:
    """Whether `directory` carries the mark. A link does not: what it leads to may be anybody's."""
    return not directory.is_symlink() and (directory / MARK).is_file()


def is_free(directory: Path) -> bool:
    """Whether nothing is lost when `directory` goes: it is not there, or empty, or ours."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        return False
    if not directory.exists() or is_ours(directory):
        return True
    return all(entry.name == MARK + _PARTIAL for entry in directory.iterdir())  # it was about to be marked


def check_free(directory: Path, remedy: str) -> None:
    """Raises ConfigError, with the `remedy`, where `directory` holds what mcore_rl did not write."""
    if not is_free(directory):
        raise ConfigError(
            f"{directory} holds files and no mark of mcore_rl ({MARK}): it would be replaced, and was "
            f"written by something else, or by an earlier version. Move it away, or {remedy}"
        )


def mark(directory: Path, **content: Any) -> None:
    """Write the mark, or write it anew, with `content` as JSON. The directory is there. Raises OSError."""
    _put(directory / MARK, (json.dumps(content) + "\n").encode())


def read_mark(directory: Path) -> dict[str, Any]:
    """The content of the mark; nothing where there is no mark, or no readable one."""
    try:
        content = json.loads((directory / MARK).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def make(directory: Path, remedy: str) -> None:
    """Make `directory` new, empty and marked; one that is ours is removed first. Raises as `remove`."""
    remove(directory, remedy)
    directory.mkdir(parents=True)
    mark(directory)


def remove(directory: Path, remedy: str) -> None:
    """Remove `directory` where it is ours or empty.

    The mark goes last, so that an interrupted removal can go on.

    Raises:
        ConfigError: something else wrote it; `remedy` says what else to do than to move it away.
        OSError: it cannot be removed.
    """
    check_free(directory, remedy)
    if not directory.exists():
        return
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARK:
            entry.unlink()
    (directory / MARK).unlink(missing_ok=True)
    directory.rmdir()


@contextlib.contextmanager
def locked(
    directory: Path, remedy: str, error: type[StorageError] = StorageError, *, name: str = LOCK
) -> Iterator[None]:
    """Hold `directory`, which is made where it is not there, by a lock on its file `name`.

    The lock ends with the process, however that ends.

    Raises:
        StorageError, or the `error` given: another process holds it, or it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / name).open("a+")
    except OSError as cause:
        raise storage_error(directory, cause, remedy=remedy, kind=error) from cause
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise error(
                f"{directory} is in use by {holder}: two runs would destroy each other's files. Wait for it, "
                f"or {remedy}"
            ) from None
        except OSError as cause:
            raise storage_error(directory, cause, remedy=remedy, kind=error) from cause
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        except OSError as cause:
            raise storage_error(directory, cause, remedy=remedy, kind=error) from cause
        yield


def write_whole(path: Path, content: str | bytes) -> None:
    """Put `content` in the file `path`: whoever reads it finds the old content or all of the new.

    Raises:
        StorageError: it cannot be written; the file is as it was.
    """
    data = content.encode("utf-8", errors="replace") if isinstance(content, str) else content
    try:
        _put(path, data)
    except OSError as error:
        raise storage_error(path, error, len(data)) from error


def _put(path: Path, data: bytes) -> None:
    """Write beside `path`, durably, and put it in place; nothing is left where that fails."""
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def append_line(path: Path, line: bytes) -> None:
    """Append `line`, which ends with a newline, in one piece; a line that a crash cut is closed first.

    Raises:
        StorageError: it cannot be written; the file is as it was.
    """
    try:
        with path.open("ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                line = b"\n" + line
            try:
                rest = line
                while rest:  # a disk that fills up takes a part, and says why at the next byte
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise storage_error(path, error, len(line)) from error


def storage_error(
    path: Path,
    error: OSError,
    needed: int | None = None,
    *,
    remedy: str = "name another directory",
    kind: type[StorageError] = StorageError,
) -> StorageError:
    """Why `path` cannot be written, for people; `needed`: bytes that it takes, where that is known."""
    room = ""
    place = error.filename2 or error.filename or path  # a copy names its source first
    with contextlib.suppress(OSError):
        existing = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        room = f" ({shutil.disk_usage(existing).free} bytes are free there"
        room += f", {needed} are needed)" if needed is not None else ")"
    return kind(
        f"{place}: {error.strerror or error}{room}; what was written before is untouched. "
        "Make room or make it writable and start again, with --resume where there is a checkpoint, or "
        f"{remedy}"
    )
