"""Routing replay (R3, arXiv 2510.11370): tokens go to the experts that the rollout sent them to.

Megatron's own RouterReplay is a list of all routers of the process, each with a queue of what it is told,
and a mode that the caller switches between passes. Here the experts belong to the micro-batch, like its
positions, and reach a layer with them: recomputation, interleaved stages and a second model need no
bookkeeping.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from mcore_rl.model.hf.experts import Experts


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


def needs_own_router(experts: Experts) -> bool:
    """Whether Megatron's router would choose or weigh otherwise than the model.

    It judges a group by so many scores as a token has experts of it, and divides sigmoids by their sum.
    """
    limited = experts.groups_per_token < experts.groups
    otherwise_judged = limited and experts.per_token // experts.groups_per_token != experts.judged_by
    return otherwise_judged or (experts.sigmoid and not experts.normalized and experts.per_token > 1)


class CountingRouter(TopKRouter):
    """Megatron's router, whose counts of a bias's update leave padding out: it differs between layouts."""

    live: Tensor | None = None
    """[T] bool, of the micro-batch: False for padding; None: there is none"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take what TopKRouter takes."""
        super().__init__(*args, **kwargs)
        if self.enable_expert_bias:
            counts = torch.zeros(self.config.num_moe_experts or 0, dtype=torch.int64)
            self.register_buffer("sent", counts, persistent=False)

    def routing(self, *args: Any, **kwargs: Any) -> Any:
        """Megatron's; its fused kernel would not ask for a replayed choice, and stays out of those passes."""
        fused = self.config.moe_router_fusion
        self.config.moe_router_fusion = fused and self.router_replay is None
        try:
            return super().routing(*args, **kwargs)
        finally:
            self.config.moe_router_fusion = fused

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens [experts] that a pass with gradients sends to each expert; once if recomputed."""
        if self.enable_expert_bias and torch.is_grad_enabled():
            counted = routing_map if self.live is None else routing_map & self.live[:, None]
            self.sent += counted.sum(dim=0)


def forget_counts(chunks: Iterable[torch.nn.Module]) -> None:
    """Before the first micro-batch of an optimizer step."""
    for router in _biased(chunks):
        router.sent.zero_()


def move_biases(chunks: Iterable[torch.nn.Module], rate: float) -> None:
    """Add `rate` to the bias of every expert that got fewer tokens than the mean, take it from one with more.

    Tokens are those of the whole optimizer step on all ranks (arXiv 2408.15664, algorithm 1); collective.
    """
    group: Any = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    for router in _biased(chunks):
        dist.all_reduce(router.sent, group=group)
        router.expert_bias += rate * torch.sign(router.sent.sum() - router.sent * router.sent.numel())


def _biased(chunks: Iterable[torch.nn.Module]) -> list[Any]:
    modules = (module for chunk in chunks for module in chunk.modules())
    return [one for one in modules if isinstance(one, CountingRouter) and one.enable_expert_bias]


class GroupRouter(CountingRouter):
    """Megatron's router with the choice of DeepSeek-V2 and V3 written out (arXiv 2405.04434, 2412.19437)."""

    def __init__(self, *args: Any, experts: Experts, **kwargs: Any) -> None:
        """Take what TopKRouter takes."""
        super().__init__(*args, **kwargs)
        self.experts = experts

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [..., experts] -> weights and choice [T, experts]."""
        logits = logits.view(-1, self.experts.count)
        scores = logits.sigmoid() if self.experts.sigmoid else logits.softmax(dim=-1)
        chosen = self._choose(scores.detach())
        weights = scores.gather(1, chosen)
        if self.experts.normalized:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        weights = weights * self.experts.scale
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True)
        self._apply_expert_bias(routing_map, padding_mask=padding_mask)
        return torch.zeros_like(logits).scatter(1, chosen, weights), routing_map

    def _choose(self, scores: Tensor) -> Tensor:
        """Scores [T, experts] -> experts [T, K], of the best groups only; the replayed ones where told."""
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        grouped = scores.view(len(scores), self.experts.groups, -1)
        best = grouped.topk(self.experts.judged_by, dim=-1).values.sum(dim=-1)
        groups = best.topk(self.experts.groups_per_token, dim=-1).indices
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(1, groups, True)
        scores = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
        own = scores.topk(self.experts.per_token, dim=-1).indices
        replayed: Any = self.router_replay
        return own if replayed is None else torch.where(replayed.experts < 0, own, replayed.experts)


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
        """Run the layer as TransformerLayer does; `packed_seq_params` is a packed_layout.PackedLayout."""
        experts: Tensor | None = packed_seq_params.experts
        mlp: Any = self.mlp
        router = mlp.router
        router.live = packed_seq_params.live
        if experts is not None:
            router.router_replay = Replayed(experts[:, self.layer_number - 1].long())
        try:
            return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
        finally:
            router.router_replay = None
