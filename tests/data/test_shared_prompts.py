"""Samples of one prompt are packed with it once, and every row still sees all that came before its token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.data.packing import (
    PIECES_PER_RANK,
    TokenSequence,
    pack,
    padded,
    shared_lengths,
    with_one_prompt,
)
from mcore_rl.errors import DataError
from mcore_rl.types import PackedBatch

tokens = st.lists(st.integers(1, 9), max_size=5)
prompts = st.sampled_from([(1,), (1, 2), (3, 1, 2), (3, 1, 2, 4)])
sequences_lists = st.lists(st.tuples(prompts, tokens, st.randoms()), min_size=1, max_size=8)


def seen(batch: PackedBatch, row: int) -> list[int]:
    """Tokens before and at packed token `row`, in the sequence that it is in."""
    sequence = int(np.searchsorted(batch.cu_seqlens, row, side="right")) - 1
    start = int(batch.cu_seqlens[sequence])
    before = int(batch.position_ids[start])
    first = 0 if batch.begins is None else int(batch.begins[sequence])
    return [*batch.tokens[first : first + before].tolist(), *batch.tokens[start : row + 1].tolist()]


@given(sequences_lists, st.integers(1, 6))
def test_every_row_sees_its_own_sequence(parts, align) -> None:
    sequences = [TokenSequence(p, r, [rng.random() < 0.7 for _ in r]) for p, r, rng in parts]
    members = list(reversed(range(len(sequences))))
    marks = [np.flatnonzero(one.loss_mask).astype(float) for one in sequences]
    batch = pack(sequences, members, {"place": marks}, align=align, share_prompts=True)
    alone = pack(sequences, members, {"place": marks}, align=align)
    assert batch.targets.tolist() == alone.targets.tolist()
    assert batch.sequence.tolist() == alone.sequence.tolist()
    assert batch.fields["place"].tolist() == alone.fields["place"].tolist()
    assert batch.max_seqlen >= max(len(one) for one in sequences)
    assert not (batch.cu_seqlens.diff() % align).any()
    # a rotary embedding that ends at some length has no position more to answer
    assert batch.position_ids.max() <= alone.position_ids.max()
    for row, place, local in zip(batch.rows.tolist(), batch.fields["place"], batch.sequence, strict=True):
        one = sequences[members[int(local)]]
        assert seen(batch, row) == [*one.prompt, *one.response][: len(one.prompt) + int(place)]
        assert batch.position_ids[row] == len(one.prompt) + int(place) - 1
    assert batch.live is not None
    having = [one for one in sequences if one.response]
    without = [one for one in sequences if not one.response]
    once = sum(map(len, {tuple(one.prompt) for one in having})) + sum(len(one.response) for one in having)
    assert int(batch.live.sum()) == once + sum(map(len, without))


def test_what_differs_among_samples_is_not_shared() -> None:
    """Routes that were recorded are a sample's own; a prompt without a response has no row."""
    routed = TokenSequence([1, 2], [3], experts=np.zeros((2, 1, 1), np.int64))
    one = TokenSequence([1, 2], [3])
    assert pack([routed, routed], [0, 1], {}, share_prompts=True).begins is None
    assert pack([one, TokenSequence([1, 2], [])], [0, 1], {}, share_prompts=True).begins is None
    assert pack([one, TokenSequence([1], [2, 3])], [0, 1], {}, share_prompts=True).begins is None
    assert pack([one, one], [0, 1], {}).begins is None
    begins = pack([one, one], [0, 1], {}, share_prompts=True).begins
    assert begins is not None
    assert begins.tolist() == [0, 0]


@given(
    st.lists(st.tuples(prompts, st.integers(1, 12)), min_size=1, max_size=30),
    st.integers(16, 40),
    st.integers(1, 4),
)
def test_samples_of_one_prompt_come_together(parts, budget, ranks) -> None:
    sequences = [TokenSequence(prompt, [5] * n) for prompt, n in parts]
    lengths = padded([len(one) for one in sequences], 1)
    units = with_one_prompt(sequences, lengths, budget, ranks)
    assert sorted(i for unit in units for i in unit) == list(range(len(sequences)))
    assert all(lengths[unit].sum() <= budget for unit in units)
    assert all(len({sequences[i].prompt for i in unit}) == 1 for unit in units)
    groups = len({one.prompt for one in sequences})
    if ranks == 1 and lengths.sum() <= budget:
        assert len(units) == groups
    if ranks > 1:
        sizes = [sum(one.prompt == prompt for one in sequences) for prompt in {p for p, _ in parts}]
        pieces = -(-PIECES_PER_RANK * ranks // groups)
        assert len(units) >= sum(min(size, pieces) for size in sizes)
    saved = shared_lengths(sequences, units)
    assert saved.sum() == sum(len(sequences[unit[0]].prompt) * (len(unit) - 1) for unit in units)


def test_a_sequence_that_fits_nowhere_is_named() -> None:
    sequences = [TokenSequence([1], [2]), TokenSequence([1], [2] * 8)]
    with pytest.raises(DataError, match="sequence 1 takes 9 tokens"):
        with_one_prompt(sequences, padded([2, 9], 1), 8, 1)
