"""From groups to micro-batches: order, mini-batches with global counts, packing. No collective.

Every function is pure and every rank calls it with the same gathered batch, so all ranks agree unasked.
N samples of the whole rollout batch, m_i trained tokens of sample i over all of its segments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from mcore_rl.algo.algorithms import Algorithm
from mcore_rl.algo.losses import aggregation_weight
from mcore_rl.algo.rows import ahead_by
from mcore_rl.data.packing import (
    TokenSequence,
    micro_batches,
    pack,
    padded,
    shared_lengths,
    with_one_prompt,
)
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.precision import packed_multiple
from mcore_rl.types import Group, PackedBatch, Sample

PerSample = Sequence[Any] | Mapping[int, Any]
"""sample number -> one number, or [m_i] numbers, one per trained token"""


@dataclass(frozen=True)
class RolloutBatch:
    """The samples of one step that are trained, the same on every rank."""

    samples: tuple[Sample, ...]
    """[N] in the order of their ids, whoever sampled them"""
    group_ids: tuple[str, ...]
    """[N]"""
    void: int = 0
    """samples that are not here, since their environment or their grader failed"""


def build_batch(groups: Sequence[Group]) -> RolloutBatch:
    """The samples of all replicas, ordered by id, without the void ones.

    What is left out here is in no statistic of a group or of the batch, in no count and in no loss.
    """
    pairs = [(group.id, sample) for group in groups for sample in group.samples]
    alive = sorted((pair for pair in pairs if not pair[1].void), key=lambda pair: pair[1].id)
    return RolloutBatch(
        tuple(sample for _, sample in alive), tuple(id for id, _ in alive), len(pairs) - len(alive)
    )


@dataclass(frozen=True)
class Batching:
    """How samples become micro-batches; numbers of the run, not of a step."""

    mini_batches: int
    """optimizer steps per pass over the rollout batch"""
    tokens_per_micro_batch: int
    """budget of packed tokens, padding included"""
    max_new_tokens: int
    """response limit, the L_max of the aggregation `seq-mean-token-sum-norm`"""
    cost: Callable[[np.ndarray], np.ndarray]
    """[N] tokens -> [N] FLOPs of the model's forward pass"""
    align: int
    """packed lengths are multiples of this"""
    overlong_filter: bool = False
    """truncated samples are out of the loss"""
    share_prompts: bool = False
    """samples of a micro-batch with the same prompt have its tokens once"""


def split_mini_batches(samples: int, parts: int, seed: Sequence[int]) -> list[np.ndarray]:
    """Shuffle sample indices and cut them into `parts` mini-batches whose sizes differ by at most one."""
    order = np.random.default_rng(list(seed)).permutation(samples)
    return [np.sort(part) for part in np.array_split(order, parts) if part.size]


def pack_mini_batch(
    batch: RolloutBatch,
    members: np.ndarray,
    algorithm: Algorithm,
    shape: Batching,
    mesh: Mesh,
    fields: Mapping[str, PerSample],
) -> list[PackedBatch]:
    """This replica's micro-batches of one mini-batch; every replica gets equally many.

    Each row carries its `weight` (aggregation weight with the mini-batch's GLOBAL denominators, in which a
    sample counts once, however many segments it has), the server's `rollout_log_prob`, the number of its
    `sample`, `sequence_tokens` (how many of its segment are scored), `nll_weight` where positive samples are
    learnt by likelihood too, `place` (of its token in the segment) where the loss reads what follows, and
    `fields`: by name what has an entry for each member. Segments of one sample
    may be packed on several replicas.

    Where truncated samples are filtered out, these have no rows: their tokens are in no denominator, while
    they themselves count among the samples, so that the others do not weigh more for it.
    """
    kept = [i for i in members.tolist() if has_loss(batch.samples[i], shape)]
    samples = [batch.samples[i] for i in kept]
    trained = torch.tensor([sample.trained_tokens for sample in samples], dtype=torch.float64)
    weight = aggregation_weight(
        algorithm.aggregation,
        trained,
        tokens=float(trained.sum()),
        sequences=len(members),
        max_length=shape.max_new_tokens,
    )
    sequences = token_sequences(samples)
    rows: dict[str, list[Any]] = {
        "weight": by_segment(weight.tolist(), samples),
        "sequence_tokens": [float(sequence.scored) for sequence in sequences],
        "rollout_log_prob": [segment.log_probs for sample in samples for segment in sample.segments],
        "sample": by_segment(kept, samples),
    }
    if algorithm.positive_nll:
        learnt = [sample.trained_tokens * ((sample.reward or 0.0) > 0) for sample in samples]
        each = [float(count > 0) / max(sum(learnt), 1) for count in learnt]
        rows["nll_weight"] = by_segment(each, samples)
    rows |= {name: by_segment([values[i] for i in kept], samples) for name, values in fields.items()}
    if algorithm.observation_nll:
        sequences, rows = with_observations(sequences, rows)
    if ahead_by(algorithm.loss) is not None:
        rows["place"] = [places(sequence) for sequence in sequences]
    return pack_share(sequences, rows, shape, mesh)


def places(sequence: TokenSequence) -> np.ndarray:
    """[n] where the scored tokens lie in what followed the context."""
    mask = sequence.loss_mask
    return np.arange(len(sequence.response)) if mask is None else np.flatnonzero(np.asarray(mask))


