"""Advantages against formulas written a second time, token by token; bad input is defined or refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mcore_rl.algo.algorithms import configure
from mcore_rl.errors import NumericsError, RewardError
from mcore_rl.training.advantage import Scores, compute_advantages, value_metrics
from mcore_rl.training.batch import RolloutBatch, build_batch
from mcore_rl.types import Group, Prompt, Sample, VersionSpan
from tests.training.test_trajectories import packed

LENGTHS = ((3, 1, 5, 2), (4, 4, 1, 6), (1, 2, 2, 3))
REWARDS = ((1.0, 0.0, 0.5, 0.0), (0.0, 0.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0))


def batch(lengths=LENGTHS, rewards=REWARDS) -> RolloutBatch:
    """Groups in reverse order; their ids sort them again."""
    groups = []
    for g, (of_group, its_rewards) in enumerate(zip(lengths, rewards, strict=True)):
        prompt = Prompt(f"p{g}", "", (1, 2), "")
        samples = [
            Sample.of_response(
                f"p{g}@1/{k}",
                prompt,
                (5,) * n,
                (-1.0,) * n,
                "",
                "stop",
                (VersionSpan("0", 0, n),),
                its_rewards[k],
            )
            for k, n in enumerate(of_group)
        ]
        groups.append(Group(f"p{g}@1", tuple(samples)))
    return build_batch(groups[::-1])


def scores(of: RolloutBatch, seed: int = 0) -> Scores:
    """Random numbers of the right shapes, float32 as models give them."""
    rng = np.random.default_rng(seed)
    draw = lambda: [rng.normal(size=len(s.token_ids)).astype(np.float32) for s in of.samples]  # noqa: E731
    return Scores(dict(enumerate(draw())), draw(), draw())


def by_hand(of: RolloutBatch, given: Scores, *, beta: float, gamma: float, lam: float, critic: bool):
    """(whitened advantages, returns), one Python loop per token."""
    advantages, returns = [], []
    for i, sample in enumerate(of.samples):
        n = len(sample.token_ids)
        old, ref = given.old_log_probs[i].astype(float), given.ref_log_probs[i].astype(float)
        value = given.values[i].astype(float) if critic else np.zeros(n)
        row = np.zeros(n)
        following, next_value = 0.0, 0.0
        for t in reversed(range(n)):
            reward = -beta * (old[t] - ref[t]) + (sample.reward if t == n - 1 else 0.0)
            following = reward + gamma * next_value - value[t] + gamma * lam * following
            row[t], next_value = following, value[t]
        advantages.append(row)
        returns.append(row + value)
    flat = np.concatenate(advantages)
    return [(a - flat.mean()) / math.sqrt(flat.var(ddof=1) + 1e-8) for a in advantages], returns


@pytest.mark.parametrize("name", ["ppo", "reinforce++"])
def test_token_advantages_equal_the_loop(name):
    algorithm = configure(name, {"gamma": 0.97, "kl_in_reward": 0.2})
    lam = 0.95 if name == "ppo" else 1.0
    of = batch()
    given = scores(of)
    got = compute_advantages(of, algorithm, given).fields
    expected, returns = by_hand(of, given, beta=0.2, gamma=0.97, lam=lam, critic=name == "ppo")
    wrong, _ = by_hand(of, given, beta=-0.2, gamma=0.97, lam=lam, critic=name == "ppo")
    for mine, theirs, other in zip(got["advantage"], expected, wrong, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)
        assert not np.allclose(mine, other, atol=1e-3)  # another sign of the KL is seen
    assert ("return" in got) == ("old_value" in got) == (name == "ppo")
    for mine, theirs in zip(got.get("return", []), returns, strict=False):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)
    assert [s.id for s in of.samples] == sorted(s.id for s in of.samples)


def test_the_order_of_groups_changes_no_bit():
    one, other = batch(), build_batch([Group(g, ss) for g, ss in grouped(batch()).items()])
    for name in ("ppo", "grpo", "liteppo", "reinforce++-baseline"):
        first, second = (
            compute_advantages(x, configure(name), scores(x)).fields["advantage"] for x in (one, other)
        )
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def grouped(of: RolloutBatch) -> dict[str, tuple[Sample, ...]]:
    """Group id -> samples in reverse order."""
    return {
        g: tuple(s for s, its in zip(of.samples, of.group_ids, strict=True) if its == g)[::-1]
        for g in of.group_ids
    }


def test_sample_advantages_are_whitened_by_tokens_where_asked():
    of = batch()
    plain = compute_advantages(of, configure("reinforce++-baseline", {"whiten": False})).fields["advantage"]
    white = compute_advantages(of, configure("reinforce++-baseline")).fields["advantage"]
    tokens = np.repeat(plain, [len(s.token_ids) for s in of.samples])
    expected = (np.array(plain) - tokens.mean()) / math.sqrt(tokens.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(white, expected, rtol=1e-12)
    samples_only = (np.array(plain) - np.mean(plain)) / math.sqrt(np.var(plain, ddof=1) + 1e-8)
    assert not np.allclose(white, samples_only, atol=1e-3)


@pytest.mark.parametrize("name", ["ppo", "grpo", "gspo"])
@pytest.mark.parametrize("reward", [math.nan, math.inf, None, "1"])
def test_a_reward_that_is_no_finite_number_is_refused(name, reward):
    of = batch(rewards=(REWARDS[0], REWARDS[1], (1.0, reward, 1.0, 1.0)))
    with pytest.raises(RewardError, match="p2@1"):
        compute_advantages(of, configure(name), scores(of))


def test_a_value_that_is_not_finite_is_refused():
    of = batch()
    given = scores(of)
    given.values[3][0] = math.nan
    with pytest.raises(NumericsError, match=r"critic\.lr"):
        compute_advantages(of, configure("ppo"), given)
    compute_advantages(of, configure("reinforce++"), given)  # asks no critic


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
@pytest.mark.parametrize("which", ["old", "ref"])
def test_a_log_prob_that_is_not_finite_costs_its_token_the_kl_and_nothing_else(which, bad):
    of = batch()
    given = scores(of)
    of_token = given.old_log_probs if which == "old" else given.ref_log_probs
    same = scores(of)
    same.old_log_probs[2][1] = same.ref_log_probs[2][1] = 0.0
    of_token[2][1] = bad
    got, expected = (compute_advantages(of, configure("ppo"), x).fields["advantage"] for x in (given, same))
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)


def test_empty_responses_have_no_rows_and_change_no_one_else():
    lengths = ((3, 1, 0, 2), (4, 4, 1, 6), (0, 0, 0, 0))
    for name in ("ppo", "reinforce++", "grpo", "reinforce++-baseline"):
        of = batch(lengths)
        got = compute_advantages(of, configure(name), scores(of)).fields["advantage"]
        per_token = configure(name).per_token
        assert [
            np.size(a) if per_token else len(s.token_ids) for a, s in zip(got, of.samples, strict=True)
        ] == [n for group in lengths for n in group]
        assert all(np.isfinite(a).all() for a in got)
        if per_token:
            set_to = configure(name, {"gamma": 0.97, "kl_in_reward": 0.2})
            critic = name == "ppo"
            lam = 0.95 if critic else 1.0
            hand, _ = by_hand(of, scores(of), beta=0.2, gamma=0.97, lam=lam, critic=critic)
            advantages = compute_advantages(of, set_to, scores(of)).fields["advantage"]
            for mine, theirs in zip(advantages, hand, strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)


def test_an_empty_response_counts_in_its_groups_statistics_and_has_no_row():
    of, algorithm = batch(((3, 1, 0, 2), (4, 4, 1, 6), (0, 0, 0, 0))), configure("grpo")
    got = list(compute_advantages(of, algorithm).fields["advantage"])
    assert got == list(compute_advantages(batch(), algorithm).fields["advantage"])
    fewer = tuple(sample for sample in of.samples if sample.id != "p0@1/2")
    left = compute_advantages(RolloutBatch(fewer, ("p0@1",) * 3 + of.group_ids[4:]), algorithm)
    assert abs(next(iter(left.fields["advantage"])) - got[0]) > 0.05, "the control: it was left out"
    made = packed(of, algorithm, advantage=np.array(got))
    assert sum(len(one.rows) for one in made) == 3 + 1 + 0 + 2 + 4 + 4 + 1 + 6


def test_nothing_but_empty_responses_is_defined():
    of = batch(((0, 0),), ((1.0, 0.0),))
    for name in ("ppo", "grpo", "reinforce++-baseline"):
        got = compute_advantages(of, configure(name), scores(of))
        assert all(np.isfinite(a).all() for a in got.fields["advantage"])
        assert all(math.isfinite(m) for m in got.metrics.values())


def test_equal_rewards_give_group_algorithms_exactly_zero():
    of = batch(rewards=((0.1,) * 4,) * 3)
    for name in ("grpo", "gspo", "sapo", "liteppo", "drgrpo", "rloo"):
        assert set(compute_advantages(of, configure(name)).fields["advantage"]) == {0.0}
    assert any(compute_advantages(batch(), configure("grpo")).fields["advantage"])
    got = compute_advantages(of, configure("ppo"), scores(of)).fields["advantage"]
    assert all(np.isfinite(a).all() for a in got)


def test_a_single_token_is_not_whitened():
    of = batch(((1,),), ((0.7,),))
    zero = [np.zeros(1, np.float32)]
    got = compute_advantages(of, configure("ppo"), Scores({0: zero[0]}, zero, zero)).fields["advantage"]
    assert got[0] == pytest.approx(0.7)


def test_the_reference_reaches_the_loss_of_every_algorithm_that_asks():
    of = batch()
    algorithm = configure("grpo", {"kl_in_loss": 0.1})
    given = replace(scores(of), values=())
    assert compute_advantages(of, algorithm, given).fields["ref_log_prob"] is given.ref_log_probs
    assert "ref_log_prob" not in compute_advantages(of, configure("grpo")).fields


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    assert value_metrics(returns, returns)["value/explained_variance"] == 1.0
    assert value_metrics(returns - 7, returns)["value/explained_variance"] == pytest.approx(1.0)
    assert value_metrics(torch.full_like(returns, 2.0), returns)["value/explained_variance"] == 0.0
    assert value_metrics(-returns, returns)["value/explained_variance"] == pytest.approx(-3.0)
    assert value_metrics(returns, torch.ones_like(returns))["value/explained_variance"] == 0.0
    assert value_metrics(returns, returns)["value/mean"] == 2.0
