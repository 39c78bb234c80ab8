"""Whole runs that reduce gradients and gather weights beside the passes: those of others, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config

from mcore_rl.config import Config
from mcore_rl.config.state import ResidencyConfig
from mcore_rl.errors import NumericsError
from mcore_rl.model.build import build_policy
from mcore_rl.model.optimizer import build_optimizer, ddp_config
from mcore_rl.model.residency import Residency
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.training import setup
from mcore_rl.training.batch import pack_share
from mcore_rl.training.checkpoint import end_step, pieces
from mcore_rl.training.faults.dump import keep_broken
from mcore_rl.training.loop import learn
from mcore_rl.training.model_passes import Update, run_update
from mcore_rl.training.supervised import NegativeLogLikelihood
from tests.model.support import DENSE, at_layout, sequences, shape_at
from tests.training.test_ppo import built_run, config, recorded, weights
from tests.training.test_residency import timeless

__all__ = ["config"]

OFFLOADED = ResidencyConfig(reference="offloaded", critic="offloaded", optimizer="offloaded")


def trained(config: Config, overlap: bool, directory: Path, saved: Path | None = None) -> dict[str, Any]:
    """Steps 1 and 2, or step 2 after `saved`; each is saved, its weights are what a publish would send."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(setup, "ddp_config", lambda **asked: ddp_config(**asked | {"overlap": overlap}))
        metrics, published = [], []
        with built_run(config, Layout(data=2), directory, saved) as run:
            assert bool(run.trainer.policy.gathered_beside) is overlap
            for step in (1, 2) if saved is None else (2,):
                metrics.append(learn(run, recorded(run), step).metrics)
                published.append(weights(run))
                end_step(run.trainer, run.contents, run.residency, step)
            with run.residency.during("save"):
                state = {f"{p.key}{p.offset}": p.data.clone() for p in pieces(run.contents)}
        return {"metrics": timeless(metrics), "published": published, "state": state}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_runs_saves_and_publishes_are_the_same(pool2: Pool, config: Config, tmp_path: Path) -> None:
    """With parts that wait in host memory, and after a resume from what was saved right after an update."""
    critic = config.critic.model_copy(update={"warmup_rollouts": 0})
    short = config.algorithm.model_copy(update={"epochs": 1})
    checkpoint = config.checkpoint.model_copy(update={"every": 1})
    plain = config.model_copy(update={"critic": critic, "algorithm": short, "checkpoint": checkpoint})
    waiting = plain.model_copy(update={"residency": OFFLOADED})
    run = partial(pool2.run, trained, timeout=110.0)
    expected = run(plain, False, tmp_path / "plain")
    beside = run(waiting, True, tmp_path / "beside")
    resumed = run(waiting, True, tmp_path / "resumed", tmp_path / "beside" / "checkpoints" / "step_1")
    for wanted, found, again in zip(expected, beside, resumed, strict=True):
        assert found["metrics"] == wanted["metrics"]
        assert all(map(same, found["published"], wanted["published"]))
        assert same(found["state"], wanted["state"])
        assert again["metrics"] == wanted["metrics"][1:]
        assert same(again["state"], wanted["state"])
    first, second = expected[0]["published"]
    assert not same(first, second)  # negative control: the weights do move


def broken(mesh: Mesh, model: Path, config: Config) -> tuple[str, bool]:
    """What this rank says of a row that is not a number, and whether its weights are those before it."""
    scored = sequences()
    fields = {"weight": [0.01] * len(scored), "sample": list(range(len(scored)))}
    batches = pack_share(scored, fields, shape_at(mesh), mesh)
    wrong = batches[1].fields["weight"].clone()
    wrong[0] = torch.nan
    bad = [batches[0], replace(batches[1], fields={**batches[1].fields, "weight": wrong}), *batches[2:]]
    explain = partial(keep_broken, config, 1)

    def first_update(*, followed: bool) -> Update:
        policy = build_policy(model, mesh, random_seed=0, ddp=ddp_config(overlap=True))
        optimizer, ids = build_optimizer(policy, lr=1e-3), [f"s{i}" for i in range(len(scored))]
        objective = NegativeLogLikelihood()
        update = Update("policy", 1, optimizer, objective, batches, 1.0, ids, followed=followed)
        run_update(update, Residency({}), explain)
        return update

    update, said = first_update(followed=True), ""
    try:
        run_update(replace(update, step=2, batches=bad), Residency({}), explain)
    except NumericsError as error:
        said = str(error)
    found, wanted = (
        [p.detach() for chunk in one.optimizer.model.unwrapped for p in chunk.parameters()]
        for one in (update, first_update(followed=False))
    )
    return said, all(map(torch.equal, found, wanted))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pp2+vpp2", "cp2", "dp2"])
def test_a_row_that_is_not_a_number_ends_every_rank(
    pool2: Pool, config: Config, layout: str, tmp_path: Path
) -> None:
    """After an update whose weights are still to be gathered; nobody waits for a rank that has ended."""
    Qwen3Config(**DENSE | {"num_hidden_layers": 4}).save_pretrained(tmp_path / "model")
    at = config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path})})
    for said, kept in at_layout(pool2, layout, broken, tmp_path / "model", at):
        assert "step 2, policy: " in said
        assert "It begins in micro-batch 1 of replica 0" in said
        assert kept