def with_observations(
    sequences: Sequence[TokenSequence], rows: Mapping[str, Sequence[Any]]
) -> tuple[list[TokenSequence], dict[str, list[Any]]]:
    """The same with a row for every token between the turns, which is learnt by its likelihood alone.

    Its `observed` is one over the number of such tokens in the mini-batch, 0 on the rows that there were; its
    weight is 0, and its log-probs are NaN: no sum, no mean and no metric of a policy has it.
    """
    masks = [
        np.ones(len(one.response), bool) if one.loss_mask is None else np.asarray(one.loss_mask)
        for one in sequences
    ]
    count = max(sum(int((~mask).sum()) for mask in masks), 1)
    found: dict[str, list[Any]] = {"observed": [np.where(mask, 0.0, 1.0 / count) for mask in masks]}
    for name, values in rows.items():
        found[name] = [
            value if name == "sample" else _among(value, mask, name)
            for value, mask in zip(values, masks, strict=True)
        ]
    return [replace(one, loss_mask=None) for one in sequences], found


def _among(value: Any, mask: np.ndarray, name: str) -> np.ndarray:
    """One number, or one per scored token -> one per token; -1 of numbers that count, and 0 of weights."""
    given = np.asarray(value)
    if given.dtype.kind == "i":
        nothing: float = -1
    else:
        given, nothing = given.astype(np.float64), np.nan if name.endswith("log_prob") else 0.0
    among = np.full(len(mask), nothing, given.dtype)
    among[mask] = given
    return among


def has_loss(sample: Sample, shape: Batching) -> bool:
    """Whether the tokens of a sample are in the loss."""
    return not (shape.overlong_filter and sample.truncated)


def token_sequences(samples: Sequence[Sample]) -> list[TokenSequence]:
    """What is trained on: every segment of every sample, in order; its experts, where there are any."""
    return [
        TokenSequence(segment.context, segment.token_ids, segment.trained, segment.experts)
        for sample in samples
        for segment in sample.segments
    ]


def by_segment(values: Sequence[Any], samples: Sequence[Sample]) -> list[Any]:
    """[N] of one number or [m_i] numbers -> the same for each segment of each sample, in order."""
    return [
        part
        for value, sample in zip(values, samples, strict=True)
        for part in _cut(value, [len(segment.log_probs) for segment in sample.segments])
    ]


def by_sample(values: Sequence[np.ndarray], samples: Sequence[Sample]) -> list[np.ndarray]:
    """What `token_sequences` were scored with, of each segment -> [N] of [m_i]."""
    rest = iter(values)
    parts = [list(islice(rest, len(sample.segments))) for sample in samples]
    return [its[0] if len(its) == 1 else np.concatenate([np.zeros(0, np.float32), *its]) for its in parts]


def sampled_with(sample: Sample, log_probs: np.ndarray) -> Sample:
    """The sample as a policy with these log-probs [m_i] would have sampled it."""
    own = by_segment([log_probs], [sample])
    segments = (replace(s, log_probs=part) for s, part in zip(sample.segments, own, strict=True))
    return replace(sample, segments=tuple(segments))


def _cut(value: Any, lengths: Sequence[int]) -> Sequence[Any]:
    if np.ndim(value) == 0 or len(lengths) == 1:
        return [value] * len(lengths)
    return np.split(np.asarray(value), np.cumsum(lengths)[:-1])


def whole_sequence(sample: Sample) -> list[int]:
    """All that the model saw at the end: the last segment, its context and what followed."""
    last = sample.segments[-1]
    return [*np.asarray(last.context).tolist(), *np.asarray(last.token_ids).tolist()]


def pack_share(
    sequences: Sequence[TokenSequence],
    fields: Mapping[str, Sequence],
    shape: Batching,
    mesh: Mesh,
    *,
    together: int = 1,
) -> list[PackedBatch]:
    """Balance sequences over the replicas by FLOPs, pack this replica's into equally many micro-batches.

    Where prompts are shared, samples of one prompt come into one micro-batch as far as they fit.

    Args:
        together: so many sequences in a row share a micro-batch, in their order; 2 for pairs.
    """
    lengths = padded([len(sequence) for sequence in sequences], shape.align)
    costs, budget = shape.cost(lengths), shape.tokens_per_micro_batch
    if shape.share_prompts and together == 1:
        units = with_one_prompt(sequences, lengths, budget, mesh.layout.data)
        costs = costs - shape.cost(shared_lengths(sequences, units))
    else:
        units = [list(range(i, i + together)) for i in range(0, len(sequences), together)]
    # The budget counts every prompt, shared or not: attention keeps its keys and values for every sample.
    tokens, costs = (np.array([numbers[unit].sum() for unit in units]) for numbers in (lengths, costs))
    multiple = mesh.layout.pipeline if mesh.layout.virtual_pipeline else 1
    bins = micro_batches(tokens, costs, mesh.layout.data, budget, multiple=multiple)
    own = [[i for unit in one for i in units[unit]] for one in bins[mesh.dp_rank]]
    options = {"align": shape.align, "share_prompts": shape.share_prompts}
    return [pack(sequences, one, fields, **options) for one in own]


def align_of(mesh: Mesh, tokens: int = 1) -> int:
    """Packed lengths are multiples of this; `tokens` is precision.token_multiple of the model."""
    layout = mesh.layout
    return packed_multiple(layout.tensor, layout.context, tokens, sequence=layout.sequence)
