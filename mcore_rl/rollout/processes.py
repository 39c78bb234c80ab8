"""A rollout server as a child process: what it runs, its port, its log, its end.

It runs the embedded server, or SGLang under an interpreter of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, Self

from mcore_rl.errors import ConfigError, RolloutError
from mcore_rl.imports import python_module
from mcore_rl.rollout import child
from mcore_rl.rollout.client import RolloutClient, call

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class Program(Protocol):
    """Command line and environment of a server on one port."""

    def command(self, model_dir: Path, port: int, scratch: Path) -> list[str]:
        """`scratch` is a private directory of this start, removed once the server is ready."""
        ...

    def environment(self) -> Mapping[str, str]:
        """The whole environment of the server."""
        ...


class Embedded:
    """The embedded server, under this interpreter.

    Args:
        api_key_env: environment variable with the key that it shall ask for.
        threads: CPU threads.
        options: more command line options of `mcore-rl serve`, such as `("--max-length", "512")`.
    """

    def __init__(
        self, *, api_key_env: str | None = None, threads: int = 2, options: Sequence[str] = ()
    ) -> None:
        self.api_key_env = api_key_env
        self.threads = threads
        self.options = options

    def command(self, model_dir: Path, port: int, scratch: Path) -> list[str]:
        """The command line."""
        key = ["--api-key-env", self.api_key_env] if self.api_key_env is not None else []
        start = [*python_module("mcore_rl.server"), str(model_dir), *self.options]
        return [*start, "--threads", str(self.threads), "--port", str(port), *key]

    def environment(self) -> Mapping[str, str]:
        """This process's, offline."""
        return os.environ | _OFFLINE | {"OMP_NUM_THREADS": str(self.threads)}


class SGLang:
    """SGLang's own server.

    Args:
        python: the interpreter that SGLang is installed for; its torch may be another version than ours.
        dtype: of the served weights, `float32` or `bfloat16`.
        api_key_env: environment variable with the key that it shall ask for.
        options: more options of `sglang.launch_server`, which win over those set here.
    """

    def __init__(
        self, python: Path, *, dtype: str, api_key_env: str | None = None, options: Sequence[str] = ()
    ) -> None:
        self.python = python
        self.dtype = dtype
        self.api_key_env = api_key_env
        self.options = options

    def command(self, model_dir: Path, port: int, scratch: Path) -> list[str]:
        """The command line; a key goes into a file that only we can read, since everyone can read this."""
        address = ["--host", "127.0.0.1", "--port", str(port)]
        start = [str(self.python), "-m", "sglang.launch_server", "--model-path", str(model_dir), *address]
        return [*start, "--dtype", self.dtype, "--skip-server-warmup", *self._key(scratch), *self.options]

    def _key(self, scratch: Path) -> list[str]:
        if self.api_key_env is None:
            return []
        key = os.environ.get(self.api_key_env, "")
        if not key:
            raise ConfigError(
                f"rollout.api_key_env: the environment variable {self.api_key_env} is not set; export it "
                "or drop the key"
            )
        file = scratch / "key.yaml"
        # SGLang logs its settings at level info, the key among them.
        file.write_text(json.dumps({"api-key": key, "log-level": "warning"}))
        return ["--config", str(file)]

    def environment(self) -> Mapping[str, str]:
        """This process's, offline, without what misleads the server (_NOT_FOR_SGLANG, _TORCHRUN).

        Nor does it find what lies in the current directory. An interpreter before 3.11 knows no option -P,
        and passes the variable over.
        """
        left_out = _NOT_FOR_SGLANG | _TORCHRUN
        told = {name: value for name, value in os.environ.items() if name not in left_out}
        return told | _OFFLINE | {"PYTHONSAFEPATH": "1"}


_NOT_FOR_SGLANG = frozenset({"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "SGLANG_RETURN_ORIGINAL_LOGPROB"})
"""paths of this interpreter; a switch that returns log-probs before the temperature"""

_TORCHRUN = frozenset(
    {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    | {"GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"}
    | {"TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_ERROR_FILE"}
    | {"TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"}
)
"""What torchrun tells a rank of itself. With TORCHELASTIC_USE_AGENT_STORE torch takes the store of every new
process group for one that torchrun serves: the server would wait for its own, for ever."""


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
