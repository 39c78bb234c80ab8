"""Standard output and error of the command, where nobody takes what is printed any more.

The reader of a pipe ends, a terminal is closed, the disk behind a log is full, or a daemon was started with
closed descriptors. Lines for people are then dropped: a run does not end because nobody watches. Output that
a command was asked for is an error, not a success without it; where its reader has left, one without a word.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from mcore_rl.errors import StorageError

EXIT_UNREAD = 141
"""what a shell says of a command that SIGPIPE has ended"""


class _Unread(StorageError):
    """Whoever read what a command prints has closed it and wants no more: nothing is said."""

    exit_code = EXIT_UNREAD


class _Stream(io.FileIO):
    """A descriptor; what it does not take is dropped, or where it is `needed` a StorageError, once."""

    def __init__(self, descriptor: int, *, needed: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.needed = needed

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            if self.needed:
                self.needed = False  # what the buffer still holds is tried again on the way out
                kind = _Unread if isinstance(error, BrokenPipeError) else StorageError
                raise kind(
                    f"standard output: {error.strerror}; not everything was printed. Send it elsewhere"
                ) from error
            written = None
        return len(data) if written is None else written


def guard(*, output: bool) -> None:
    """Make standard error, and standard output too unless `output` says that it is needed, lose no run.

    A stream that something else has taken the place of is left as it is. Asked again, the last answer holds.
    """
    _fill_closed()
    sys.stderr = _guarded(sys.stderr, sys.__stderr__, 2, needed=False)
    sys.stdout = _guarded(sys.stdout, sys.__stdout__, 1, needed=output)


def printing(work: Callable[[], int]) -> int:
    """The exit code of `work`, which prints what it was asked for; --help is such output too.

    Raises:
        StorageError: standard output does not take it.
    """
    guard(output=True)
    try:
        try:
            code = work()
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except _Unread as left:
        return left.exit_code
    except BaseException:  # which says more than what is left unprinted
        guard(output=False)
        raise
    return code


def _fill_closed() -> None:
    """A file that is opened later must not become the standard error of whatever writes to descriptor 2."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # not for writing: output that is needed has then no place to go, which is an error
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)


def _guarded(stream: TextIO | None, original: TextIO | None, descriptor: int, *, needed: bool) -> TextIO:
    line_by_line = descriptor == 2 or os.isatty(descriptor) or not needed
    ours = getattr(getattr(stream, "buffer", None), "raw", None)
    if isinstance(stream, io.TextIOWrapper) and isinstance(ours, _Stream):
        ours.needed = needed
        stream.reconfigure(line_buffering=line_by_line)
    if stream is not None and stream is not original:
        return stream
    encoding = "utf-8" if stream is None else stream.encoding
    errors = "backslashreplace" if stream is None else stream.errors
    if stream is not None:
        stream.flush()
    buffer = io.BufferedWriter(_Stream(descriptor, needed=needed))
    return io.TextIOWrapper(buffer, encoding=encoding, errors=errors, line_buffering=line_by_line)
