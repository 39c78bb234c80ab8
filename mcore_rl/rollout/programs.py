"""What a local rollout server runs: the embedded server, or SGLang under an interpreter of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mcore_rl.errors import ConfigError

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
        start = [sys.executable, "-m", "mcore_rl.server", str(model_dir), *self.options]
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
        """This process's, offline, without what misleads the server (_NOT_FOR_SGLANG, _TORCHRUN)."""
        left_out = _NOT_FOR_SGLANG | _TORCHRUN
        return {name: value for name, value in os.environ.items() if name not in left_out} | _OFFLINE


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
