"""From groups to micro-batches: order, mini-batches with global counts, packing. No collective.

Every function is pure and every rank calls it with the same gathered batch, so all ranks agree unasked.
N samples of the whole rollout batch, n_i response tokens of sample i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mcore_rl.algo.aggregation import aggregation_weight
from mcore_rl.algo.algorithms import Algorithm
from mcore_rl.data.packing import TokenSequence, micro_batches, pack, padded
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.precision import packed_multiple
from mcore_rl.types import Group, PackedBatch, Sample

PerSample = Sequence[Any] | Mapping[int, Any]
"""sample number -> one number, or [n_i] numbers, one per response token"""


@dataclass(frozen=True)
class RolloutBatch:
    """All samples of one rollout step, the same on every rank."""

    samples: tuple[Sample, ...]
    """[N] in the order of their ids, whoever sampled them"""
    group_ids: tuple[str, ...]
    """[N]"""


def build_batch(groups: Sequence[Group]) -> RolloutBatch:
    """The samples of all replicas, ordered by id."""
    pairs = sorted(
        ((group.id, sample) for group in groups for sample in group.samples), key=lambda p: p[1].id
    )
    return RolloutBatch(tuple(sample for _, sample in pairs), tuple(group_id for group_id, _ in pairs))


@dataclass(frozen=True)
class Shape:
    """How samples become micro-batches; numbers of the run, not of a step."""

    mini_batches: int
    """optimizer steps per pass over the rollout batch"""
    tokens_per_micro_batch: int
    """budget of packed tokens, padding included"""
    max_new_tokens: int
    """response limit, the L_max of sequence-sum-norm aggregation"""
    cost: Callable[[np.ndarray], np.ndarray]
    """[N] tokens -> [N] FLOPs of the model's forward pass"""
    align: int
    """packed lengths are multiples of this"""


def split_mini_batches(samples: int, parts: int, seed: Sequence[int]) -> list[np.ndarray]:
    """Shuffle sample indices and cut them into `parts` mini-batches whose sizes differ by at most one."""
    order = np.random.default_rng(list(seed)).permutation(samples)
    return [np.sort(part) for part in np.array_split(order, parts) if part.size]


def pack_mini_batch(
    batch: RolloutBatch,
    members: np.ndarray,
    algorithm: Algorithm,
    shape: Shape,
    mesh: Mesh,
    fields: Mapping[str, PerSample],
) -> list[PackedBatch]:
    """This replica's micro-batches of one mini-batch; every replica gets equally many.

    Each row carries its `weight` (aggregation weight with the mini-batch's GLOBAL denominators), the server's
    `rollout_log_prob`, the number of its `sample`, `sequence_tokens` (how many of its are scored), and
    `fields`: by name what has an entry for each member.
    """
    samples = [batch.samples[i] for i in members]
    sequences = [token_sequence(sample) for sample in samples]
    scored = torch.tensor([sequence.scored for sequence in sequences], dtype=torch.float64)
    weight = aggregation_weight(
        algorithm.aggregation,
        scored,
        tokens=float(scored.sum()),
        sequences=len(sequences),
        max_length=shape.max_new_tokens,
    )
    rows = {
        "weight": weight.tolist(),
        "sequence_tokens": scored.tolist(),
        "rollout_log_prob": [sample.log_probs for sample in samples],
        "sample": members.tolist(),
    }
    rows |= {name: [values[i] for i in members] for name, values in fields.items()}
    return pack_share(sequences, rows, shape, mesh)


def token_sequence(sample: Sample) -> TokenSequence:
    """What is trained on: the prompt, and every response token scored; its experts, where there are any."""
    return TokenSequence(sample.prompt.token_array, sample.token_ids, experts=sample.experts)


def whole_sequence(sample: Sample) -> list[int]:
    """Prompt and response."""
    return [*sample.prompt.token_ids, *np.asarray(sample.token_ids).tolist()]


def pack_share(
    sequences: Sequence[TokenSequence], fields: Mapping[str, Sequence], shape: Shape, mesh: Mesh
) -> list[PackedBatch]:
    """Balance sequences over the replicas by FLOPs, pack this replica's into equally many micro-batches."""
    lengths = padded([len(sequence) for sequence in sequences], shape.align)
    multiple = mesh.layout.pipeline if mesh.layout.virtual_pipeline else 1
    bins = micro_batches(
        lengths, shape.cost(lengths), mesh.layout.data, shape.tokens_per_micro_batch, multiple=multiple
    )
    return [pack(sequences, one, fields, align=shape.align) for one in bins[mesh.dp_rank]]


def align_of(mesh: Mesh, tokens: int = 1) -> int:
    """Packed lengths are multiples of this; `tokens` is precision.token_multiple of the model."""
    layout = mesh.layout
    return packed_multiple(layout.tensor, layout.context, tokens, sequence=layout.sequence)
