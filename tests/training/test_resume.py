"""PPO with a critic, stopped and continued on recorded rollouts: the numbers of the uninterrupted run."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mcore_rl.checkpoint import find
from mcore_rl.checkpoint.rng import rng_state, set_rng_state
from mcore_rl.config import Config
from mcore_rl.errors import DataError
from mcore_rl.log import read_metrics
from mcore_rl.parallel.layout import Layout
from mcore_rl.training.checkpoint import end_step, pieces, run_document
from mcore_rl.training.loop import learn
from mcore_rl.training.run import Run
from tests.training.test_ppo import built_run, config, recorded

__all__ = ["config"]


@contextmanager
def checkpointed(config: Config, layout: Layout, directory: Path, saved: Path | None = None) -> Iterator[Run]:
    """A run that saves into `directory`/checkpoints, continued from `saved`."""
    checkpoint = config.checkpoint.model_copy(update={"every": 2})
    with built_run(config.model_copy(update={"checkpoint": checkpoint}), layout, directory, saved) as run:
        yield run


def state(run: Run) -> dict[str, Tensor]:
    return {f"{p.key}{p.offset}": p.data.clone() for p in pieces(run.contents)}


def step(run: Run, number: int) -> tuple[dict[str, float], list]:
    """One step's metrics, and what came from the cursor and the random generators."""
    # Python's own generator has its own test: beartype, which checks lists at run time here, draws from it.
    drawn = [p.id for p in run.trainer.cursor.next(3)], np.random.rand(), torch.rand(1).item()
    metrics = learn(run, recorded(run), number).metrics
    run.log(number, metrics)
    return metrics, list(drawn)


def run_through(config: Config, layout: Layout, directory: Path):
    """Steps 1 to 4, saved after 2 and 4."""
    with checkpointed(config, layout, directory) as run:
        done = []
        for number in range(1, 5):
            done.append(step(run, number))
            end_step(run.trainer, run.contents, run.residency, number)
        return done, state(run), run_document(run.trainer.config, run.contents, run.trainer.attempt)


def run_on(config: Config, layout: Layout, directory: Path, saved: Path):
    """Steps 3 and 4 after `saved`."""
    with checkpointed(config, layout, directory, saved) as run:
        done = [step(run, number) for number in (3, 4)]
        return done, state(run), run_document(run.trainer.config, run.contents, run.trainer.attempt)


LAYOUT = Layout(tensor=2)


@pytest.fixture(scope="module")
def whole(pool2, config, tmp_path_factory):
    """The uninterrupted run: ([(steps, tensors, document)] by rank, its directory)."""
    directory = tmp_path_factory.mktemp("whole")
    return pool2.run(run_through, config, LAYOUT, directory, timeout=110.0), directory


@pytest.mark.slow
def test_two_steps_and_two_more_are_four(pool2, config, whole, tmp_path):
    saved = whole[1] / "checkpoints" / "step_2"
    rest = pool2.run(run_on, config, LAYOUT, tmp_path, saved, timeout=110.0)
    for (steps, tensors, document), (last, resumed, again) in zip(whole[0], rest, strict=True):
        assert last == steps[2:], "metrics, prompts and random numbers"
        assert steps[1] != steps[2], "which do change from step to step"
        assert tensors.keys() == resumed.keys()
        assert all(torch.equal(tensors[key], resumed[key]) for key in tensors)
        assert any(key.startswith("optimizer.state.exp_avg_sq.critic.") for key in tensors)
        assert {**document, "config": 0, "run_id": 0} == {**again, "config": 0, "run_id": 0}


def test_pythons_own_generator_continues() -> None:
    saved = json.loads(json.dumps(rng_state()))
    first, second = random.random(), random.random()
    assert first != second
    set_rng_state(saved)
    assert random.random() == first


@pytest.mark.slow
def test_weights_alone_do_not_continue_the_run(pool2, config, whole, tmp_path):
    """Negative control: the comparison sees moments that start at 0."""
    saved = whole[1] / "checkpoints" / "step_2"
    rest = pool2.run(forget_moments, config, LAYOUT, tmp_path, saved, timeout=110.0)
    assert rest[0][-1] != whole[0][0][0][-1]


def test_another_seed_is_refused_and_the_log_stays(pool2, config, whole):
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 5})})
    pool2.run(resume_refused, other, whole[1], timeout=110.0)
    assert [line["step"] for line in read_metrics(whole[1] / "metrics.jsonl")] == [1, 2, 3, 4]


def forget_moments(config: Config, layout: Layout, directory: Path, saved: Path):
    with checkpointed(config, layout, directory, saved) as run:
        for piece in pieces(run.contents):
            if "exp_avg." in piece.key:
                piece.data.zero_()
        done = [step(run, number) for number in (3, 4)]
        return done, state(run), run_document(run.trainer.config, run.contents, run.trainer.attempt)


def resume_refused(config: Config, directory: Path) -> None:
    latest = find(directory / "checkpoints", "latest").path
    with (
        pytest.raises(DataError, match="saved with seed 0, this run has 5"),
        checkpointed(config, LAYOUT, directory / "new", latest),
    ):
        pass
