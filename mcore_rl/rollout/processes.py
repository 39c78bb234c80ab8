"""A rollout server as a child process: its port, its log, its end."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

from mcore_rl.errors import RolloutError
from mcore_rl.rollout import child
from mcore_rl.rollout.client import RolloutClient, call
from mcore_rl.rollout.programs import Program

_POLL_SECONDS = 0.1
_TERM_SECONDS = 5.0
_LOG_TAIL_BYTES = 4000


class LocalServer:
    """A server as a child: `with LocalServer(directory, Embedded(), log_file=...) as server: server.url`.

    It has a session of its own (Ctrl-C reaches the owner alone, which then closes it) and ends with the
    process that started it. Linux ties it to the starting *thread*: start it from one that outlives it.

    Args:
        model_dir: HF checkpoint directory.
        program: what serves it.
        log_file: its output; a restart appends.
        start_timeout: seconds until it must be ready.
    """

    def __init__(
        self, model_dir: Path, program: Program, *, log_file: Path, start_timeout: float = 120.0
    ) -> None:
        self.model_dir = model_dir
        self.program = program
        self.log_file = log_file
        self.start_timeout = start_timeout
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._reserved: socket.socket | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._group_ended = True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self) -> None:
        """Returns when the server is ready. Raises RolloutError, with the end of its log, when it is not."""
        self.launch()
        try:
            self.wait()
        except BaseException:
            self.close()
            raise

    def launch(self) -> None:
        """Starts the process, on a port of its own; `is_ready` says when it answers."""
        self._reserved = _reserve_port()
        port = self._reserved.getsockname()[1]
        self._scratch = tempfile.TemporaryDirectory(prefix="mcore_rl_server_")
        command = self.program.command(self.model_dir, port, Path(self._scratch.name))
        atexit.register(self.close)
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, child.__file__, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.program.environment()),
                start_new_session=True,
            )
        self._group_ended = False
        self._started = time.monotonic()
        self.url = f"http://127.0.0.1:{port}"

    def wait(self) -> None:
        """Returns when the server is ready. Raises RolloutError when it does not become so."""
        while not self.is_ready():
            time.sleep(_POLL_SECONDS)

    def is_ready(self) -> bool:
        """Whether it answers. Raises RolloutError when it has ended, or exceeds `start_timeout`."""
        self.check()
        if call(RolloutClient(self.url), lambda client: client.ready()):
            self._release()
            return True
        if time.monotonic() - self._started > self.start_timeout:
            raise RolloutError(
                f"server for {self.model_dir} not ready after {self.start_timeout:g} s (start_timeout); "
                f"{self._log_tail()}"
            )
        return False

    def check(self) -> None:
        """Raises RolloutError, with the end of the log, when the server has ended."""
        if self.process is None:
            raise RolloutError(f"server for {self.model_dir} was not started; call start() first")
        code = self.process.poll()
        if code is not None:
            raise RolloutError(f"server for {self.model_dir} ended with code {code}; {self._log_tail()}")

    def close(self) -> None:
        """Ends the server: SIGTERM, then SIGKILL to its process group. May be called again."""
        self._end(signal.SIGTERM, signal.SIGKILL)

    def kill(self) -> None:
        """Ends the server at once: it may be stopped, or hang."""
        self._end(signal.SIGKILL)

    def _end(self, *signals: signal.Signals) -> None:
        atexit.unregister(self.close)
        self._release()
        if self.process is None or self._group_ended:
            return
        for number in signals:
            if self.process.poll() is None:
                self._signal_group(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(_TERM_SECONDS)
        self._signal_group(signal.SIGKILL)  # what the server itself had started
        self._group_ended = True

    def _signal_group(self, number: signal.Signals) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _release(self) -> None:
        """Gives up what only a start needs: the reserved port, the private directory."""
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _log_tail(self) -> str:
        with self.log_file.open("rb") as log:
            log.seek(max(0, self.log_file.stat().st_size - _LOG_TAIL_BYTES))
            text = log.read().decode(errors="replace").strip()
        return f"the end of {self.log_file}:\n{text}"


def _reserve_port() -> socket.socket:
    """A free port that stays ours: bound, not listening, it is given to nobody; the server may take it."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved
