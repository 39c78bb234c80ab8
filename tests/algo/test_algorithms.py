"""ALGORITHMS as data: defaults of the papers, overrides, the same numbers for every packing, purity."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mcore_rl.algo
from mcore_rl.algo import algorithms, losses
from mcore_rl.algo.advantages import group_statistics, sequence_mean, sequence_sum
from mcore_rl.algo.algorithms import ALGORITHMS, Algorithm, configure, objective
from mcore_rl.algo.losses import aggregation_weight, kl, weighted_sum
from mcore_rl.algo.readings import readings
from mcore_rl.algo.rows import Rows
from mcore_rl.errors import ConfigError

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
MAX_LENGTH = 12


# --- defaults and overrides -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["grpo_seq-mean-token-mean", "drgrpo", "dapo", "liteppo", "gspo", "sapo", "cispo"]
)
def test_defaults_are_those_of_the_golden_case(name: str) -> None:
    cfg = json.loads(str(np.load(GOLDEN / "policy_losses.npz")[f"{name}/cfg"]))
    algorithm = configure(name.split("_")[0])
    assert algorithm.aggregation == cfg["agg"]
    for key, value in algorithm.loss_params.items():
        assert cfg.get(key) == value, key
    rewards = torch.from_numpy(np.load(GOLDEN / "batch.npz")["rewards"])
    statistics = group_statistics(np.load(GOLDEN / "batch.npz")["group"].tolist(), rewards.tolist())
    advantage = algorithm.advantage(rewards, statistics, **algorithm.advantage_params)
    expected = torch.from_numpy(np.load(GOLDEN / "advantages.npz")[cfg["adv"]])
    torch.testing.assert_close(advantage, expected, rtol=0, atol=1e-12)


def test_overrides_reach_loss_advantage_and_settings() -> None:
    overrides = {"eps_high": 1, "std": "none", "aggregation": "token-mean", "kl_in_loss": 0.04}
    algorithm = configure("grpo", overrides)
    assert algorithm.loss_params == {"eps_low": 0.2, "eps_high": 1.0, "dual_clip": None}
    assert isinstance(algorithm.loss_params["eps_high"], float)
    assert algorithm.advantage_params == {"std": "none", "ddof": 1, "eps": 1e-6}
    assert (algorithm.aggregation, algorithm.kl_in_loss) == ("token-mean", 0.04)
    assert algorithm.needs_reference
    assert not ALGORITHMS["grpo"].needs_reference
    assert configure("grpo", {"dual_clip": 3.0}).loss_params["dual_clip"] == 3
    assert configure("dapo") == ALGORITHMS["dapo"]


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("gpso", {}, "'gpso' is unknown; did you mean 'gspo'"),
        ("zzz", {}, "known: cispo, clip-cov"),
        (
            "gspo",
            {"epz_low": 1e-3},
            r"algorithm\.params\.epz_low: gspo has no such parameter; did you mean 'eps_low'",
        ),
        ("gspo", {"tau_pos": 1.0}, "no such parameter"),
        ("gspo", {"loss": 1.0}, "no such parameter"),
        ("grpo", {"eps_low": -0.1}, "is not a number from 0 to 1"),
        ("grpo", {"eps_low": "0.2"}, "'0.2' is not a number"),
        ("grpo", {"eps_low": None}, "None is not a number"),
        ("grpo", {"eps_low": [0.2]}, "is not a number"),
        ("grpo", {"eps_low": True}, "True is not a number"),
        ("grpo", {"eps_high": float("nan")}, "nan is not a number"),
        ("grpo", {"eps_high": float("inf")}, "inf is not a number"),
        ("grpo", {"dual_clip": 0.5}, "0.5 is not a number from 1 to"),
        ("grpo", {"dual_clip": 1.1}, r"dual_clip: 1\.1 would cut ratios below 1\.2, which eps_high = 0\.2"),
        ("gspo", {"dual_clip": 3.0, "eps_high": 2.5}, "which eps_high = 2.5 leaves alone; raise it"),
        ("grpo", {"std": "batches"}, "'batches' is not one of group, batch, batch-centered, none"),
        ("grpo", {"ddof": 2}, "2 is not one of 0, 1"),
        ("grpo", {"whiten": 1}, "1 is not true or false"),
        ("grpo", {"ddof": True}, "True is not one of 0, 1"),
        ("clip-cov", {"cov_low": 5.0}, "leaves no covariance below cov_high"),
        ("grpo", {"rejection": 2}, "2 is not a text"),
        ("grpo", {"rejection": True}, "True is not a text"),
        ("grpo", {"aggregation": "mean"}, "'mean' is not one of token-mean, "),
        ("grpo", {"kl_in_reward": 0.1}, "use kl_in_loss instead"),
        ("sapo", {"tau_neg": 0.0}, "is not a number from 0.001"),
        ("ppo", {"gamma": 1.01}, "is not a number from 0 to 1"),
    ],
)
def test_a_wrong_override_says_what_is_right(name: str, overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(name, overrides)


# --- every algorithm on packed rows -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rollout:
    """N sequences of some lengths; rows end to end."""

    lengths: Tensor
    log_prob: Tensor
    old: Tensor
    ref: Tensor
    advantage: Tensor
    weight: Tensor

    @property
    def sequence(self) -> Tensor:
        return torch.arange(len(self.lengths)).repeat_interleave(self.lengths)


def rollout(algorithm: Algorithm, lengths: list[int], seed: int) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    n = torch.tensor(lengths)
    log_prob, gap, ref = torch.randn(3, sum(lengths), dtype=torch.float64, generator=generator)
    advantage = torch.randn(len(lengths), dtype=torch.float64, generator=generator).repeat_interleave(n)
    weight = aggregation_weight(
        algorithm.aggregation,
        n.double().repeat_interleave(n),
        tokens=sum(lengths),
        sequences=len(lengths),
        max_length=MAX_LENGTH,
    )
    return Rollout(n, log_prob, log_prob - 0.3 * gap, ref, advantage, weight)


def loss_and_gradient(algorithm: Algorithm, data: Rollout, sequences: list[int]) -> tuple[Tensor, Tensor]:
    """One micro-batch packs `sequences` in that order; the gradient lies at the rows of `data`."""
    rows = torch.cat([(data.sequence == i).nonzero()[:, 0] for i in sequences])
    position = torch.cat([torch.full((int(data.lengths[i]),), k) for k, i in enumerate(sequences)])
    log_prob = data.log_prob[rows].requires_grad_()
    packed = Rows.of(
        log_prob,
        log_prob.detach(),
        old=data.old[rows],
        rollout=data.old[rows],
        advantage=data.advantage[rows],
    )

    def sums(values: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
        total, mean = (f(values, position, len(sequences))[position] for f in (sequence_sum, sequence_mean))
        return total, mean

    marked = torch.arange(len(data.old))[rows] % 3 == 0
    extras = readings(algorithm.loss, packed, algorithm.loss_params, sums, marked=marked)
    packed = dataclasses.replace(packed, extras=extras)
    token = algorithm.loss(packed, **algorithm.loss_params)
    divergence = kl(algorithm.kl_estimator, log_prob, data.ref[rows], data.old[rows])
    total = weighted_sum(objective(packed, token, kl=divergence, kl_coef=0.1), data.weight[rows])
    gradient = torch.zeros_like(data.log_prob)
    gradient[rows] = torch.autograd.grad(total, log_prob)[0]
    return total.detach(), gradient


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(ALGORITHMS)), st.data())
def test_splitting_and_repacking_micro_batches_changes_nothing(name: str, data: st.DataObject) -> None:
    algorithm = configure(name)
    lengths = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=8))
    batch = rollout(algorithm, lengths, data.draw(st.integers(0, 1000)))
    order = data.draw(st.permutations(range(len(lengths))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=4)))
    parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(order)], strict=True) if a < b]
    whole = loss_and_gradient(algorithm, batch, list(range(len(lengths))))
    split = [loss_and_gradient(algorithm, batch, part) for part in parts]
    scale = whole[1].abs().sum().item() + 1
    assert abs(sum(loss for loss, _ in split).item() - whole[0].item()) < 1e-12 * scale
    torch.testing.assert_close(sum(gradient for _, gradient in split), whole[1], rtol=0, atol=1e-12)


def test_means_of_micro_batch_means_would_change_it() -> None:
    algorithm = configure("dapo")
    batch = rollout(algorithm, [1, 7, 2, 5], 0)
    whole, _ = loss_and_gradient(algorithm, batch, [0, 1, 2, 3])
    means = []
    for part in ([0, 1], [2, 3]):
        tokens = sum(int(batch.lengths[i]) for i in part)
        means.append(loss_and_gradient(algorithm, batch, part)[0] * int(batch.lengths.sum()) / tokens)
    assert abs(sum(means).item() / 2 - whole.item()) > 1e-3


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_first_step_on_policy_is_the_policy_gradient(name: str) -> None:
    """At ratio 1 every loss has d/dlog_prob = -A, whatever its clip or gate."""
    algorithm = configure(name)
    log_prob = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64).requires_grad_()
    advantage = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    token = algorithm.loss(on_policy(algorithm, log_prob, advantage), **algorithm.loss_params)
    torch.testing.assert_close(torch.autograd.grad(token.loss.sum(), log_prob)[0], -advantage)
    assert token.metrics["ratio/mean"].values.tolist() == [1, 1, 1]
    assert not token.metrics["clip/fraction"].values.any()


@pytest.mark.parametrize("shape", [(0,), (4,), (2, 3), ()])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_losses_take_any_shape(name: str, shape: tuple[int, ...]) -> None:
    algorithm = configure(name)
    x = torch.zeros(shape)
    token = algorithm.loss(on_policy(algorithm, x, x), **algorithm.loss_params)
    assert token.loss.shape == shape
    assert {metric.values.shape for metric in token.metrics.values()} == {shape}
    every = torch.ones(shape, dtype=torch.bool)
    assert all(metric.part(every).dtype == torch.float64 for metric in token.metrics.values())


def on_policy(algorithm: Algorithm, log_prob: Tensor, advantage: Tensor) -> Rows:
    rows = Rows.of(log_prob, log_prob.detach(), advantage=advantage)
    none = torch.zeros_like(rows.old)
    extras = readings(algorithm.loss, rows, algorithm.loss_params, lambda values, among: (none, none))
    return dataclasses.replace(rows, extras=extras)


def test_adding_an_algorithm_is_one_entry_and_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def squared(rows, *, strength: float = 2.0):
        ppo = losses.ppo(rows)
        return ppo._replace(loss=strength * ppo.loss)

    entry = dataclasses.replace(ALGORITHMS["grpo"], loss=squared)
    monkeypatch.setattr(algorithms, "ALGORITHMS", {**ALGORITHMS, "mine": entry})
    assert configure("mine", {"strength": 3}).loss_params == {"strength": 3.0}


# --- purity -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_algo_imports_torch_only() -> None:
    """In a fresh interpreter only errors and their words come with it, and no collective is called."""
    code = (
        "import sys, mcore_rl.algo.algorithms, mcore_rl.algo.preference, mcore_rl.algo.metrics;"
        "print([m for m in sys.modules if m.startswith(('mcore_rl.', 'megatron', 'transformers'))])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    allowed = {"algo", "errors", "functions", "terminal", "user_code"}
    foreign = [m for m in ast.literal_eval(run.stdout) if m.split(".")[1] not in allowed]
    assert foreign == []
    for file in Path(mcore_rl.algo.__path__[0]).glob("*.py"):
        assert not {"dist", "distributed"} & {
            node.attr if isinstance(node, ast.Attribute) else node.id
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Attribute | ast.Name)
        }
