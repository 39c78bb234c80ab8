"""What is ours on a disk: marked directories, locks that end with their process, files that appear whole.

A directory that is removed or replaced as a whole carries a mark, the file MARK, from the moment it is made.
The mark says what kind of directory it is, and only who writes that kind removes it: a whole run that lies
where weights are published is not a version of them. What has no mark was written by somebody else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from mcore_rl.errors import ConfigError, StorageError
from mcore_rl.terminal import quoted

MARK = ".mcore_rl"
LOCK = "LOCK"
VERSION = re.compile(r"(initial|\d+)(\.partial)?")
"""the name of a directory of published weights"""
Kind = Literal[
    "run",
    "weights",
    "samples",
    "rollouts",
    "sampled",
    "checkpoint",
    "model",
    "adapter",
    "rehearsal",
    "conversion",
    "evaluation",
]
"""what a marked directory is"""
_PARTIAL = ".partial"
_HOLDER = re.compile(rb"(process [^\n]*\n?)?")
"""what a lock's file holds: who has, or had it"""
_HOLDER_BYTES = 4096
_REFUSALS = (errno.ENOENT, errno.EPERM, errno.EACCES)
_NO_DIRECTORY = (errno.EEXIST, errno.ENOTDIR, errno.ELOOP)
_held_files: set[FileIO] = set()
"""locks of this process"""


def is_ours(directory: Path, kind: Kind) -> bool:
    """Whether `directory` carries the mark of `kind`. A link does not: what it leads to may be anybody's."""
    return not directory.is_symlink() and kind_of(directory) == kind


def is_free(directory: Path, kind: Kind) -> bool:
    """Whether nothing is lost when `directory` goes: it is not there, or empty, or ours of this `kind`."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        return False
    if not directory.exists() or is_ours(directory, kind):
        return True
    return all(_is_partial_mark(entry.name) for entry in directory.iterdir())  # it was about to be marked


def _is_partial_mark(name: str) -> bool:
    return name.startswith(f"{MARK}.") and name.endswith(_PARTIAL)


def check_free(directory: Path, remedy: str, *, kind: Kind) -> None:
    """Raises ConfigError, with the `remedy`, where `directory` holds files and not the mark of `kind`."""
    if is_free(directory, kind):
        return
    other = None if directory.is_symlink() else kind_of(directory)
    if other is not None:
        raise ConfigError(
            f"{directory} is marked as of the kind {quoted(other)} ({MARK}), and a directory of the kind "
            f"{kind!r} would replace it. Nothing was touched. Move it away, or {remedy}"
        )
    raise ConfigError(
        f"{directory} holds files and no mark of mcore_rl ({MARK}): it would be replaced, and was "
        f"written by something else, or by an earlier version. Move it away, or {remedy}"
    )


def mark(directory: Path, kind: Kind, **content: Any) -> None:
    """Write the mark, or write it anew, with `content` as JSON. The directory is there. Raises OSError."""
    _put(directory / MARK, (json.dumps({"kind": kind, **content}) + "\n").encode())


def kind_of(directory: Path) -> str | None:
    """The kind that the mark of `directory` names; None where there is no mark, or no readable one."""
    return read_mark(directory).get("kind")


def read_mark(directory: Path) -> dict[str, Any]:
    """The content of the mark; nothing where there is no mark, or no readable one."""
    try:
        content = json.loads((directory / MARK).read_text()) if (directory / MARK).is_file() else None
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def files_in(directory: Path) -> list[str]:
    """The names of the files in `directory`, sorted; of those in a folder of it with a slash."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def make(directory: Path, remedy: str, *, kind: Kind) -> None:
    """Make `directory` new, empty and marked; one of the same kind is removed first. Raises as `remove`."""
    remove(directory, remedy, kind=kind)
    directory.mkdir(parents=True)
    mark(directory, kind)


