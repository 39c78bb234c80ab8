"""Whether this machine can run a config, asked before anything is started and before Megatron is imported."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

from mcore_rl.config import Config
from mcore_rl.errors import ConfigError, LayoutError
from mcore_rl.model.precision import check_cpu_fraction, check_precision
from mcore_rl.trackers.services import check_trackers
from mcore_rl.training.layout import check_models, layout_of
from mcore_rl.training.stacked import check_transport

NODE_GPUS = 8
"""GPUs of a node in the launch line that is printed where this machine has none"""
CPU_RANKS = 8
"""A machine without GPUs runs this many ranks, or one per core where it has more."""
OPEN_FILES = 256
"""that a rank must be allowed to have; one of two on a CPU has about 70, each further peer adds some"""
_MANY_FILES = 65536


def check_rank(config: Config) -> None:
    """Under torchrun: the processes that run are those of [parallel].

    Raises:
        LayoutError: they are not; it says what is missing and how to start the run.
        ConfigError: the precision or optimizer.cpu_fraction cannot run here, a tracker is not installed, or
            too few files may be open.
    """
    running, replica = int(os.environ["WORLD_SIZE"]), replica_size(config)
    wanted = replica * (config.parallel.data or max(1, running // replica))
    if running != wanted:
        raise LayoutError(_what_to_do(config, f"{running} of {wanted} processes are running"))
    _check_machine(config)


def check_node(config: Config) -> None:
    """Outside torchrun: this node has room for every rank of [parallel], and the models divide by them.

    Raises:
        LayoutError, ConfigError: as check_rank.
    """
    ranks, gpus = replica_size(config) * (config.parallel.data or 1), torch.cuda.device_count()
    room = gpus or max(CPU_RANKS, os.cpu_count() or 1)
    if ranks > room:
        raise LayoutError(_what_to_do(config, f"this machine has {gpus} GPUs"))
    _check_machine(config)
    arch = check_models(config, layout_of(config, ranks))
    if config.samples_responses:
        check_transport(arch, config)


def _check_machine(config: Config) -> None:
    check_precision(config.model.precision, config.model.fp8_recipe)
    check_cpu_fraction(config.optimizer.cpu_fraction)
    check_trackers(config.run.trackers)
    check_open_files()


def check_open_files() -> None:
    """Raise this process's own limit of open files, within the hard one; what it starts inherits it.

    Raises:
        ConfigError: that is not enough for a rank.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _MANY_FILES:
        soft = _MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, _MANY_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        raise ConfigError(
            f"ulimit -n: a process may open {soft} files here, and a rank needs {OPEN_FILES} (connections to "
            "the other ranks and the servers, shards); raise it: `ulimit -n 65536` before the command, "
            "LimitNOFILE= of a service, --ulimit nofile=65536 of docker"
        )


def replica_size(config: Config) -> int:
    """Ranks that hold one copy of the model."""
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.context


def _what_to_do(config: Config, found: str) -> str:
    """What is missing, the launch line, and the two commands that need no cluster."""
    ranks = replica_size(config) * (config.parallel.data or 1)
    gpus = torch.cuda.device_count()
    per_node = max(n for n in range(1, (gpus or NODE_GPUS) + 1) if ranks % n == 0)
    nodes = ranks // per_node
    more = "" if config.parallel.data else ", or a multiple of it for more replicas"
    rendezvous = "--rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 " if nodes > 1 else "--standalone "
    rendezvous += "--max-restarts 3 " if config.checkpoint.saves else ""
    return (
        f"[parallel] asks for {_degrees(config)} = {ranks} GPUs with a process each{more}; {found}.\n"
        f"  to run it, on {f'each of {nodes} nodes' if nodes > 1 else 'one node'} with {per_node} GPUs:\n"
        f"    torchrun --nnodes {nodes} --nproc-per-node {per_node} {rendezvous}{_program()}\n"
        f"  to see what fits other GPUs:\n    mcore-rl plan {_config_file()} --gpus N --gpu-memory GIB\n"
        f"  to run the same code on this machine, tiny, on CPU:\n    {_rehearsal()}"
    )


def _degrees(config: Config) -> str:
    p = config.parallel
    degrees = {"tensor": p.tensor, "pipeline": p.pipeline, "context": p.context, "data": p.data or 1}
    return " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)


def _is_script() -> bool:
    return sys.argv[0].endswith(".sh")


def _program() -> str:
    """What torchrun starts: the recipe's script, or the module with its config."""
    return sys.argv[0] if _is_script() else f"-m mcore_rl train {_config_file()}"


def _rehearsal() -> str:
    return f"bash {sys.argv[0]} --rehearse" if _is_script() else f"mcore-rl train {_config_file()} --rehearse"


def _config_file() -> str:
    named = [argument for argument in sys.argv[1:] if argument.endswith(".toml")]
    if named:
        return named[0]
    script = Path(sys.argv[0])
    return str(script.with_name(script.stem.removeprefix("train_") + ".toml"))
