"""The objective of one micro-batch: gradients, metric sums, and whose log-probs each ratio is taken to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_rl.algo.algorithms import ALGORITHMS, configure
from mcore_rl.algo.losses import CORRECTIONS
from mcore_rl.algo.metrics import Key
from mcore_rl.errors import ConfigError
from mcore_rl.model.step import _some_rows
from mcore_rl.parallel.head import HeadOutput
from mcore_rl.training.metrics import Gathered, HeadGradient, read
from mcore_rl.training.objective import PolicyObjective
from mcore_rl.types import PackedBatch


def objective_of_rows(
    old: Tensor | None,
    name: str = "ppo",
    rollout: Tensor | None = None,
    params: Mapping[str, object] | None = None,
    age: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any], Tensor, Tensor]:
    """(loss, parts by name and as they are read, log-probs, advantages) of one sequence of four rows."""
    rows, log_prob = rows_of(old, rollout, age)
    advantage = rows.fields["advantage"]
    objective = PolicyObjective(configure(name, params), None)
    loss, measure = objective(rows, HeadOutput(log_prob, torch.ones(4)))
    parts = measure()
    return (
        loss,
        {key.name: part for key, part in parts.items()} | {"read": read(parts, 1)},
        log_prob,
        advantage,
    )


def rows_of(
    old: Tensor | None, rollout: Tensor | None = None, age: Tensor | None = None
) -> tuple[PackedBatch, Tensor]:
    """One sequence of four rows, and their log-probs."""
    log_prob = torch.log(torch.tensor([0.5, 0.2, 0.9, 0.4])).requires_grad_()
    advantage = torch.tensor([1.0, -2.0, 0.5, 3.0])
    known = {
        "advantage": advantage,
        "weight": torch.full((4,), 0.25),
        "nll_weight": torch.tensor([0.1, 0.1, 0.0, 0.0]),
        "place": torch.arange(4),
        "rollout_log_prob": log_prob.detach() if rollout is None else rollout,
    }
    known |= {} if age is None else {"age": age}
    rows = PackedBatch(
        tokens=torch.zeros(5, dtype=torch.int64),
        position_ids=torch.arange(5),
        cu_seqlens=torch.tensor([0, 5], dtype=torch.int32),
        max_seqlen=5,
        rows=torch.arange(4),
        targets=torch.zeros(4, dtype=torch.int64),
        sequence=torch.zeros(4, dtype=torch.int64),
        fields=known if old is None else known | {"old_log_prob": old},
    )
    return rows, log_prob


def test_the_gradient_scale_is_that_of_the_loss_and_leaves_its_gradient_alone():
    loss, sums, log_prob, advantage = objective_of_rows(old=None)
    measured = (advantage.abs() * (1 - log_prob.detach().exp())).sum()
    assert sums["head"][0].item() == pytest.approx(measured.item())
    assert torch.equal(sums["head/grad_ratio_on_policy"], sums["head"])
    loss.backward()
    assert torch.allclose(log_prob.grad, -advantage / 4)


def test_clipped_rows_have_no_gradient_scale_and_later_mini_batches_are_not_on_policy():
    far = torch.log(
        torch.tensor([0.5, 0.2, 0.9, 0.1])
    )  # the last row's ratio is 4 with A > 0: its gradient is cut
    loss, sums, log_prob, advantage = objective_of_rows(far)
    measured = (advantage.abs() * (1 - log_prob.detach().exp()))[:3].sum()
    assert sums["head"][0].item() == pytest.approx(measured.item())
    assert "head/grad_ratio_on_policy" not in sums
    loss.backward()
    assert log_prob.grad[3] == 0


def test_dsv32_masks_by_the_sampling_log_probs_and_clips_by_the_old_ones():
    """A sequence that its sampler (stale, or another engine) liked much more is cut where A < 0."""
    current = torch.log(torch.tensor([0.5, 0.2, 0.9, 0.4]))
    near, _, log_prob, _ = objective_of_rows(current, "dsv32", rollout=current + 0.05)
    (kept,) = torch.autograd.grad(near, log_prob)
    assert (kept != 0).all()
    far, sums, log_prob, _ = objective_of_rows(current, "dsv32", rollout=current + 0.5)
    (cut,) = torch.autograd.grad(far, log_prob)
    assert (cut == 0).tolist() == [False, True, False, False]
    assert sums["read"]["clip/fraction"] == 0.25


def test_gspo_takes_its_ratio_to_the_old_log_probs():
    current = torch.log(torch.tensor([0.5, 0.2, 0.9, 0.4]))
    same = [objective_of_rows(current, "gspo", rollout=current + shift)[0] for shift in (0.0, 0.5)]
    assert same[0] == same[1]


HEAD = Key("head", HeadGradient(None))
OF_OLD = {"gspo", "gspo-kept", "sapo-sequence"}
WHOLE_SEQUENCES = {*OF_OLD, "dsv32", "gmpo", "vespo", "topr", "fipo"}
"""algorithms that need something of a whole sequence; it is 0 on policy for those of OF_OLD"""


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("on_policy", [True, False])
def test_rowwise_losses_are_those_whose_parts_add_up(name: str, on_policy: bool) -> None:
    """What an algorithm says of itself is what its loss and its gradient do."""
    behaviour = torch.tensor([0.3, -0.4, 0.2, 0.5]) - 1
    batch, log_prob = rows_of(None if on_policy else behaviour, rollout=behaviour)
    objective = PolicyObjective(
        configure(name, {"eps_low": 0.9, "eps_high": 0.9} if name == "gspo" else {}), None
    )
    whole, measure = objective(batch, HeadOutput(log_prob, torch.ones(4)))
    sums = measure()
    parts = [
        objective(_some_rows(batch, rows), HeadOutput(log_prob[rows], torch.ones(4)[rows]))
        for rows in (slice(0, 1), slice(1, 3), slice(3, 4), slice(0, 0))
    ]
    of_parts = [measure() for _, measure in parts]
    added = torch.stack([part for part, _ in parts]).sum()
    same = torch.allclose(
        torch.stack([*torch.autograd.grad(whole, log_prob)]),
        torch.stack([*torch.autograd.grad(added, log_prob)]),
    )
    assert objective.rowwise(batch) == (name not in WHOLE_SEQUENCES or (on_policy and name in OF_OLD))
    if objective.rowwise(batch):
        assert same
        torch.testing.assert_close(added, whole)
        torch.testing.assert_close(Gathered(of_parts)._parts[HEAD], sums[HEAD])
    elif name == "gspo":
        assert not same


@pytest.mark.parametrize("name", ["gspo", "grpo"])
def test_a_correction_by_the_sequence_is_not_rowwise(name: str) -> None:
    batch, _ = rows_of(None)
    known = {
        correction: PolicyObjective(configure(name, {"correction": correction}), None).rowwise(batch)
        for correction in ("tis-token", "icepop", "tis-sequence", "geometric")
    }
    assert known == {"tis-token": True, "icepop": True, "tis-sequence": False, "geometric": False}


CURRENT = torch.log(torch.tensor([0.5, 0.2, 0.9, 0.4]))
SHIFT = torch.log(torch.tensor([1.0, 4.0, 0.25, 1.5]))
"""of the old policy's probabilities over those of the policy that sampled"""


