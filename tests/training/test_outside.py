"""What a loss and an advantage read from outside of the trained tokens and of the batch.

Tokens between turns, values behind truncated responses, greedy answers and the means of roles.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from mcore_rl.algo.algorithms import configure
from mcore_rl.errors import ConfigError
from mcore_rl.parallel.head import HeadOutput
from mcore_rl.parallel.mesh import Layout, Mesh
from mcore_rl.training.advantage import Scores, compute_advantages
from mcore_rl.training.batch import Batching, build_batch, pack_mini_batch
from mcore_rl.training.critic import _and_behind, split_following, token_sequences
from mcore_rl.training.metrics import Gathered
from mcore_rl.training.objective import PolicyObjective
from mcore_rl.training.roles import RoleBaselines
from mcore_rl.types import Group, Prompt, Sample, Segment, VersionSpan

SHAPE = Batching(1, 256, 8, lambda n: np.asarray(n, float), 1)
MESH = cast(Mesh, SimpleNamespace(layout=Layout(), dp_rank=0))


def sample(number: int, trained: list[bool], reward: float, *, role: str = "", end: str = "stop") -> Sample:
    count = sum(trained)
    log_probs = tuple((-0.2 * np.arange(1, count + 1)).tolist())
    prompt = Prompt("p", "", (1, 2), "", {"role": role} if role else {})
    spans = (VersionSpan("0", 0, count),)
    segment = Segment((1, 2), tuple(range(3, 3 + len(trained))), log_probs, spans, np.array(trained))
    return Sample(f"p@1/{number}", prompt, (segment,), "", end, reward)


SAMPLES = (
    sample(0, [True, False, False, True], 1.0, role="first"),
    sample(1, [True, True], 0.0, role="second"),
    sample(2, [True, False, True, True], 0.5, role="first", end="length"),
)
BATCH = build_batch([Group("p@1", SAMPLES)])


def objective(name: str, params: dict[str, Any], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """(loss, d loss / d log_prob, metrics) of all samples in one micro-batch, with old log-probs."""
    algorithm = configure(name, params)
    fields = compute_advantages(BATCH, algorithm, Scores()).fields
    old = {i: np.asarray(s.log_probs) for i, s in enumerate(SAMPLES)}
    fields = {**fields, "old_log_prob": old}
    (packed,) = pack_mini_batch(BATCH, np.arange(3), algorithm, SHAPE, MESH, fields)
    drawn = torch.randn(20, generator=torch.Generator().manual_seed(seed))
    by_target = -drawn[packed.targets + 5 * packed.sequence].abs()  # of a token, whatever rows there are
    log_prob = by_target.clone().requires_grad_()
    loss, measure = PolicyObjective(algorithm, None)(packed, HeadOutput(log_prob, -log_prob.detach()))
    parts, read = Gathered([measure()])._parts, dict[str, float]()
    (gradient,) = torch.autograd.grad(loss, log_prob)
    for key, part in parts.items():
        read |= key.kind.read(key.name, part, 1)
    return packed, gradient, {"loss": loss.item(), **read}


def test_echo_learns_what_lies_between_the_turns_and_leaves_the_rest_alone() -> None:
    """grad = that of GRPO on sampled tokens, -coefficient / count on the three others."""
    rows, plain, without = objective("grpo", {})
    packed, gradient, found = objective(
        "echo", {"observation_nll": 0.3, "aggregation": "seq-mean-token-mean"}
    )
    observed = packed.fields["observed"] > 0
    assert observed.sum() == 3
    assert packed.fields["sequence_tokens"][~observed].tolist() == rows.fields["sequence_tokens"].tolist()
    torch.testing.assert_close(gradient[~observed], plain, rtol=0, atol=0)
    torch.testing.assert_close(gradient[observed], torch.full((3,), -0.3 / 3))
    likelihood = found.pop("observation/nll")
    assert found.pop("loss") == pytest.approx(without.pop("loss") + 0.3 * likelihood, rel=1e-6)
    assert found == pytest.approx(without, rel=1e-12), "no other number of the policy has these tokens"
    assert found["masked/fraction"] == 0


@pytest.mark.parametrize("name", ["gspo", "fipo"])
def test_a_sum_over_a_sequence_is_that_of_what_was_sampled(name: str) -> None:
    _, plain, _ = objective(name, {})
    packed, gradient, _ = objective(name, {"observation_nll": 0.3})
    torch.testing.assert_close(gradient[packed.fields["observed"] == 0], plain, rtol=0, atol=0)


def test_what_follows_is_counted_in_tokens_of_the_response() -> None:
    packed, _, _ = objective("fipo", {})
    found = zip(packed.fields["sample"].tolist(), packed.fields["place"].tolist(), strict=True)
    assert sorted(found) == [(0, 0), (0, 3), (1, 0), (1, 1), (2, 0), (2, 2), (2, 3)]


def test_a_truncated_response_has_a_value_behind_its_last_token() -> None:
    sequences = _and_behind(token_sequences(SAMPLES), SAMPLES)
    assert [one.scored for one in sequences] == [2, 2, 4]
    assert np.asarray(sequences[2].response).tolist() == [3, 4, 5, 6, 0]
    values = [np.array([1.0, 2.0]), np.array([3.0, 4.0]), np.array([5.0, 6.0, 7.0, 8.0])]
    own, following = split_following(values, SAMPLES)
    assert [its.tolist() for its in own] == [[1, 2], [3, 4], [5, 6, 7]]
    assert following == [0, 0, 8]
    found = {}
    for bootstrap in (False, True):
        algorithm = configure("ppo", {"bootstrap": bootstrap, "kl_in_reward": 0, "whiten": False, "lam": 1.0})
        found[bootstrap] = compute_advantages(
            BATCH, algorithm, Scores(values=own, following=following)
        ).fields
    for name in ("advantage", "return"):
        gap = [b - a for a, b in zip(found[False][name], found[True][name], strict=True)]
        assert [x.round(12).tolist() for x in gap] == [[0, 0], [0, 0], [8, 8, 8]], name
    with pytest.raises(ConfigError, match="no critic that values every token"):
        configure("grpo", {"bootstrap": True})


def test_a_greedy_answer_without_a_reward_is_replaced_by_the_mean_of_the_group() -> None:
    found = compute_advantages(BATCH, configure("remax"), Scores(baselines=[0.25, math.nan, -1.0]))
    assert found.fields["advantage"] == [0.75, -0.5, 1.5]
    assert found.metrics == {"baseline/mean": pytest.approx((0.25 + 0.5 - 1) / 3)}


def test_each_role_has_a_mean_of_its_own_which_a_checkpoint_keeps() -> None:
    roles = RoleBaselines(configure("rae", {"decay": 0.5}))
    assert roles.of(SAMPLES) == [0, 0, 0]
    roles.observe(SAMPLES)
    assert roles.of(SAMPLES) == [0.375, 0, 0.375]
    again = RoleBaselines(configure("rae", {"decay": 0.5}))
    again.restore(roles.state())
    again.observe([replace(SAMPLES[1], reward=-1.0), sample(3, [True], 4.0)])
    assert again.of(SAMPLES) == [0.375, -0.5, 0.375]
    assert again.state()[""] == 2.0, "prompts without a role share a mean"
    by_game = RoleBaselines(configure("rae", {"role": "game"}))
    by_game.observe(SAMPLES)
    assert set(by_game.state()) == {""}
    idle = RoleBaselines(configure("grpo"))
    idle.observe(SAMPLES)
    assert idle.state() == {}
