"""Rollout servers: started on this machine, or already running somewhere."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from mcore_rl.errors import RolloutError
from mcore_rl.rollout.client import RolloutClient

_POLL_SECONDS = 0.05
_TERM_SECONDS = 5.0
_LOG_TAIL_BYTES = 4000


class LocalServer:
    """An embedded server as a child: `with LocalServer(directory, log_file=...) as server: server.url`.

    It has a session of its own (Ctrl-C reaches the owner alone, which then closes it) and ends with the
    process that started it. Linux ties it to the starting *thread*: start it from one that outlives it.

    Args:
        model_dir: HF checkpoint directory.
        log_file: its output; the port is passed through `<log_file>.port`.
        api_key_env: environment variable with the key that it shall ask for.
        threads: CPU threads.
        options: more command line options of `mcore-rl serve`, such as `("--max-length", "512")`.
        start_timeout: seconds until it must be ready.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        log_file: Path,
        api_key_env: str | None = None,
        threads: int = 2,
        options: Sequence[str] = (),
        start_timeout: float = 120.0,
    ) -> None:
        self.model_dir = model_dir
        self.log_file = log_file
        self.api_key_env = api_key_env
        self.threads = threads
        self.options = options
        self.start_timeout = start_timeout
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self) -> None:
        """Returns when the server is ready. Raises RolloutError, with the end of its log, when it is not."""
        port_file = self.log_file.with_name(self.log_file.name + ".port")
        port_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "mcore_rl.rollout.embedded", str(self.model_dir), *self.options]
        command += [
            "--threads",
            str(self.threads),
            "--port-file",
            str(port_file),
            "--parent-pid",
            str(os.getpid()),
        ]
        if self.api_key_env is not None:
            command += ["--api-key-env", self.api_key_env]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": str(self.threads)}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | offline,
                start_new_session=True,
            )
        atexit.register(self.close)
        try:
            self._wait_for(port_file)
        except BaseException:
            self.close()
            raise
        finally:
            port_file.unlink(missing_ok=True)

    def _wait_for(self, port_file: Path) -> None:
        """The port file appears when requests are answered."""
        end = time.monotonic() + self.start_timeout
        while not port_file.exists():
            self.check()
            if time.monotonic() > end:
                raise RolloutError(
                    f"server for {self.model_dir} not ready after {self.start_timeout:g} s (start_timeout); "
                    f"{self._log_tail()}"
                )
            time.sleep(_POLL_SECONDS)
        self.url = f"http://127.0.0.1:{int(port_file.read_text())}"

    def check(self) -> None:
        """Raises RolloutError, with the end of the log, when the server has ended."""
        if self.process is None:
            raise RolloutError(f"server for {self.model_dir} was not started; call start() first")
        code = self.process.poll()
        if code is not None:
            raise RolloutError(f"server for {self.model_dir} ended with code {code}; {self._log_tail()}")

    def close(self) -> None:
        """Ends the server: SIGTERM, then SIGKILL to its process group. May be called again."""
        atexit.unregister(self.close)
        if self.process is None or self.process.poll() is not None:
            return
        for number, patience in ((signal.SIGTERM, _TERM_SECONDS), (signal.SIGKILL, _TERM_SECONDS)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
                return

    def _log_tail(self) -> str:
        text = self.log_file.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace").strip()
        return f"the end of {self.log_file}:\n{text}"


async def wait_ready(clients: Sequence[RolloutClient], *, timeout: float) -> None:
    """Returns when every (opened) client's server is ready. Raises RolloutError naming those that are not."""
    end = time.monotonic() + timeout
    absent = list(clients)
    while True:
        ready = await asyncio.gather(*(client.ready() for client in absent))
        absent = [client for client, is_ready in zip(absent, ready, strict=True) if not is_ready]
        if not absent:
            return
        if time.monotonic() > end:
            urls = ", ".join(client.url for client in absent)
            raise RolloutError(
                f"not ready after {timeout:g} s: {urls}; start them or correct their addresses"
            )
        await asyncio.sleep(min(1.0, timeout / 10))
