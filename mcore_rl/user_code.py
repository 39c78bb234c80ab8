"""What the user's own code raised, and where: its file, line and text, for the message that tells of it."""

from __future__ import annotations

import importlib
import os
import sysconfig
import traceback
from pathlib import Path

from mcore_rl.errors import AskedToLeave
from mcore_rl.terminal import escaped

_LIBRARY = str(Path(__file__).parent)
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_IMPORTS = str(Path(importlib.__file__).parent)
"""which raises for a module that is not there, or does not parse: no place to look at"""
_FRAMES = 3
"""the most that a message shows, the last ones"""
_LINE_CHARS = 80
"""the most of one line of code"""
MOST_CHARS = 600
"""the most that `place` says"""
_SAID_CHARS = 2000
"""the most that `said` repeats"""


def said(error: BaseException) -> str:
    """`str(error)`, cut where it is long; of an error that cannot be asked for its text, that it cannot."""
    try:
        text = str(error)
    except AskedToLeave:
        raise
    except BaseException as second:  # __str__ is the user's code as well
        return f"its text cannot be had: __str__ raised {type(second).__name__}"
    return text if len(text) <= _SAID_CHARS else f"{text[:_SAID_CHARS]}..."


def place(error: BaseException) -> str:
    """` at rewards.py:12, in reward: return 1 / 0`, the frames that led there first; empty without any.

    The frames are those of the user's own files: not this package, and nothing that is installed, unless all
    else is, as where the function is a package's.
    """
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not _is_below(frame.filename, (_LIBRARY, _IMPORTS))]
    own = [frame for frame in outside if not _is_below(frame.filename, _INSTALLED)]
    shown = [_frame(one) for one in (own or outside[-1:])[-_FRAMES:]]
    if isinstance(error, SyntaxError) and error.filename:  # such a module has no frame of its own
        shown.append(_line(error.filename, error.lineno or 0, "", error.text or ""))
    return f" at {', then '.join(shown)}"[:MOST_CHARS] if shown else ""


def _is_below(name: str, directories: tuple[str, ...]) -> bool:
    return name.startswith("<") or any(name.startswith(one + os.sep) for one in directories)


def _frame(frame: traceback.FrameSummary) -> str:
    return _line(frame.filename, frame.lineno or 0, f", in {frame.name}", frame.line or "")


def _line(file: str, number: int, function: str, code: str) -> str:
    try:
        near = os.path.relpath(file)
    except OSError:  # the current directory is gone
        near = ".."
    shown = escaped(code.strip())
    cut = shown if len(shown) <= _LINE_CHARS else f"{shown[:_LINE_CHARS]}..."
    return f"{escaped(file if near.startswith('..') else near)}:{number}{escaped(function)}: {cut}"
