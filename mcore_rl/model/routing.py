"""Routing replay (R3, arXiv 2510.11370): tokens go to the experts that the rollout sent them to.

Megatron's own RouterReplay is a list of all routers of the process, each with a queue of what it is told,
and a mode that the caller switches between passes. Here the experts belong to the micro-batch, like its
positions, and reach a layer with them: recomputation, interleaved stages and a second model need no
bookkeeping.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn


class Replayed:
    """The choice of experts, in the form that Megatron asks its RouterReplay in (0.16.1 and 0.19.2)."""

    def __init__(self, experts: Tensor) -> None:
        """experts [T, K] int64, different ones for a token; -1 where the router shall choose itself."""
        self.experts = experts

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: Any, group_topk: Any, compute_topk: Any
    ) -> tuple[Tensor, Tensor]:
        """Scores [T, experts] -> (scores [T, K] of the chosen experts, the experts [T, K]).

        The scores are the router's present ones, so that its gradient is that of the replayed choice.
        """
        with torch.no_grad():
            _, own = compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
            chosen = torch.where(self.experts < 0, own, self.experts)
        return scores.gather(1, chosen), chosen


class ReplayedLayer(TransformerLayer):
    """A layer with experts whose router takes the choice that comes with the micro-batch, if there is one."""

    def __init__(self, *args: Any, router_bias: bool, **kwargs: Any) -> None:
        """`router_bias`: one is added to the logits; Megatron ties it to the biases of all other layers."""
        super().__init__(*args, **kwargs)
        if router_bias:
            mlp: Any = self.mlp
            bias: Any = nn.Parameter(torch.zeros_like(mlp.router.weight[:, 0]))
            # Summed over the tensor-parallel ranks: each routes its part of the sequence.
            bias.sequence_parallel = self.config.sequence_parallel
            mlp.router.bias = bias

    def forward(self, *args, packed_seq_params: Any, **kwargs) -> Any:
        """Run the layer as TransformerLayer does; `packed_seq_params` is a portable.PackedLayout."""
        experts: Tensor | None = packed_seq_params.experts
        mlp: Any = self.mlp
        router = mlp.router
        if experts is not None:
            router.router_replay = Replayed(experts[:, self.layer_number - 1].long())
        try:
            return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
        finally:
            router.router_replay = None
