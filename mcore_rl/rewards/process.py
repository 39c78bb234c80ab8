"""One process of the reward pool, as the trainer sees it: what it is asked, says, prints, and how it ends.

Nothing that a worker does to its end of the connection keeps the trainer waiting: what comes is read as far
as it has come, and what is sent has a deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any

from mcore_rl.imports import python_module
from mcore_rl.rewards.task import Task
from mcore_rl.terminal import printable

PRINTED = 1 << 20
"""bytes that one call may print; more make its sample void"""
SHOWN = 1 << 14
"""bytes of it that are shown"""
START_SECONDS = 120.0
"""until a worker has imported the function"""
_SEND_SECONDS = 10.0
"""until a worker has read what it is asked"""
_LONGEST = 1 << 26
"""bytes of an answer"""
_HEADER = struct.Struct("!i")
"""of multiprocessing's connections, with which the worker reads and writes"""


class RewardProcess:
    """One process, and the call that it is in (`of`)."""

    def __init__(self, task: Task) -> None:
        ours, theirs = socket.socketpair()
        read, write = os.pipe()
        command = [*python_module("mcore_rl.rewards"), str(os.getpid()), str(theirs.fileno())]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(task.path)}
        try:
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=write,
                stderr=write,
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            os.close(read)
            raise
        finally:
            theirs.close()
            os.close(write)
        os.set_blocking(read, False)
        self.output = read
        self.socket = ours
        self.ready = False
        self.of: Any = None
        self.deadline = time.monotonic() + START_SECONDS
        self.printed = 0
        self.prints = True
        """it has not closed its output"""
        self._received = bytearray()
        with contextlib.suppress(OSError):  # it has ended: its silence will say so
            self._send(pickle.dumps(task))

    @property
    def busy(self) -> bool:
        """It is starting, or in a call."""
        return not self.ready or self.of is not None

    def ask(self, of: Any, asked: Any, seconds: float) -> None:
        """Begin a call, remembered as `of`. Raises OSError where the process has ended or does not read."""
        self._send(pickle.dumps(asked, pickle.HIGHEST_PROTOCOL))
        self.of, self.printed = of, 0
        self.deadline = time.monotonic() + seconds

    def _send(self, message: bytes) -> None:
        self.socket.settimeout(_SEND_SECONDS)
        self.socket.sendall(_HEADER.pack(len(message)) + message)

    def hear(self) -> list[Any]:
        """The answers that have come whole, once there is something to read.

        Raises:
            OSError, ValueError: it has closed the connection, or sends what is no answer.
        """
        self.socket.settimeout(_SEND_SECONDS)
        chunk = self.socket.recv(1 << 16)
        if not chunk:
            raise EOFError
        self._received += chunk
        found = []
        while len(self._received) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._received)
            if not 0 <= length <= _LONGEST:
                raise ValueError(f"an answer of {length} bytes")
            end = _HEADER.size + length
            if len(self._received) < end:
                break
            found.append(json.loads(self._received[_HEADER.size : end]))
            del self._received[:end]
        return found

    def drain(self) -> None:
        """Read what was printed, and show the beginning of it."""
        with contextlib.suppress(BlockingIOError):
            while self.printed <= PRINTED:
                text = os.read(self.output, 1 << 16)
                if not text:
                    self.prints = False
                    return
                shown = text[: max(0, SHOWN - self.printed)].decode(errors="replace").rstrip("\n")
                self.printed += len(text)
                if shown:
                    print(printable(shown), file=sys.stderr)

    def end(self) -> int:
        """Kill it with every process of its session; returns its exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        status = self.process.wait()
        self.socket.close()
        os.close(self.output)
        return status
