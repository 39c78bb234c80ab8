"""Directories of dumps before anything heavy is imported: one that is trained from, one to sample into."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mcore_rl.algo.algorithms import configure
from mcore_rl.config import Config, to_toml
from mcore_rl.directories import is_ours, mark, read_mark, storage_error, write_whole
from mcore_rl.dumps.directory import NAME, dumped_steps, find_dumps, remove
from mcore_rl.errors import ConfigError
from mcore_rl.log import METRICS
from mcore_rl.terminal import listed
from mcore_rl.training.rundir import RESOLVED, root_of

_FOLLOWS_FROM = ("model", "data", "reward")
"""sections that samples and rewards follow from, besides some keys of [rollout] and run.seed"""
_OF_ROLLOUT = (
    *("prompts_per_step", "samples_per_prompt", "temperature", "max_new_tokens", "stop_token_ids"),
    "dynamic_sampling",
)


def check_source(config: Config, source: Path) -> None:
    """Raises DataError where there are no dumps, ConfigError where this run cannot be one that reads them."""
    directory = find_dumps(source)
    if config.run.kind != "rl":
        raise ConfigError(
            f'--rollouts: run.kind = "{config.run.kind}" trains on no dumps; drop one of the two'
        )
    if Path(os.path.realpath(directory)).is_relative_to(os.path.realpath(config.run.dir)):
        raise ConfigError(
            f"--rollouts: {directory} lies in run.dir, whose files this run would replace; set run.dir to "
            "another directory"
        )


def doubts_of_source(config: Config) -> list[str]:
    """`key: what` for what a run that trains on dumps may do and hardly means."""
    doubts = []
    if not config.checkpoint.saves:
        doubts.append(
            "checkpoint.every: 0, and training on dumps publishes nothing, so that the trained weights are "
            "kept nowhere; with any other number those of the last step are"
        )
    if config.data.curriculum is not None:
        doubts.append(
            "data.curriculum: has no effect on dumps, whose prompts were chosen when they were sampled; "
            "remove it"
        )
    return doubts


def check_directory(config: Config) -> int:
    """The steps that are done: 1 to this one are in RUN_DIR/rollouts, sampled by this config.

    Raises ConfigError where the run directory is that of a training run, or of another config, or where a
    curriculum chooses the prompts: it follows from what was measured, which is not kept here.
    """
    if config.data.curriculum is not None:
        raise ConfigError(
            "data.curriculum: chooses by what a training run measured; take it out of the config, and every "
            "prompt is sampled once per epoch"
        )
    directory = config.run.dir / NAME
    if not is_ours(directory, "sampled"):
        if (config.run.dir / METRICS).exists() or root_of(config).exists():
            raise ConfigError(
                f"{config.run.dir} holds a training run, whose files would be replaced; set run.dir to "
                "another directory"
            )
        return 0
    before, now = read_mark(directory).get("follows_from"), origin_of(config)
    if before != now:
        known = before if isinstance(before, dict) else {}
        changed = [key for key in {**now, **known} if known.get(key) != now.get(key)]
        raise ConfigError(
            f"{directory} was sampled with other values of {listed(changed)}; set run.dir to another "
            "directory, or go on with the same"
        )
    dumped = set(dumped_steps(directory))
    return next(step for step in range(len(dumped) + 1) if step + 1 not in dumped)


def origin_of(config: Config) -> dict[str, Any]:
    """Key -> value, as JSON, of what the samples and their rewards follow from."""
    whole = config.model_dump(mode="json")
    found = {f"{name}.{key}": value for name in _FOLLOWS_FROM for key, value in whole[name].items()}
    found |= {f"rollout.{key}": whole["rollout"][key] for key in _OF_ROLLOUT}
    if config.environment.function is not None:
        found |= {f"environment.{key}": value for key, value in whole["environment"].items()}
    if config.rollout.routing_replay:
        found["rollout.routing_replay"] = True
    if config.rollout.dynamic_sampling:  # which groups it replaces
        a = config.algorithm
        found["algorithm.params.decoupled"] = configure(a.name, a.params, a.loss).decoupled
    return {**found, "run.seed": config.run.seed}


def begin(config: Config, done: int) -> None:
    """From here on the run directory is that of these samples, less the dumps of steps beyond `done`.

    Raises:
        StorageError: it cannot be written.
    """
    directory = config.run.dir / NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        mark(directory, "sampled", follows_from=origin_of(config))
    except OSError as error:
        raise storage_error(directory, error) from error
    remove(directory, [step for step in dumped_steps(directory) if step > done])
    write_whole(config.run.dir / RESOLVED, to_toml(config))
