"""Bins, micro-batches of equal count, and the packed tensors."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.balance import lognormal_lengths
from mcore_rl.data.packing import TokenSequence, lower_bound, micro_batches, pack, pack_bins, padded
from mcore_rl.errors import DataError

BUDGET = 50
lengths_lists = st.lists(st.integers(1, BUDGET), max_size=40)


def flat(nested):
    return sorted(itertools.chain.from_iterable(nested))


def fewest_bins(lengths, budget):
    """Exhaustive optimum: the smallest count into which the sequences can be placed one after the other."""

    def fits(index, rooms):
        if index == len(lengths):
            return True
        return any(
            fits(index + 1, (*rooms[:i], room - lengths[index], *rooms[i + 1 :]))
            for i, room in enumerate(rooms)
            if room >= lengths[index] and room not in rooms[:i]
        )

    return next(count for count in itertools.count() if fits(0, (budget,) * count))


@given(lengths_lists)
def test_bins_hold_every_sequence_once_within_the_budget(lengths):
    bins = pack_bins(lengths, BUDGET)
    assert flat(bins) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in one) <= BUDGET for one in bins)
    # best fit decreasing is within 11/9 of the optimum, and L2 at least 2/3 of it
    assert len(bins) <= 11 / 9 * 1.5 * lower_bound(lengths, BUDGET) + 1


@given(st.lists(st.integers(1, BUDGET), max_size=7))
def test_bins_against_the_exhaustive_optimum(lengths):
    best = fewest_bins(sorted(lengths, reverse=True), BUDGET)
    assert lower_bound(lengths, BUDGET) <= best <= len(pack_bins(lengths, BUDGET)) <= best + 1


def test_the_lower_bound_counts_sequences_that_cannot_share():
    assert lower_bound([26] * 5, 50) == 5  # tokens alone would say 3
    assert lower_bound([26, 26, 24], 50) == 2
    assert lower_bound([], 50) == 0


@pytest.mark.parametrize("budget", [32768, 65536])
@pytest.mark.parametrize("seed", range(5))
def test_at_most_one_bin_above_the_lower_bound(budget, seed):
    lengths = lognormal_lengths(1024, seed)
    assert len(pack_bins(lengths, budget)) <= lower_bound(lengths, budget) + 1


def test_first_come_packing_would_fail_the_bound():
    lengths, bins, room = lognormal_lengths(1024, 0), 0, 0
    for length in lengths:  # next fit
        bins, room = (bins, room - length) if length <= room else (bins + 1, 32768 - length)
    assert bins > lower_bound(lengths, 32768) + 1


@pytest.mark.parametrize(
    ("lengths", "message"), [([3, 51], "sequence 1 takes 51 tokens"), ([3, 0], "1 has 0")]
)
def test_a_sequence_that_no_bin_can_hold(lengths, message):
    with pytest.raises(DataError, match=message):
        pack_bins(lengths, BUDGET)
    with pytest.raises(DataError, match=message):
        micro_batches(lengths, lengths, 2, BUDGET)


@given(lengths_lists, st.integers(1, 5), st.integers(1, 3))
def test_every_rank_has_the_same_number_of_micro_batches(lengths, ranks, multiple):
    plan = micro_batches(lengths, [n * n for n in lengths], ranks, BUDGET, multiple=multiple)
    assert len(plan) == ranks
    (count,) = {len(rank) for rank in plan}
    assert count >= 1
    assert count % multiple == 0
    assert flat(itertools.chain.from_iterable(plan)) == list(range(len(lengths)))
    for rank in plan:
        costs = [sum(lengths[i] ** 2 for i in one) for one in rank]
        assert costs == sorted(costs, reverse=True)
        assert all(sum(lengths[i] for i in one) <= BUDGET for one in rank)
        assert all(rank) or not any(len(one) > 1 for one in rank), "an empty micro-batch beside one to split"


@pytest.mark.parametrize("seed", range(3))
def test_equal_counts_cost_at_most_one_more_micro_batch_than_any_plan(seed):
    lengths = lognormal_lengths(2048, seed)
    plan = micro_batches(lengths, lengths * 100_000.0 + lengths**2.0, 64, 32768)
    assert len(plan[0]) <= -(-lower_bound(lengths, 32768) // 64) + 1


SEQUENCES = [
    TokenSequence((11, 12, 13), (21, 22)),
    TokenSequence((14,), (23, 24, 25), (True, False, True)),
    TokenSequence((15, 16), ()),
]
FIELDS = {
    "advantage": [0.5, -0.25, 3.0],
    "old_log_prob": [(-0.1, -0.2), np.array([-0.3, -0.5]), ()],
    "kept": [True, torch.tensor([False, True]), True],
    "group": [7, 8, 9],
}


def test_rows_sit_before_the_tokens_they_score():
    batch = pack(SEQUENCES, [1, 0, 2], FIELDS, align=4)
    assert batch.tokens.tolist() == [14, 23, 24, 25, 11, 12, 13, 21, 22, 0, 0, 0, 15, 16, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, *range(8), 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 4, 12, 16]
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.max_seqlen, batch.num_sequences) == (8, 3)
    assert batch.rows.tolist() == [0, 2, 6, 7]
    assert batch.targets.tolist() == [23, 25, 21, 22]
    assert batch.sequence.tolist() == [0, 0, 1, 1]
    assert batch.fields["advantage"].tolist() == [-0.25, -0.25, 0.5, 0.5]
    assert torch.equal(batch.fields["old_log_prob"], torch.tensor([-0.3, -0.5, -0.1, -0.2]))
    assert batch.fields["kept"].tolist() == [False, True, True, True]
    assert batch.fields["group"].tolist() == [8, 8, 7, 7]
    dtypes = {name: field.dtype for name, field in batch.fields.items()}
    assert dtypes["advantage"] == dtypes["old_log_prob"] == torch.float32
    assert (dtypes["kept"], dtypes["group"]) == (torch.bool, torch.int64)


def test_floating_fields_take_the_dtype_asked_for():
    assert pack(SEQUENCES, [0], FIELDS, dtype=torch.float64).fields["old_log_prob"].tolist() == [-0.1, -0.2]


def test_an_empty_bin_is_a_valid_micro_batch_without_rows():
    batch = pack(SEQUENCES, [], FIELDS, align=4)
    assert batch.tokens.tolist() == [0, 0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 4]
    assert batch.max_seqlen == 4
    full = pack(SEQUENCES, [0], FIELDS, align=4)
    for name in ("rows", "targets", "sequence"):
        assert getattr(batch, name).numel() == 0
        assert getattr(batch, name).dtype == getattr(full, name).dtype
    assert {name: (field.numel(), field.dtype) for name, field in batch.fields.items()} == {
        name: (0, field.dtype) for name, field in full.fields.items()
    }


tokens = st.lists(st.integers(1, 99), max_size=6)
sequences_lists = st.lists(st.tuples(tokens.filter(bool), tokens, st.randoms()), min_size=1, max_size=6)


@given(sequences_lists, st.integers(1, 8))
def test_every_scored_token_is_scored_once_from_the_token_before_it(parts, align):
    sequences = [TokenSequence(p, r, [rng.random() < 0.7 for _ in r]) for p, r, rng in parts]
    marks = [
        [1000 * i + t for t, scored in enumerate(one.loss_mask) if scored] for i, one in enumerate(sequences)
    ]
    members = list(reversed(range(len(sequences))))
    batch = pack(sequences, members, {"mark": marks}, align=align)
    assert (
        batch.tokens.numel() == padded([len(one) for one in sequences], align).sum() == batch.cu_seqlens[-1]
    )
    assert torch.equal(batch.tokens[batch.rows + 1], batch.targets)
    expected = [mark for i in members for mark in marks[i]]
    assert batch.fields["mark"].tolist() == expected
    assert batch.rows.numel() == sum(one.scored for one in sequences)
    for row, mark, local in zip(batch.rows, expected, batch.sequence, strict=True):
        i, t = divmod(int(mark), 1000)
        assert members[local] == i
        assert row - batch.cu_seqlens[local] == len(sequences[i].prompt) - 1 + t
        assert batch.position_ids[row] == row - batch.cu_seqlens[local]


@pytest.mark.parametrize(
    ("sequence", "field", "message"),
    [
        (TokenSequence((), (1, 2)), 0.0, "sequence 1 has no prompt token"),
        (TokenSequence((1,), (1, 2), (True,)), 0.0, "sequence 1: loss mask of 1 for 2"),
        (
            TokenSequence((1,), (1, 2), experts=np.zeros((3, 1, 1), np.uint8)),
            0.0,
            "sequence 1: experts of 3 tokens for a sequence of 3; give those of all tokens but the last",
        ),
        (TokenSequence((1,), (1, 2)), (0.0,), r"field 'f' of sequence 1 has shape \(1,\) for 2"),
    ],
)
def test_sequences_and_fields_that_do_not_fit(sequence, field, message):
    with pytest.raises(DataError, match=message):
        pack([SEQUENCES[0], sequence], [1], {"f": [0.0, field]})


def test_experts_lie_beside_their_tokens():
    """The last token of a sequence, padding and a sequence without any are -1."""
    told = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)
    sequences = [TokenSequence((1, 2), (3,), experts=told), TokenSequence((4,), (5, 6))]
    experts = pack(sequences, [1, 0], {}, align=4).experts
    assert experts is not None
    assert (experts.dtype, experts.shape) == (torch.int16, (8, 2, 3))
    assert np.array_equal(experts[4:6], told)
    assert (experts[[0, 1, 2, 3, 6, 7]] == -1).all()
    assert pack(sequences, [1], {}).experts is None
    assert pack(sequences, [], {}, align=2).experts is None
