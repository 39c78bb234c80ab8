"""The rollout servers that the config names: reachable, ready, of a version and a model that fit."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import Any

from mcore_rl.config import Config
from mcore_rl.doctor.finding import Finding, guarded
from mcore_rl.errors import EXIT_RETRYABLE
from mcore_rl.kindred import KINDRED
from mcore_rl.model.hf.architecture import read_hf_config
from mcore_rl.rollout.adapters import check_adapters
from mcore_rl.rollout.client import RolloutClient, call
from mcore_rl.rollout.fleet import check_server_info
from mcore_rl.training.assemble_servers import adapter_needs

PROBE_SECONDS = 10.0
"""for one server's answers, all together"""


def check_servers(config: Config) -> list[Finding]:
    """A finding per server, or that the run starts its own."""
    if config.trains_on_rows:
        return []
    python = config.rollout.python
    if python is not None and shutil.which(python) is None:
        what, remedy = (
            f"rollout.python: {python} is no program",
            "name the interpreter that SGLang is installed for",
        )
        return [Finding("server", "error", what, remedy)]
    if not config.rollout.urls:
        return [Finding("server", "ok", "the run starts its own on this machine")]
    return [
        finding
        for url in config.rollout.urls
        for finding in guarded("server", lambda url=url: _server(config, url))
    ]


def _server(config: Config, url: str) -> Iterable[Finding]:
    client = RolloutClient(url, api_key_env=config.rollout.api_key_env, timeout=PROBE_SECONDS, retries=0)

    async def ask(opened: RolloutClient) -> tuple[bool, dict[str, Any], dict[str, Any]]:
        return await opened.ready(), await opened.server_info(), await opened.model_info()

    ready, server, model = call(client, ask)
    check_server_info(url, server, experts=config.rollout.routing_replay)
    if (needs := adapter_needs(config)) is not None:
        check_adapters(url, server, needs)
    kind = read_hf_config(config.model.path).get("model_type")
    if model.get("model_type", kind) not in (kind, KINDRED.get(str(kind))):
        yield Finding(
            "server",
            "error",
            f"{url} serves {model.get('model_path')} of type {model['model_type']}, model.path is {kind}",
            "start the server on the policy's own model",
        )
        return
    if not ready:
        yield Finding(
            "server",
            "error",
            f"{url} answers, but is not ready",
            "wait until its model is loaded, or see its log",
            EXIT_RETRYABLE,
        )
        return
    yield Finding(
        "server", "ok", f"{url}: version {server.get('version')}, {kind} from {model.get('model_path')}"
    )
