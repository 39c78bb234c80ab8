"""Builds what a run samples from: servers that are configured or started here, and how weights reach them."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from mcore_rl.config import Config, is_loopback
from mcore_rl.errors import ConfigError
from mcore_rl.model.build import Model
from mcore_rl.model.hf.adapters import AdapterMap, matrices_with_adapters
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.parallel.control import gather_ranks, on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rollout.adapters import AdapterNeeds
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.rollout.processes import Embedded, LocalServer, SGLang
from mcore_rl.training.layout import lora_of
from mcore_rl.weights.adapters import Adapters
from mcore_rl.weights.broadcast import Distributed
from mcore_rl.weights.disk import Changes, Disk, export
from mcore_rl.weights.encoding import ENCODINGS
from mcore_rl.weights.shared import SharedTensor
from mcore_rl.weights.transport import Transport


def build_fleet(config: Config, policy: Model, weights_dir: Path, stack: ExitStack) -> Fleet:
    """The configured servers, or those that the main rank starts on the policy's own weights; collective."""
    mesh, initial = policy.mesh, weights_dir.resolve() / "initial"
    leads = gather_ranks(mesh, socket.gethostname() if mesh.is_replica_lead else "")
    check_reach(config.rollout.urls, [host for host in leads if host])
    if config.publish.transport == "adapter":
        fleet = open_fleet(config, mesh, config.model.path, stack, adapter_needs(config))
        fleet.adapters = on_main(mesh, lambda: f"mcore_rl_{secrets.token_hex(4)}")
        return fleet
    if not config.rollout.urls:
        export(policy, initial, encoding=ENCODINGS[config.publish.quantize])
    return open_fleet(config, mesh, initial, stack)


def adapter_needs(config: Config) -> AdapterNeeds | None:
    """What servers must hold beside the frozen model; None where versions are whole models."""
    if config.publish.transport != "adapter":
        return None
    lora = lora_of(config)
    assert lora is not None
    matrices = matrices_with_adapters(AdapterMap(read_architecture(config.model.path), lora))
    return AdapterNeeds(lora.rank, matrices, versions=_kept(config))


def _kept(config: Config) -> int:
    """Versions that requests may ask for at a time: one that is new comes beside those in flight."""
    return config.rollout.max_staleness + 2


def open_fleet(
    config: Config, mesh: Mesh, model_dir: Path, stack: ExitStack, adapters: AdapterNeeds | None = None
) -> Fleet:
    """The configured servers, or those that the main rank starts on `model_dir`; collective.

    Args:
        adapters: what those that are started must hold beside it.
    """
    r = config.rollout
    local: list[LocalServer] = []

    def launch() -> list[str]:
        local.extend(local_servers(config, model_dir, adapters))
        for server in local:  # all at once, then wait: most of a start is imports
            stack.callback(server.close)
            server.launch()
        for server in local:
            server.wait()
        return [server.url for server in local]

    urls = list(r.urls) if r.urls else on_main(mesh, launch)
    return Fleet(
        urls,
        vocabulary=read_architecture(config.model.path).vocab,
        api_key_env=r.api_key_env,
        timeout=r.timeout,
        health_timeout=r.health_timeout,
        local=local,
        initial=None if r.urls else model_dir,
    )


def check_reach(urls: Sequence[str], hosts: Sequence[str]) -> None:
    """Raises ConfigError, on every rank, where leads of several `hosts` would not ask the same servers.

    Args:
        urls: servers that already run; none, they are to be started on the first host.
    """
    others = set(hosts) - {hosts[0]}
    here = [url for url in urls if is_loopback(url)]
    if not others or (urls and not here):
        return
    named = f"{here[0]} is" if urls else "servers that a run starts are"
    raise ConfigError(
        f"rollout.urls: {named} reached from one machine alone, but {hosts[0]} and {min(others)} ask; "
        "start them yourself and list them by an address that all machines reach"
    ).on_every_rank()


def transport_of(config: Config, weights_dir: Path) -> Transport:
    """The configured one. Raises ConfigError where it cannot work in this launch."""
    p = config.publish
    encoding = ENCODINGS[p.quantize]
    if p.transport == "tensor":
        return SharedTensor(p.bucket_mib << 20, encoding)
    if p.transport == "distributed":
        return Distributed(p.bucket_mib << 20, encoding)
    if p.transport == "adapter":
        return Adapters(weights_dir, base=str(config.model.path), kept=_kept(config))
    if p.replica is not None:
        return Changes(weights_dir, p.replica, timeout=config.rollout.timeout, encoding=encoding)
    return Disk(weights_dir, encoding)


def local_servers(config: Config, model_dir: Path, adapters: AdapterNeeds | None = None) -> list[LocalServer]:
    """The servers that [rollout] asks for on this machine, not started; `server.log`, `server_1.log`, ..."""
    r = config.rollout
    if r.python is not None:
        dtype = {"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}[config.model.precision]
        own = [] if adapters is None else adapters.options()
        own += ["--enable-return-routed-experts"] if r.routing_replay else []
        program = SGLang(r.python, dtype=dtype, api_key_env=r.api_key_env, options=(*own, *r.options))
    else:
        program = Embedded(api_key_env=r.api_key_env, threads=r.threads, options=r.options)
    names = ["server.log", *(f"server_{number}.log" for number in range(1, r.servers))]
    logs = [config.run.dir / name for name in names]
    return [LocalServer(model_dir, program, log_file=log, start_timeout=r.start_timeout) for log in logs]
