"""Seconds that ranks exchange numbers for, by what travels: the part of a step that no FLOP counts.

Bytes are counted from the layout; the links' rates are their makers', less what collectives leave of them.
Overlap is counted where it is on: gradients of the data-parallel ranks go beside the backward pass, so that
only what exceeds it is waited for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from mcore_rl.data.balance import ModelShape
from mcore_rl.parallel.layout import Layout

NODE = 8
"""GPUs with NVLink between them"""
NVLINK, NETWORK = 300e9, 40e9
"""bytes per second of one GPU in a collective: of 450 GB/s inside a node, and of 400 Gb/s between nodes"""
ITEM = 2
"""bytes of an activation on its way"""


@dataclass(frozen=True)
class Exchanged:
    """Seconds of one forward pass over all tokens, on the rank that has its share of them."""

    tensor: float
    """all-gathers and reduce-scatters (or all-reduces) of two blocks a layer"""
    context: float
    """keys and values of the other ranks, once a layer"""
    expert: float
    """tokens to the experts and back, once a sparse layer"""
    pipeline: float
    """states between stages"""

    @property
    def total(self) -> float:
        """One after the other."""
        return sum(asdict(self).values())


def forward_exchange(shape: ModelShape, layout: Layout, tokens: float) -> Exchanged:
    """What one forward pass exchanges over `tokens` of the whole step."""
    replica_tokens = tokens / layout.data / layout.context  # of a tensor-parallel group
    layers = shape.layers / layout.pipeline
    state = ITEM * shape.hidden
    tensor, context = layout.tensor, layout.context
    # An all-gather and a reduce-scatter of [T, H] around attention, and the same around a dense MLP.
    blocks = 2 if not shape.experts else 1
    around = 2 * blocks * (tensor - 1) / tensor * state * replica_tokens * layers
    keys = 2 * ITEM * shape.kv_heads * shape.head_dim / tensor * (context - 1) * replica_tokens * layers
    routed = replica_tokens / tensor * shape.routed
    peers = layout.expert
    sent = 2 * (peers - 1) / peers * state * routed * layers if shape.experts else 0.0
    between = state * replica_tokens / (tensor if layout.sequence else 1) * (layout.pipeline > 1)
    return Exchanged(
        tensor=around / link(tensor),
        context=keys / link(tensor * context),
        expert=sent / link(max(peers, tensor)),
        pipeline=between / NETWORK,
    )


def link(ranks: int) -> float:
    """Bytes per second between `ranks` that stand next to each other."""
    return NVLINK if ranks <= NODE else NETWORK


def replicas_exchange(parameters: float, layout: Layout) -> float:
    """Gradients in float32 and weights in bf16 of one optimizer step, between the data-parallel ranks."""
    replicas = layout.data * layout.context
    held = parameters / layout.tensor / layout.pipeline / layout.expert
    return (4 + 2) * held * (replicas - 1) / replicas / link(layout.world_size)
