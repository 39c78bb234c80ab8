"""Pack sequences into micro-batches under a token budget, the same number of micro-batches on every rank."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mcore_rl.data.balance import balance
from mcore_rl.errors import DataError
from mcore_rl.types import PackedBatch, Tokens

PAD_TOKEN = 0
"""Any valid id does: padding is never a target, and causal attention keeps it out of every scored row."""


PIECES_PER_RANK = 4
"""so many at least, if there are samples enough: fewer could not be spread evenly"""


def padded(lengths: npt.ArrayLike, align: int) -> npt.NDArray[np.int64]:
    """[N] lengths rounded up to a multiple of `align`."""
    return -(-np.asarray(lengths, np.int64) // align) * align


def pack_bins(lengths: npt.ArrayLike, budget: int) -> list[list[int]]:
    """Best-fit decreasing: few bins, none holding more than `budget` tokens.

    At most 11/9 of the optimum plus a constant (Johnson 1974); on sequence lengths as they occur, at most
    one bin above `lower_bound` (benchmarks/balance.py).

    Args:
        lengths: [N] tokens per sequence as packed, padding included.
    Returns:
        Bins of indices into `lengths`, each index in exactly one bin.
    Raises:
        DataError: a sequence is empty, or longer than the budget.
    """
    sizes = np.asarray(lengths, np.int64)
    check_sizes(sizes, budget)
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room, bin), ascending
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        tightest = bisect_left(free, (size, -1))
        if tightest == len(free):
            insort(free, (budget - size, len(bins)))
            bins.append([index])
        else:
            room, chosen = free.pop(tightest)
            insort(free, (room - size, chosen))
            bins[chosen].append(index)
    return bins


def check_sizes(sizes: npt.NDArray[np.int64], budget: int) -> None:
    """Raise DataError for a sequence that is empty, or longer than the budget."""
    for bad in np.flatnonzero((sizes < 1) | (sizes > budget))[:1].tolist():
        size = int(sizes[bad])
        if size < 1:
            raise DataError(f"sequence {bad} has {size} tokens; drop it before packing")
        raise DataError(
            f"sequence {bad} takes {size} tokens with its padding, more than the {budget} of a micro-batch; "
            "raise train.tokens_per_micro_batch, or lower data.max_prompt_tokens or rollout.max_new_tokens"
        )


def lower_bound(lengths: npt.ArrayLike, budget: int) -> int:
    """Bins that any packing needs (Martello and Toth 1990, bound L2).

    For every threshold k <= budget/2: sequences above budget/2 need a bin each, and those from k to budget/2
    share the room left beside the ones of at most budget - k.
    """
    sizes = np.sort(np.asarray(lengths, np.int64))
    if not sizes.size:
        return 0
    sums = np.concatenate([[0], np.cumsum(sizes)])
    thresholds = np.unique(np.concatenate([[0], sizes[sizes <= budget // 2]]))
    half = np.searchsorted(sizes, budget // 2, side="right")
    alone = np.searchsorted(sizes, budget - thresholds, side="right")
    small = np.searchsorted(sizes, thresholds)
    room = (alone - half) * budget - (sums[alone] - sums[half])
    overflow = np.maximum(sums[half] - sums[small] - room, 0)
    return int((sizes.size - half - (-overflow // budget)).max())


def micro_batches(
    lengths: npt.ArrayLike, costs: npt.ArrayLike, ranks: int, budget: int, *, multiple: int = 1
) -> list[list[list[int]]]:
    """Which sequences each rank runs in each micro-batch of one optimizer step.

    Sequences are balanced over the ranks by cost, packed per rank, and every rank gets the same number of
    micro-batches (at least one): a rank with fewer splits its costliest, and takes empty ones when nothing is
    left to split. Each rank runs its costliest first, so that ranks that wait for each other have like work.

    Args:
        lengths: [N] tokens per sequence as packed (`padded`).
        costs: [N] `forward_flops`.
        multiple: the count is a multiple of this (virtual pipeline: the pipeline size).
    Returns:
        [ranks][micro-batches] lists of indices into `lengths`.
    Raises:
        DataError: as `pack_bins` and `balance`.
    """
    sizes, values = np.asarray(lengths, np.int64), np.asarray(costs, np.float64)
    check_sizes(sizes, budget)
    per_rank = []
    for share in balance(values, ranks):
        bins = pack_bins(sizes[share], budget)
        per_rank.append([[share[local] for local in one] for one in bins])
    count = max(1, *map(len, per_rank))
    count = -(-count // multiple) * multiple
    return [_spread(bins, values, count) for bins in per_rank]


def _spread(bins: list[list[int]], costs: npt.NDArray[np.float64], count: int) -> list[list[int]]:
    """`count` bins, costliest first: split the costliest that holds two or more, then append empty ones."""
    done = list(bins)
    while len(done) < count:
        splittable = [i for i, one in enumerate(done) if len(one) > 1]
        if not splittable:
            done += [[] for _ in range(count - len(done))]
            break
        costliest = done.pop(max(splittable, key=lambda i: float(costs[done[i]].sum())))
        done += [[costliest[local] for local in half] for half in balance(costs[costliest], 2)]
    return sorted(done, key=lambda one: -float(costs[one].sum()))


@dataclass(frozen=True)
class TokenSequence:
    """Prompt and response of one training sequence."""

    prompt: Sequence[int] | Tokens
    """[P >= 1] token ids"""
    response: Sequence[int] | Tokens
    """[n] token ids"""
    loss_mask: Sequence[bool] | npt.NDArray[np.bool_] | None = None
    """[n] which response tokens are scored; None scores all"""
    experts: npt.NDArray[np.integer] | None = None
    """[P+n-1, layers, K] experts of all tokens but the last; None where routers choose themselves"""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    @property
    def scored(self) -> int:
        """Rows of this sequence in a packed batch."""
        return len(self.response) if self.loss_mask is None else int(np.sum(self.loss_mask))


def pack(
    sequences: Sequence[TokenSequence],
    members: Sequence[int],
    fields: Mapping[str, Sequence[Any]],
    *,
    align: int = 1,
    share_prompts: bool = False,
    dtype: torch.dtype = torch.float32,
) -> PackedBatch:
    """Lay the sequences of one micro-batch end to end.

    Each is padded at its end to a multiple of `align`. Response token t of a sequence at offset o is scored
    by row o + P - 1 + t, the token before it, where the loss mask is true. Empty `members` give one sequence
    of `align` padding tokens and no rows, so that a rank without work still joins every collective.

    With shared prompts, a sequence whose prompt came before in this micro-batch is packed without it, and its
    first response token is scored by the last row of that prompt: what a causal model computes for a prompt
    does not depend on what follows.

    Args:
        sequences: all of the step; `members` (a bin) selects.
        fields: name -> per sequence either one number, or one per scored token.
        align: 2 x context parallel size, times the tensor parallel size under sequence parallel.
        share_prompts: only for models whose attention knows of it (model.packed_layout).
        dtype: of floating-point fields; integer and bool fields keep their kind (int64, bool).
    Raises:
        DataError: a prompt without tokens, or a mask or field whose length is not the response's.
    """
    chosen = [sequences[i] for i in members]
    for i, one in zip(members, chosen, strict=True):
        _check_sequence(i, one)
    prompts = np.array([len(one.prompt) for one in chosen], np.int64)
    responses = np.array([len(one.response) for one in chosen], np.int64)
    owners = _prompt_owners(chosen) if share_prompts else np.arange(len(chosen))
    before = np.where(owners == np.arange(len(chosen)), 0, prompts)  # tokens of it that lie elsewhere
    lengths = prompts + responses - before
    spans = padded(lengths, align) if chosen else np.array([align])
    ends = np.cumsum(spans)
    offsets = (ends - spans)[: len(chosen)]

    tokens = np.full(ends[-1], PAD_TOKEN, np.int64)
    for offset, own, one in zip(offsets, prompts - before, chosen, strict=True):
        if own:
            tokens[offset : offset + own] = one.prompt
        tokens[offset + own : offset + own + len(one.response)] = one.response
    local = np.arange(ends[-1]) - np.repeat(ends - spans, spans)
    # padding is at no position that it would not be at with a prompt of its own: there are rotary embeddings
    # that end
    position = np.minimum(
        local + np.repeat(before if chosen else [0], spans),
        np.repeat(padded(prompts + responses, align) if chosen else [align], spans) - 1,
    )
    sequence = np.repeat(np.arange(len(chosen)), responses)
    response_position = np.arange(responses.sum()) - np.repeat(np.cumsum(responses) - responses, responses)
    targets = (offsets + prompts - before)[sequence] + response_position
    # the first of a response is scored by the prompt's last token, wherever that lies
    rows = np.where(response_position == 0, (offsets[owners] + prompts - 1)[sequence], targets - 1)
    keep = np.concatenate([np.zeros(0, bool), *map(_mask, chosen)])
    scored = [one.scored for one in chosen]
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        position_ids=torch.from_numpy(position),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        max_seqlen=int((spans + before).max() if chosen else align),
        rows=torch.from_numpy(rows[keep]),
        targets=torch.from_numpy(tokens[targets][keep]),
        sequence=torch.from_numpy(sequence[keep]),
        fields={name: _field(name, values, members, scored, dtype) for name, values in fields.items()},
        experts=_experts(chosen, offsets.tolist(), int(ends[-1])),
        live=torch.from_numpy(local < np.repeat(lengths if chosen else [0], spans)),
        begins=torch.from_numpy(offsets[owners]) if before.any() else None,
    )


def prompt_key(one: TokenSequence) -> bytes | None:
    """Equal for sequences that can share their prompt; None for one that shares with none.

    One without a response has no row, and experts that were recorded are those of a sample.
    """
    if not len(one.response) or one.experts is not None:
        return None
    return np.asarray(one.prompt, np.int64).tobytes()


def _prompt_owners(chosen: Sequence[TokenSequence]) -> npt.NDArray[np.int64]:
    """[B] the first sequence with the same prompt."""
    first: dict[bytes, int] = {}
    owners = []
    for i, key in enumerate(map(prompt_key, chosen)):
        owners.append(i if key is None else first.setdefault(key, i))
    return np.array(owners, np.int64)


def with_one_prompt(
    sequences: Sequence[TokenSequence], lengths: npt.NDArray[np.int64], budget: int, ranks: int
) -> list[list[int]]:
    """Indices into `sequences`, those with the same prompt together, as far as `budget` tokens hold them.

    Args:
        lengths: [N] tokens of each as packed alone.
        ranks: data-parallel ones; groups are cut so that each gets several pieces.
    Raises:
        DataError: a sequence is empty, or longer than the budget.
    """
    check_sizes(lengths, budget)
    groups: dict[bytes | int, list[int]] = {}
    for i, sequence in enumerate(sequences):
        key = prompt_key(sequence)
        groups.setdefault(i if key is None else key, []).append(i)
    pieces = 1 if ranks == 1 else -(-PIECES_PER_RANK * ranks // max(len(groups), 1))
    return [
        piece
        for group in groups.values()
        for part in np.array_split(group, min(pieces, len(group)))
        for piece in _fitting(part.tolist(), lengths, budget)
    ]


def _fitting(members: Sequence[int], lengths: npt.NDArray[np.int64], budget: int) -> list[list[int]]:
    """`members` in order, cut where the next one would exceed the budget."""
    pieces: list[list[int]] = []
    room = 0
    for i in members:
        if not pieces or lengths[i] > room:
            pieces.append([])
            room = budget
        pieces[-1].append(i)
        room -= int(lengths[i])
    return pieces


def shared_lengths(
    sequences: Sequence[TokenSequence], units: Sequence[Sequence[int]]
) -> npt.NDArray[np.int64]:
    """[N] tokens of the prompt that a sequence need not compute, since one before it in its unit does."""
    saved = np.zeros(len(sequences), np.int64)
    for unit in units:
        for i in unit[1:]:
            saved[i] = len(sequences[i].prompt)
    return saved


def _experts(chosen: Sequence[TokenSequence], offsets: Sequence[int], tokens: int) -> torch.Tensor | None:
    """[T, layers, K] int16; -1 for padding and a sequence's last token, on which no scored row depends."""
    routed = [(offset, one.experts) for offset, one in zip(offsets, chosen, strict=False)]
    form = next((experts.shape[1:] for _, experts in routed if experts is not None), None)
    if form is None:
        return None
    placed = np.full((tokens, *form), -1, np.int16)
    for offset, experts in routed:
        if experts is not None:
            placed[offset : offset + len(experts)] = experts
    return torch.from_numpy(placed)


