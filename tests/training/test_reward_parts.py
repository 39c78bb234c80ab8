"""Rewards of parts and turns on their way to the losses, against formulas written a second time."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from mcore_rl.algo.algorithms import configure
from mcore_rl.errors import ConfigError, RewardError
from mcore_rl.rewards.outcome import read_outcome, turn_ends
from mcore_rl.training.advantage import Scores, compute_advantages
from mcore_rl.training.batch import RolloutBatch, build_batch
from mcore_rl.training.metrics import rollout_metrics
from mcore_rl.training.rewards import MOST_REASONS, RewardCounts
from mcore_rl.types import Group, RewardPart, Sample, TurnReward
from tests.training.test_trajectories import random_trajectory

WEIGHTS = {"answer": 1.0, "format": 0.3}


def scored(sample: Sample, returned: object) -> Sample:
    found = read_outcome(returned, sample, WEIGHTS)
    return replace(sample, reward=found.reward, parts=found.parts, turn_rewards=found.turn_rewards)


def batch(seed: int, *, groups: int = 5, size: int = 4, form: str = "both") -> RolloutBatch:
    """Random trajectories with an `answer` at the end and a `format` at every turn; group 0 has no signal.

    The last group's samples have one number each.
    """
    rng = np.random.default_rng(seed)
    made = []
    for g in range(groups):
        samples = []
        for k in range(size):
            one, _ = random_trajectory(rng, 100 * g + k)
            turns = [float(rng.integers(0, 3)) if g else 0.0 for _ in turn_ends(one)]
            answer = float(rng.integers(0, 2)) if g else 1.0
            both = {"answer": answer, "format": turns}
            number = g == groups - 1 or form == "number"
            returned = answer if number else {"sum": {**both, "format": sum(turns)}, "both": both}[form]
            samples.append(scored(one, returned))
        made.append(Group(f"g{g}", tuple(samples)))
    return build_batch(made)


def gdpo(of: RolloutBatch, *, eps: float = 1e-6, weights: dict[str, float] = WEIGHTS) -> list[float]:
    """Equations of arXiv 2601.05242, sample by sample; means and variances in fractions."""

    def spread(values: list[float]) -> tuple[float, float]:
        exact = [Fraction(value) for value in values]
        mean = sum(exact, Fraction(0)) / len(exact)
        return float(mean), math.sqrt(sum((value - mean) ** 2 for value in exact) / (len(exact) - 1))

    members = defaultdict(list)
    for group, sample in zip(of.group_ids, of.samples, strict=True):
        members[group].append(sample)
    totals = {}
    for its in members.values():
        parts = [{p.name: p.value for p in s.parts} or {"": s.reward or 0.0} for s in its]
        for sample, own in zip(its, parts, strict=True):
            total = 0.0
            for name in {name for part in parts for name in part}:
                mean, std = spread([part.get(name, 0.0) for part in parts])
                total += weights.get(name, 1.0) * (own.get(name, 0.0) - mean) / (std + eps)
            totals[sample.id] = total
    mean, std = spread(list(totals.values()))
    return [(totals[sample.id] - mean) / (std + eps) for sample in of.samples]


@pytest.mark.parametrize("seed", range(5))
def test_gdpo_is_the_papers(seed: int) -> None:
    of = batch(seed)
    found = compute_advantages(of, configure("gdpo")).fields["advantage"]
    np.testing.assert_allclose(found, gdpo(of), rtol=1e-12, atol=1e-13)
    for wrong in (gdpo(of, weights={}), compute_advantages(of, configure("grpo")).fields["advantage"]):
        assert np.abs(np.subtract(found, wrong)).max() > 1e-2, "another formula is seen"


def test_gdpo_tells_apart_what_the_sum_does_not() -> None:
    """The example of the paper: of two binary rewards, (0, 1) and (0, 2) are the same to GRPO."""
    one, _ = random_trajectory(np.random.default_rng(0), 0)
    give = lambda a, b, k: scored(replace(one, id=f"s{k}"), {"a": a, "b": b})  # noqa: E731
    of = build_batch([Group("x", (give(0, 1, 0), give(0, 0, 1))), Group("y", (give(1, 1, 2), give(0, 0, 3)))])
    (first, _, second, _) = compute_advantages(of, configure("gdpo")).fields["advantage"]
    assert second == pytest.approx(2 * first)
    (first, _, second, _) = compute_advantages(of, configure("grpo")).fields["advantage"]
    assert second == pytest.approx(first, rel=1e-5)


def test_a_group_of_equal_parts_has_advantage_exactly_0() -> None:
    of = batch(1)
    found = compute_advantages(of, configure("gdpo")).fields["advantage"]
    assert [a for a, group in zip(found, of.group_ids, strict=True) if group == "g0"] == [0.0] * 4
    none = compute_advantages(batch(1, groups=1, form="sum"), configure("gdpo", {"eps": 0.0}))
    assert none.fields["advantage"] == [0.0] * 4
    cancels = [replace(s, parts=(*s.parts, RewardPart("x", -s.parts[0].value, 1.0))) for s in of.samples[:8]]
    alone = [replace(s, parts=(s.parts[0], s.parts[-1])) for s in cancels]
    of = RolloutBatch(tuple(alone), of.group_ids[:8])
    assert compute_advantages(of, configure("gdpo", {"eps": 0.0})).fields["advantage"] == [0.0] * 8


def test_a_part_that_a_sample_lacks_is_0_there() -> None:
    of = batch(2, form="sum")
    lacks = [replace(s, parts=tuple(p for p in s.parts if p.value != 0.0)) for s in of.samples]
    assert any(len(s.parts) == 1 for s in lacks)
    found = compute_advantages(replace(of, samples=tuple(lacks)), configure("gdpo")).fields["advantage"]
    assert found == compute_advantages(of, configure("gdpo")).fields["advantage"]


@pytest.mark.parametrize("name", ["rloo", "drgrpo", "reinforce++-baseline"])
def test_other_comparisons_take_parts_one_by_one(name: str) -> None:
    of = batch(3)
    found = compute_advantages(of, configure(name, {"decoupled": True, **no_whiten(name)})).fields
    whole = compute_advantages(of, configure(name, no_whiten(name))).fields["advantage"]
    # linear in the reward: the sum of the parts' advantages is that of the sum, scaled over the batch
    np.testing.assert_allclose(found["advantage"], np.array(whole) / np.std(whole, ddof=1), rtol=1e-5)


def no_whiten(name: str) -> dict[str, bool]:
    return {"whiten": False} if name == "reinforce++-baseline" else {}


@pytest.mark.parametrize("name", ["ppo", "reinforce", "reinforce++"])
def test_what_compares_no_samples_cannot_take_them_one_by_one(name: str) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.params\.decoupled"):
        configure(name, {"decoupled": True})


def by_hand(of: RolloutBatch, given: Scores, *, gamma: float, lam: float, at_end: bool) -> list[np.ndarray]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, as the sum that it is."""
    found = []
    for i, sample in enumerate(of.samples):
        n = sample.trained_tokens
        rewards = np.zeros(n)
        for token, reward in sample.turn_rewards:
            rewards[token] += reward
        if n and (at_end or not sample.turn_rewards):
            rewards[:] = 0.0
            rewards[-1] = sample.reward
        values = np.append(given.values[i].astype(float), 0.0)
        delta = rewards + gamma * values[1:] - values[:-1]
        found.append(
            np.array([sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, n)) for t in range(n)])
        )
    return found


