"""A deadline after which the process ends with a chosen exit code, whatever its interpreter is at.

faulthandler's own timer always ends with 1, where the run has said 75 or 2. A timer of the C library calls
its `_exit` on a thread that needs no interpreter.
"""

from __future__ import annotations

import ctypes
import math

_CLOCK_MONOTONIC = 1
_SIGEV_THREAD = 2


class _Event(ctypes.Structure):
    """struct sigevent: what happens when the timer is due."""

    _fields_ = (
        ("code", ctypes.c_long),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("rest", ctypes.c_char * 40),
    )


class _Setting(ctypes.Structure):
    """struct itimerspec."""

    _fields_ = (
        ("again_seconds", ctypes.c_long),
        ("again_nanoseconds", ctypes.c_long),
        ("seconds", ctypes.c_long),
        ("nanoseconds", ctypes.c_long),
    )


class ExitTimer:
    """Ends this process, and none that it forks, when its time is over."""

    def __init__(self, exit_code: int) -> None:
        """Make the timer, which does not run yet."""
        self._system = _library()
        leave = ctypes.cast(self._system._exit, ctypes.c_void_p)
        event = _Event(code=exit_code, notify=_SIGEV_THREAD, function=leave.value)
        self._timer = ctypes.c_void_p()
        if self._system.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)):
            raise OSError(ctypes.get_errno(), "timer_create")

    def start(self, seconds: float) -> None:
        """From now on, also where it runs already; the stacks are the caller's to write before."""
        self._set(max(seconds, 1e-3))

    def stop(self) -> None:
        """The process goes on."""
        self._set(0.0)

    def _set(self, seconds: float) -> None:
        part, whole = math.modf(seconds)
        setting = _Setting(seconds=int(whole), nanoseconds=int(part * 1e9))
        if self._system.timer_settime(self._timer, 0, ctypes.byref(setting), None):
            raise OSError(ctypes.get_errno(), "timer_settime")


def _library() -> ctypes.CDLL:
    """What has timer_create: the C library, or librt before glibc 2.34."""
    own = ctypes.CDLL(None, use_errno=True)
    return own if hasattr(own, "timer_create") else ctypes.CDLL("librt.so.1", use_errno=True)