@pytest.mark.parametrize(
    ("params", "weights"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0]),
        ({"correction": "tis-token"}, [1.0, 2.0, 0.25, 1.5]),
        ({"correction": "tis-token", "correction_high": 1.25}, [1.0, 1.25, 0.25, 1.25]),
        ({"correction": "mis-token"}, [1.0, 0.0, 0.25, 1.5]),
        ({"correction": "icepop"}, [1.0, 4.0, 0.0, 1.5]),
        ({"correction": "decoupled"}, [1.0, 4.0, 0.25, 1.5]),
        ({"correction": "tis-sequence"}, [1.5] * 4),
        ({"correction": "geometric", "correction_high": 1.2}, [1.0] * 4),
        ({"correction": "geometric"}, [0.0] * 4),
    ],
)
def test_a_correction_weighs_the_gradient_by_old_over_rollout_log_probs(params, weights):
    loss, sums, log_prob, advantage = objective_of_rows(None, rollout=CURRENT - SHIFT, params=params)
    loss.backward()
    assert torch.allclose(log_prob.grad, -advantage / 4 * torch.tensor(weights))
    assert ("correction/mean" in sums["read"]) == bool(params)

    for params in (
        {"correction_low": 0.5},
        {"correction_high": 2.0},
        {"correction_low": 0.5},
        {"correction": "icepop", "correction_low": 6.0},
        {"correction": "tis"},
    ):
        with pytest.raises(ConfigError, match=r"algorithm\.params\.correction"):
            configure("gspo", params)