def remove(directory: Path, remedy: str, *, kind: Kind) -> None:
    """Remove `directory` where it is empty, or ours and of this `kind`.

    The mark goes last, so that an interrupted removal can go on.

    Raises:
        ConfigError: something else wrote it, or it is of another kind; `remedy` says what else to do than to
            move it away.
        OSError: it cannot be removed.
    """
    check_free(directory, remedy, kind=kind)
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

    The lock ends with the process, however that ends, also where processes live on that it has forked.

    Raises:
        ConfigError: a file, or a link that leads nowhere or to itself, is where the directory or a parent of
            it belongs, or what something else wrote, or a link, has the name of the lock; or nothing can be
            written there, as in /proc.
        StorageError, or the `error` given: another process holds it, or it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / name).is_symlink():  # what it leads to would be overwritten
            raise _no_lock(directory / name, remedy)
        file = (directory / name).open("ab+", buffering=0)
    except OSError as cause:
        if cause.errno in _NO_DIRECTORY:
            raise ConfigError(
                f"{directory} cannot be a directory: a file, or a link that leads nowhere or to itself, is "
                f"in its way ({cause.strerror}: {cause.filename}). Move that away, or {remedy}"
            ) from cause
        if keeps_no_files(directory, cause):
            raise ConfigError(
                f"{directory}: {cause.strerror}: its file system keeps no files, like those of /proc and "
                f"/sys; {remedy}"
            ) from cause
        raise storage_error(directory, cause, remedy=remedy, kind=error) from cause
    with file, _closed_in_forks(file):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(_HOLDER_BYTES).decode(errors="replace").strip() or "another process"
            raise error(
                f"{directory} is in use by {holder}: two runs would destroy each other's files. Wait for it, "
                f"or {remedy}"
            ) from None
        except OSError as cause:
            raise storage_error(directory, cause, remedy=remedy, kind=error) from cause
        file.seek(0)
        if not _HOLDER.fullmatch(file.read(_HOLDER_BYTES)):
            raise _no_lock(directory / name, remedy)
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError as cause:
            raise storage_error(directory, cause, remedy=remedy, kind=error) from cause
        yield


def _no_lock(path: Path, remedy: str) -> ConfigError:
    return ConfigError(
        f"{path} is no lock of mcore_rl: something else wrote it, and it would be overwritten. Nothing was "
        f"touched. Move it away, or {remedy}"
    )


@contextlib.contextmanager
def _closed_in_forks(file: FileIO) -> Iterator[None]:
    """Processes forked meanwhile close `file`: a lock is shared by them, and would outlive its holder."""
    _held_files.add(file)
    try:
        yield
    finally:
        _held_files.discard(file)


def _close_held_files() -> None:
    """A forked process is no holder. To close a file there does not unlock it here."""
    for file in tuple(_held_files):
        file.close()
    _held_files.clear()


os.register_at_fork(after_in_child=_close_held_files)


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
    """Write beside `path`, durably, and put it in place; nothing is left where that fails.

    The file beside it is a new one of this process: what a link of that name leads to is not written to, and
    two processes do not write into each other's.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:  # a signal that ends the process too
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


def keeps_no_files(path: Path, error: OSError) -> bool:
    """Whether `error` came because `path` is in a file system of the kernel's own, which never takes a file.

    It has no blocks. Some that are remote say so too, and fail otherwise.
    """
    with contextlib.suppress(OSError, StopIteration):
        return error.errno in _REFUSALS and shutil.disk_usage(_existing(path)).total == 0
    return False


def _existing(path: Path) -> Path:
    """The nearest of `path` and its parents that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


_LOST: dict[type[OSError], str] = {
    FileNotFoundError: "Its directory was removed or never there: put it back or make it, and start again",
    NotADirectoryError: "A file stands where one of its directories belongs: move that away and start again",
    IsADirectoryError: "A directory stands where the file belongs: move that away and start again",
}


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
        room = f" ({shutil.disk_usage(_existing(path)).free} bytes are free there"
        room += f", {needed} are needed)" if needed is not None else ")"
    kept, first = "what was written before is untouched. ", "Make room or make it writable and start again"
    if type(error) in _LOST:  # neither helps then
        kept, room, first = "", "", _LOST[type(error)]
    return kind(f"{place}: {error.strerror or error}{room}; {kept}{first}, or {remedy}")