def _check_sequence(index: int, one: TokenSequence) -> None:
    if not len(one.prompt):
        raise DataError(
            f"sequence {index} has no prompt token, and its first response token nothing to be scored from; "
            "give every prompt at least one token"
        )
    if one.experts is not None and len(one.experts) != len(one) - 1:
        raise DataError(
            f"sequence {index}: experts of {len(one.experts)} tokens for a sequence of {len(one)}; give "
            "those of all tokens but the last"
        )
    if one.loss_mask is not None and len(one.loss_mask) != len(one.response):
        raise DataError(
            f"sequence {index}: loss mask of {len(one.loss_mask)} for {len(one.response)} response tokens; "
            "give one entry per response token"
        )


def _mask(one: TokenSequence) -> npt.NDArray[np.bool_]:
    return np.ones(len(one.response), bool) if one.loss_mask is None else np.asarray(one.loss_mask, bool)


def _field(
    name: str,
    values: Sequence[Any],
    members: Sequence[int],
    scored: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """[R] one field in row order."""
    kind = np.asarray(values[0]).dtype if len(values) else np.dtype(np.float64)
    parts = [np.zeros(0, kind)]
    for i, count in zip(members, scored, strict=True):
        part = np.asarray(values[i])
        if part.shape not in ((), (count,)):
            raise DataError(
                f"field {name!r} of sequence {i} has shape {part.shape} for {count} scored tokens; "
                "give one number, or one per scored token"
            )
        parts.append(part if part.shape else np.full(count, part))
    rows = torch.from_numpy(np.concatenate(parts))
    if rows.is_floating_point():
        return rows.to(dtype)
    return rows if rows.dtype == torch.bool else rows.long()