def test_behaviour_is_of_all_tokens_and_mismatch_of_those_of_the_current_weights():
    """p_old / p_rollout of the four tokens: 1, 4, 1/4, 3/2."""
    for age, mismatch in ((None, math.log(4)), ([1, 1, 1, 0], math.log(1.5)), ([1, 1, 2, 1], None)):
        rows = objective_of_rows(
            None, rollout=CURRENT - SHIFT, age=None if age is None else torch.tensor(age)
        )
        known = rows[1]["read"]
        ratios = [1.0, 4.0, 0.25, 1.5]
        assert known["behaviour/k1"] == pytest.approx(-math.log(1.5) / 4)
        assert known["behaviour/k3"] == pytest.approx((sum(ratios) - 4 - math.log(1.5)) / 4)
        assert known["behaviour/ess"] == pytest.approx(sum(ratios) ** 2 / 4 / sum(r * r for r in ratios))
        assert known["behaviour/max_abs"] == pytest.approx(math.log(4))
        assert known.get("mismatch/max_abs") == (None if mismatch is None else pytest.approx(mismatch))
        assert ("head/grad_ratio_on_policy" in rows[1]) == (age is None), (
            "its bound is of tokens from these weights"
        )


BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["ppo", "gspo", "dsv32"])
@pytest.mark.parametrize("correction", ["none", *CORRECTIONS])
def test_a_token_whose_rollout_log_prob_is_not_finite_is_not_trained_on(
    correction: str, name: str, bad: float
) -> None:
    """Its loss and gradient are exactly 0, and the others are what they are in a sequence without it."""
    old = CURRENT + torch.tensor([0.02, -0.01, 0.03, 0.01])
    params = {} if correction == "none" else {"correction": correction}
    wide = {"eps_low": 0.9, "eps_high": 0.9} if name == "gspo" else {}
    broken, good = old - 0.1 * SHIFT, old - 0.1 * SHIFT
    broken[1] = bad
    objective = PolicyObjective(configure(name, {**params, **wide}), None)
    batch, log_prob = rows_of(old, rollout=broken)
    loss, measure = objective(batch, HeadOutput(log_prob, torch.ones(4)))
    parts = measure()
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert gradient[1] == 0
    assert torch.isfinite(loss)
    assert all(math.isfinite(value) for value in read(parts, 1).values())
    assert read(parts, 1)["masked/fraction"] == 0.25

    others = torch.tensor([0, 2, 3])
    alone, log_prob = rows_of(old, rollout=good)
    alone = replace(
        alone,
        rows=others,
        targets=alone.targets[others],
        sequence=alone.sequence[others],
        fields={name: value[others] for name, value in alone.fields.items()},
    )
    head = HeadOutput(log_prob[others], torch.ones(3))
    expected, _ = objective(alone, head)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, log_prob)[0])


@pytest.mark.parametrize("field", ["old_log_prob", "rollout_log_prob", "ref_log_prob"])
@pytest.mark.parametrize("bad", BAD)
def test_any_recorded_log_prob_that_is_not_finite_masks_its_token(field: str, bad: float) -> None:
    batch, log_prob = rows_of(CURRENT + 0.01)
    fields = {**batch.fields, "ref_log_prob": CURRENT - 0.1}
    fields[field] = torch.where(torch.arange(4) == 2, bad, fields[field])
    objective = PolicyObjective(configure("grpo", {"kl_in_loss": 0.1, "kl_estimator": "k3_iw"}), None)
    loss, _ = objective(replace(batch, fields=fields), HeadOutput(log_prob, torch.ones(4)))
    (gradient,) = torch.autograd.grad(loss, log_prob)
    assert (gradient == 0).tolist() == [False, False, True, False]


def test_a_policy_that_is_not_finite_itself_is_not_masked() -> None:
    """The control: a broken model must reach the check for finite losses."""
    batch, log_prob = rows_of(None)
    broken = torch.where(torch.arange(4) == 2, math.nan, log_prob)
    loss, _ = PolicyObjective(configure("grpo"), None)(batch, HeadOutput(broken, torch.ones(4)))
    assert loss.isnan()
