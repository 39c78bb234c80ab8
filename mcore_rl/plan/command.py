"""`mcore-rl plan`: from a config and a number of GPUs to layouts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from math import ceil, inf
from pathlib import Path

from mcore_rl.config import Config, load_config
from mcore_rl.errors import ConfigError, LayoutError
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.parallel.layout import Layout
from mcore_rl.plan.clock import SERVER_GPUS, SamplingServers
from mcore_rl.plan.count import count_policy, distinct
from mcore_rl.plan.memory import GIB
from mcore_rl.plan.search import ENOUGH_SPARE, LayoutPlan, PlanInputs, evaluate, search
from mcore_rl.plan.show import best_of, table, to_json
from mcore_rl.plan.work import work_of
from mcore_rl.terminal import printable
from mcore_rl.training.layout import layout_of
from mcore_rl.training.shape import shape_of


def plan(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    gpus: int | None = None,
    gpu_memory: float = 80.0,
    server_gpus: int | None = None,
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
    segments: float | None = None,
    colocated: bool = False,
    as_json: bool = False,
    only_best: bool = False,
) -> int:
    """Print the plan of the config at `path`; 0 when its own layout fits with ENOUGH_SPARE.

    Args:
        gpus: training GPUs; default: one replica of the config's layout, or parallel.data of them.
        gpu_memory: GiB of each.
        server_gpus: GPUs of the servers; default: SERVER_GPUS for each of rollout.urls, or the training GPUs
            where `colocated`.
        prompt_tokens, response_tokens: mean lengths of a training sequence; default: the config's limits.
        segments: mean number of training sequences of a sample, 1 or more; default: 1.
        only_best: of all that is printed, the best layout and why.
        colocated: the servers' weights and KV cache are on the training GPUs; said by residency.servers too.

    Raises:
        ConfigError: the config or the model's config.json.
        LayoutError: the config's layout is illegal, or does not fit; the plans that do are printed first.
    """
    config = load_config(path, overrides)
    _check_numbers(
        config,
        gpus=gpus,
        gpu_memory=gpu_memory,
        server_gpus=server_gpus,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        segments=segments,
    )
    colocated = colocated or config.residency.servers == "released"
    arch, shape = read_architecture(config.model.path), shape_of(config.model.path)
    count = gpus or _replica(config) * (config.parallel.data or 1)
    work = work_of(
        config,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        segments=segments,
        colocated=colocated,
    )
    servers = count if colocated else SERVER_GPUS * max(1, len(config.rollout.urls))
    fleet = fleet_of(distinct(count_policy(arch, Layout()), Layout()), server_gpus or servers, gpu_memory)
    problem = PlanInputs(arch, shape, work, fleet, gpu_memory * GIB)
    outcome = _evaluate(problem, config, count)
    configured = outcome if isinstance(outcome, LayoutPlan) else None
    plans, illegal = search(problem, count)
    text = table(problem, count, configured, plans, illegal)
    if only_best:
        text = best_of(count, plans, configured)
    for line in text.split("\n"):
        print(printable(line), file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(to_json(problem, count, configured, plans, illegal)))
    if isinstance(outcome, LayoutError):
        raise outcome
    if not outcome.fits:
        recompute = 'set train.recompute = "full", ' if config.train.recompute == "none" else ""
        raise LayoutError(
            f"[parallel] of {path} leaves {outcome.spare:.0%} of {gpu_memory:g} GiB, and "
            f"{ENOUGH_SPARE:.0%} are wanted; {recompute}take one of the layouts above that fit, "
            "or lower train.tokens_per_micro_batch"
        )
    return 0


def _evaluate(problem: PlanInputs, config: Config, gpus: int) -> LayoutPlan | LayoutError:
    """The plan of the config's own layout, or why there is none."""
    try:
        return evaluate(problem, configured_layout(config, gpus))
    except LayoutError as error:
        return error


def _check_numbers(config: Config, **numbers: float | None) -> None:
    """Raises ConfigError for what no machine has, and for mean lengths beyond the config's limits."""
    limits = {
        "prompt_tokens": ("data.max_prompt_tokens", config.data.max_prompt_tokens),
        "response_tokens": (
            ("environment.max_tokens", config.environment.max_tokens)
            if config.environment.function is not None
            else ("rollout.max_new_tokens", config.rollout.max_new_tokens)
        ),
    }
    for name, number in numbers.items():
        flag = f"--{name.replace('_', '-')}"
        key, limit = limits.get(name, ("", inf))
        if number is not None and not 0 < number < inf:
            raise ConfigError(f"{flag} {number}: give a number above 0")
        if name == "segments" and number is not None and number < 1:
            raise ConfigError(f"{flag} {number}: a sample has at least one; give 1 or more")
        if number is not None and number > limit:
            raise ConfigError(f"{flag} {number}: a mean above {key} = {limit}; lower it, or raise {key}")


def configured_layout(config: Config, gpus: int) -> Layout:
    """The layout of [parallel] on `gpus`; LayoutError where it takes another number of them."""
    replica, layout = _replica(config), layout_of(config, gpus)
    if layout.world_size == gpus:
        return layout
    if gpus % replica:
        raise LayoutError(
            f"--gpus {gpus}: [parallel] takes {replica} GPUs per replica; give a multiple of {replica}, or "
            "change parallel.*"
        )
    raise LayoutError(
        f"--gpus {gpus}: [parallel] is {layout} and takes {layout.world_size} GPUs; set parallel.data = "
        f"{gpus // replica}, or leave it out"
    )


def _replica(config: Config) -> int:
    """GPUs of one data-parallel replica."""
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.context


def fleet_of(parameters: int, gpus: int, gpu_memory: float) -> SamplingServers:
    """Servers as small as leaves half of their GPUs' memory to the KV cache."""
    needed = ceil(2 * parameters / (gpu_memory * GIB / 2))
    tensor = next((n for n in (1, 2, 4, 8) if n >= needed), SERVER_GPUS)
    return SamplingServers(gpus, min(tensor, gpus))
