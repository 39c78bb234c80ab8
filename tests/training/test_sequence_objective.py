"""Losses of whole sequences: the gradient of every row against autograd over the whole."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mcore_rl.algo import preference
from mcore_rl.algo.sequences import PairLoss, ScoreLoss, Sequences, VerdictLoss
from mcore_rl.data.examples import Example
from mcore_rl.data.packing import TokenSequence, pack
from mcore_rl.errors import DataError
from mcore_rl.parallel.head import HeadOutput
from mcore_rl.training import reward_model
from mcore_rl.training.metrics import read
from mcore_rl.training.preference import constants, mismatched
from mcore_rl.training.sequence_objective import SequenceObjective, measured, parts_of
from mcore_rl.training.session import sequences_of

LENGTHS = (3, 1, 2, 5, 1, 1, 4, 2)


def rows(answers: int) -> list[Example]:
    """Answers of LENGTHS tokens; of the one of 5, the second token is context."""
    masks = {5: [True, False, True, True, True]}
    made = [TokenSequence((1, 2), tuple(range(n)), masks.get(n)) for n in LENGTHS]
    grouped = [tuple(made[i : i + answers]) for i in range(0, len(made), answers)]
    return [
        Example(str(i), "", (1, 2), "", sequences=its, desirable=i % 3 > 0) for i, its in enumerate(grouped)
    ]


def batch_of(loss: PairLoss | VerdictLoss, answers: int):
    its = rows(answers)
    reference = [-1.0 - 0.2 * i for i in range(len(LENGTHS))] if loss.needs_reference else ()
    fields = constants(loss, its, reference, point=0.4)
    return pack(sequences_of(its), range(len(LENGTHS)), fields, dtype=torch.float64), reference


def ends(batch) -> list[Tensor]:
    """The rows of each sequence."""
    return [(batch.sequence == i).nonzero().squeeze(1) for i in range(len(LENGTHS))]


def dense(loss: PairLoss | VerdictLoss, log_prob: Tensor, batch, reference) -> Tensor:
    """The whole loss from the formulas alone."""
    log_probs = [log_prob[its] for its in ends(batch)]
    sums = torch.stack([one.sum() for one in log_probs])
    means = torch.stack([one.mean() for one in log_probs])
    counts = torch.tensor([float(len(one)) for one in log_probs], dtype=torch.float64)
    ref_means = torch.tensor(reference, dtype=torch.float64)
    if isinstance(loss, VerdictLoss):
        desirable = torch.tensor([i % 3 > 0 for i in range(len(LENGTHS))])
        point = torch.tensor(0.4, dtype=torch.float64)
        return preference.kto(sums - ref_means * counts, desirable, point, beta=loss.beta).mean()
    chosen, rejected = slice(0, None, 2), slice(1, None, 2)
    if loss.name == "orpo":
        likelihood = -torch.cat(log_probs[0::2]).mean()
        return likelihood + preference.orpo_odds(means[chosen], means[rejected], weight=loss.beta).mean()
    value, ref = (means, ref_means) if loss.average else (sums, ref_means * counts)
    margins = preference.margin(value[chosen], value[rejected], ref[chosen], ref[rejected])
    if loss.name == "ipo":
        return preference.ipo(margins, tau=loss.beta).mean()
    of_margins = preference.robust_dpo if loss.name == "rdpo" else preference.dpo
    return of_margins(margins, beta=loss.beta, label_smoothing=loss.label_smoothing).mean()


CASES = {
    "dpo": PairLoss("dpo"),
    "cdpo": PairLoss("dpo", beta=0.5, label_smoothing=0.2),
    "rdpo": PairLoss("rdpo", label_smoothing=0.2),
    "ipo": PairLoss("ipo"),
    "ipo of means": PairLoss("ipo", average=True),
    "orpo": PairLoss("orpo"),
    "kto": VerdictLoss(),
}


@pytest.mark.parametrize("case", CASES)
def test_the_rows_have_the_gradient_of_the_whole(case: str) -> None:
    loss = CASES[case]
    batch, reference = batch_of(loss, 1 if isinstance(loss, VerdictLoss) else 2)
    rng = torch.Generator().manual_seed(0)
    log_prob = -torch.rand(len(batch.rows), generator=rng, dtype=torch.float64).requires_grad_() - 0.1
    log_prob = log_prob.detach().requires_grad_()
    total, measure = SequenceObjective(loss, None)(batch, HeadOutput(log_prob, -log_prob.detach()))
    parts = measure()
    (found,) = torch.autograd.grad(total, log_prob)
    expected = dense(loss, log_prob, batch, reference)
    (wanted,) = torch.autograd.grad(expected, log_prob)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-15)
    assert wanted.abs().min() > 0
    named = {key.name: part for key, part in parts.items()}
    assert named["loss/policy"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_rank_without_work_has_a_gradient_of_nothing() -> None:
    for loss in (PairLoss("dpo"), PairLoss("orpo"), VerdictLoss()):
        batch, _ = batch_of(loss, 1 if isinstance(loss, VerdictLoss) else 2)
        nothing = {name: values[:0] for name, values in batch.fields.items()}
        empty = replace(pack([], [], {}), fields=nothing)
        none = torch.zeros(0, requires_grad=True)
        total, measure = SequenceObjective(loss, None)(empty, HeadOutput(none, none.detach()))
        parts = measure()
        total.backward()
        assert total.item() == 0
        assert all(part.isfinite().all() for part in parts.values())


def test_a_score_is_centred_and_parted_by_a_margin() -> None:
    one = torch.ones(4, dtype=torch.float64)
    fields = {"weight": one / 2, "margin": one}
    scores = torch.tensor([1.0, -1.0, 0.5, 0.5], dtype=torch.float64)
    loss = ScoreLoss(center_coef=0.1)(Sequences(scores, one, fields))
    expected = preference.bradley_terry(scores[::2], scores[1::2], 1.0, center_coef=0.1) / 2
    assert torch.equal(loss.weighted, expected)
    accuracy = loss.metrics["preference/accuracy"]
    assert accuracy.value(accuracy.part(torch.ones(2, dtype=torch.bool))) == 0.75, "a draw is half of one"


def test_a_policy_that_differs_from_its_reference_by_rounding_is_ahead_of_nothing() -> None:
    """The noise that a first step had, in float32; the control is a margin of a thousandth of a nat."""
    one, log_probs = torch.ones(4, dtype=torch.float64), [-74.9, -97.3, -22.8, -172.3]
    for margin, accuracy in ((2.5e-6, 0.5), (-2.5e-6, 0.5), (1e-3, 1.0), (-1e-3, 0.0)):
        value = torch.tensor(log_probs, dtype=torch.float64)
        fields = {"weight": one / 2, "reference": value - torch.tensor([margin, 0.0]).repeat(2)}
        for name in ("dpo", "rdpo", "ipo"):
            found = PairLoss(name)(Sequences(value, one, fields)).metrics["preference/accuracy"]
            assert found.value(found.part(torch.ones(2, dtype=torch.bool))) == accuracy


def test_a_mismatched_answer_is_that_of_the_next_row() -> None:
    own = sequences_of(rows(1))
    others = mismatched(own, 10**6)
    assert [list(one.response) for one in others] == [list(range(n)) for n in (*LENGTHS[1:], LENGTHS[0])]
    assert [one.scored for one in others] == [n - (n == 5) for n in (*LENGTHS[1:], LENGTHS[0])]


def test_the_longest_prompt_with_the_longest_answer_is_cut_to_what_fits() -> None:
    """Rows of 10 tokens each make sequences of 2 and of 18 when their answers are exchanged."""
    mask = [True] * 5 + [False] * 4
    own = [TokenSequence(range(9), [1]), TokenSequence([0], list(range(9)), mask)]
    long, short = mismatched(own, 14)
    assert (len(long), len(short)) == (14, 2)
    assert (long.response, long.loss_mask) == (list(range(5)), mask[:5])
    assert [len(one) for one in mismatched(own, 10)] == [10, 2], "a token of the answer is left"


def test_one_row_has_no_other_answer() -> None:
    one = [TokenSequence([1], [2])]
    assert len(mismatched(one * 2, 9)) == 2
    with pytest.raises(DataError, match=r"data\.validation: one row"):
        mismatched(one, 9)


def calibration(differences: list[float]) -> dict[str, float]:
    """What validation says of pairs whose chosen answer scores so much more than the rejected one."""
    loss, scores = ScoreLoss(), [x for difference in differences for x in (1.0 + difference, 1.0)]
    pairs = [
        Example(str(i), "", (1,), "", sequences=(TokenSequence((1,), (2,)),) * 2)
        for i in range(len(differences))
    ]
    found = measured(loss, scores, [1] * len(scores), reward_model.constants(pairs))
    return read(parts_of(found, "loss", torch.ones_like(found.weighted, dtype=torch.bool)), updates=1)


def test_a_calibrated_reward_model_is_as_sure_as_it_is_right() -> None:
    """Known scores: pairs that differ by log 3 are right three times in four, by log 9 nine times in ten."""
    sizes = {math.log(3): (6, 2), math.log(9): (9, 1)}
    differences = [
        s * x for x, counts in sizes.items() for s, n in zip((1, -1), counts, strict=True) for _ in range(n)
    ]
    found = calibration(differences)
    right = 15 / 18
    assert found["preference/accuracy"] == pytest.approx(right)
    assert found["preference/confidence"] == pytest.approx(right)
    chances = [1 / (1 + math.exp(-x)) for x in differences]
    assert found["loss"] == pytest.approx(sum(-math.log(p) for p in chances) / len(chances))
    sure = calibration([2 * x for x in differences])
    assert sure["preference/accuracy"] == pytest.approx(right)
    assert sure["preference/confidence"] == pytest.approx((8 * 9 / 10 + 10 * 81 / 82) / 18), (
        "too sure of itself"
    )
    assert sure["loss"] > found["loss"]
    none = calibration([0.0] * 4)
    assert none["preference/accuracy"] == none["preference/confidence"] == 0.5