@pytest.mark.parametrize("seed", range(3))
def test_gae_has_the_reward_of_a_turn_at_its_last_token(seed: int) -> None:
    of = batch(seed)
    rng = np.random.default_rng(9)
    values = [rng.normal(size=s.trained_tokens).astype(np.float32) for s in of.samples]
    given = Scores(values=values)
    params = {"gamma": 0.9, "lam": 0.8, "kl_in_reward": 0.0, "whiten": False}
    found = np.concatenate(list(compute_advantages(of, configure("ppo", params), given).fields["advantage"]))
    wanted, at_end = (
        np.concatenate(by_hand(of, given, gamma=0.9, lam=0.8, at_end=where)) for where in (False, True)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert np.abs(found - at_end).max() > 0.1, "all of it at the end is seen"


@pytest.mark.parametrize("name", ["grpo", "gspo", "liteppo", "rloo"])
def test_one_advantage_for_a_sample_is_of_its_sum(name: str) -> None:
    of = batch(4)
    flat = [replace(s, parts=(), turn_rewards=()) for s in of.samples]
    sums = [sum(p.weight * p.value for p in s.parts) if s.parts else s.reward for s in of.samples]
    np.testing.assert_allclose([s.reward for s in flat], sums, rtol=1e-15)
    algorithm = configure(name)
    of_parts, of_sums = (
        compute_advantages(x, algorithm).fields["advantage"] for x in (of, replace(of, samples=tuple(flat)))
    )
    assert of_parts == of_sums


@pytest.mark.parametrize("turn", [TurnReward(99, 1.0), TurnReward(-1, 1.0), TurnReward(0, math.nan)])
def test_a_turn_that_is_not_in_its_sample_is_refused(turn: TurnReward) -> None:
    """It would have been another sample's reward."""
    of = batch(5)
    wrong = (replace(of.samples[0], turn_rewards=(turn,)), *of.samples[1:])
    with pytest.raises(RewardError, match=of.samples[0].id):
        compute_advantages(replace(of, samples=wrong), configure("reinforce++", {"kl_in_reward": 0.0}))


def test_every_part_is_a_metric() -> None:
    of = batch(6)
    metrics = rollout_metrics(of, [1.0] * len(of.samples), len(of.samples))
    having = [s for s in of.samples if s.parts]
    assert 0 < len(having) < len(of.samples)
    for k, name in enumerate(WEIGHTS):
        assert metrics[f"reward/{name}"] == pytest.approx(np.mean([s.parts[k].value for s in having]))
    assert metrics["reward/mean"] == pytest.approx(np.mean([s.reward for s in of.samples]))
    assert not any(name.startswith("reward/a") for name in rollout_metrics(batch(6, form="number"), [1.0], 1))


def test_reasons_without_end_make_no_metrics_without_end() -> None:
    tally = RewardCounts()
    names: set[str] = set()
    for step in range(20):
        counts = {f"no grader for {step}-{i}": 1 for i in range(50)} | {"timeout": 1, "kept": 100}
        found = tally.by_metric(counts)
        assert sum(found.values()) == 151
        assert (found["void/timeout"], found["void/kept"]) == (1, 100)
        names |= set(found)
    assert len(names) == MOST_REASONS + 2  # timeout, and other
