"""`mcore-rl eval`: weights, servers, samples, numbers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mcore_rl.config import Config, load_config, warnings
from mcore_rl.directories import locked, write_whole
from mcore_rl.errors import EXIT_DONE, ConfigError, RolloutError
from mcore_rl.evaluate.keep import RESULTS, SampleFile, open_evaluation, results_of
from mcore_rl.evaluate.sampling import sample_set, serving
from mcore_rl.evaluate.scoring import scorer, scoring_model
from mcore_rl.evaluate.weights import Weights, find_weights
from mcore_rl.launch.start import catch_signals
from mcore_rl.screen import SCREEN
from mcore_rl.terminal import printable
from mcore_rl.training.evaluation_sets import EvalSet, measure, read_sets, set_params
from mcore_rl.training.rundir import RESOLVED, RUN_LOCK
from mcore_rl.training.setup import load_tokenizer

MEASURES = ("accuracy", "reward", "pass@", "majority@")


def evaluate(
    target: Path,
    overrides: Sequence[str] = (),
    *,
    checkpoint: str | None = None,
    out: Path | None = None,
    as_json: bool = False,
) -> int:
    """Evaluate every held-out set of a config or a run directory; the exit code.

    Args:
        checkpoint: which weights; see find_weights.
        out: where samples and results go.
        as_json: print the results as one JSON object, the last line of stdout.

    Raises:
        ConfigError, DataError: before any server is started, where the cause allows it.
        RolloutError: the servers failed; the samples that there are stay, and the same command goes on.
    """
    catch_signals()
    is_run = target.is_dir()
    config = _config(target, overrides, is_run=is_run)
    for what in () if is_run else warnings(config):  # a run has said its own
        print(printable(f"warning: {what}"), file=sys.stderr)
    weights = find_weights(config, target if is_run else None, checkpoint)
    if not weights.is_checkpoint:  # its own tokenizer and config.json
        config = _with(config, model={"path": weights.path})
    tokenizer = load_tokenizer(config.model.path)
    sets = read_sets(config, tokenizer)
    directory = out or config.run.dir / "evaluations" / weights.label
    with ExitStack() as stack:
        if config.rollout.urls:  # they take other weights: not those of a run that is going on
            lock = locked(config.run.dir, "set rollout.urls to servers of its own", name=RUN_LOCK)
            stack.enter_context(lock)
        stack.enter_context(open_evaluation(directory, _settings(config, weights, sets)))
        results = results_of(directory)
        if results is None:
            with SCREEN.showing(active=True):
                results = _sampled(_with(config, run={"dir": directory}), weights, sets, tokenizer)
            write_whole(directory / RESULTS, json.dumps(results) + "\n")
    words = {one.name: one.word for one in sets}
    for line in [f"{weights.path}", *_table(results["sets"], words), f"samples: {directory}"]:
        print(printable(line), file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(results))
    return EXIT_DONE


def _config(target: Path, overrides: Sequence[str], *, is_run: bool) -> Config:
    if not is_run:
        config = load_config(target, overrides)
    elif not (target / RESOLVED).is_file():
        raise ConfigError(f"{target} is no run directory (it has no {RESOLVED}); give one, or a config")
    else:  # it may have been moved since
        config = load_config(target / RESOLVED, [f"--run.dir={json.dumps(str(target))}", *overrides])
    if not config.held_out:
        raise ConfigError(f"{target}: no held-out set; set data.eval or [eval.sets.NAME]")
    return config


def _with(config: Config, **sections: Mapping[str, Any]) -> Config:
    """The config with other values in some sections."""
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def _settings(config: Config, weights: Weights, sets: Sequence[EvalSet]) -> dict[str, Any]:
    """What the samples depend on."""
    held_out = config.held_out
    return {
        "weights": weights.identity(),
        "seed": config.run.seed,
        **_played(config),
        "reward": config.reward.model_dump(
            mode="json", include={"function", "functions", "weights", "model"}
        ),
        "sets": {
            one.name: {
                "prompts": len(one.prompts),
                "content": asdict(one.found.fingerprint),
                "params": set_params(config, held_out[one.name]),
                **held_out[one.name].model_dump(mode="json", exclude={"path", "prompts"}),
            }
            for one in sets
        },
    }


def _played(config: Config) -> dict[str, Any]:
    """The environment, which samples follow from where there is one."""
    e = config.environment
    return {} if e.function is None else {"environment": e.model_dump(mode="json")}


def _sampled(
    config: Config, weights: Weights, sets: Sequence[EvalSet], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True))

    directory = config.run.dir
    SCREEN.doing("reading the weights")
    model = weights.as_hf(config, directory / "model")
    files = {one.name: SampleFile(directory, one) for one in sets}
    servers = len(config.rollout.urls) or config.rollout.servers
    with scoring_model(config, sets) as by_model, serving(config, model, tokenizer) as requests:
        for one in sets:
            with scorer(config, one, by_model) as score:
                sample_set(
                    requests,
                    one,
                    files[one.name],
                    score=score,
                    servers=servers,
                    seed=config.run.seed,
                    decode=decode,
                )
    found = {one.name: measure(one, files[one.name].records) for one in sets}
    nothing = [name for name, its in found.items() if not its[f"eval/{name}/samples"]]
    if nothing:
        raise RolloutError(f"{nothing[0]}: the servers aborted every sample; see their logs in {directory}")
    if weights.is_checkpoint:
        shutil.rmtree(model)
    return {"weights": str(weights.path), "step": weights.step, "sets": found}


def _table(sets: Mapping[str, Mapping[str, float]], words: Mapping[str, str]) -> list[str]:
    """Set, measure, value, interval, and of how many prompts and samples."""
    rows = []
    for name, its in sets.items():
        metrics = {key.removeprefix(f"eval/{name}/"): value for key, value in its.items()}
        size = f"{metrics['sampled']:.0f} prompts, {metrics['samples']:.0f} samples"
        for key, value in metrics.items():
            if key.startswith(MEASURES) and not key.endswith(("/low", "/high")):
                bounds = [metrics.get(f"{key}/{end}") for end in ("low", "high")]
                within = "" if None in bounds else "{:.3f} to {:.3f}".format(*bounds)
                rows.append((name, words[name] if key == "accuracy" else key, f"{value:.3f}", within, size))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return ["  ".join(row).rstrip() for row in padded]
