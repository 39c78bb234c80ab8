"""Proof at start-up that Megatron leaves the loss's scale alone: a model whose gradient is known.

Megatron's schedule divides a loss by the number of micro-batches and its DDP divides gradients by the ranks,
under conditions that depend on flags and on the version. `step.loss_scale` undoes both. Wrong, it would train
at another learning rate, silently: so each run asks the real schedule, DDP and reduction first.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mcore_rl.errors import NumericsError
from mcore_rl.model import platform, step
from mcore_rl.model.build import Model, TrainedChunk, connect_schedule
from mcore_rl.parallel.mesh import Mesh

_SHARD = 512
"""Parameters per data-parallel rank: the distributed optimizer's buckets then split without padding."""


def check_gradient_scale(model: Model) -> None:
    """Collective: raise NumericsError on every rank unless a known gradient arrives unscaled.

    Args:
        model: trained; its config and DDP settings are probed, its weights are not touched.
    """
    mesh = model.mesh
    num_microbatches = 2 * mesh.layout.pipeline  # what every schedule takes
    chunks = _build(model)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    ranks = mesh.layout.data * mesh.layout.context
    mine = mesh.dp_rank * mesh.layout.context + mesh.cp_rank
    factors = [float(1 + mine + 10 * i) for i in range(num_microbatches)]
    _run(chunks, factors, step.loss_scale(num_microbatches, mesh))
    expected = float(sum(1 + rank + 10 * i for rank in range(ranks) for i in range(num_microbatches)))
    measured = _own_gradients(chunks[-1], mesh) if mesh.is_last_stage else torch.tensor([expected])
    bounds = torch.stack([measured.max(), -measured.min()]).double().cpu()
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=mesh.world)
    largest, smallest = bounds[0].item(), -bounds[1].item()
    if largest != expected or smallest != expected:
        raise NumericsError(
            f"layout {mesh.layout}: a gradient of {expected:g} arrives as {smallest:g} to {largest:g}: this "
            "Megatron-Core scales losses in a way that model/step.py does not undo. No step was taken; use a "
            "supported version and leave calculate_per_token_loss off"
        )


class _Probe(MegatronModule):
    """A pipeline stage that hands zeros on; the last one answers sum(weight) * factor."""

    def __init__(self, config: TransformerConfig, like: torch.nn.Module, ranks: int) -> None:
        super().__init__(config)
        self.pre_process = bool(like.pre_process)
        self.post_process = bool(like.post_process)
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = getattr(like, "vp_stage", None)
        self.share_embeddings_and_output_weights = False
        self.weight = torch.nn.Parameter(torch.ones(ranks * _SHARD, device=platform.device()))
        self.received: Tensor | None = None

    def set_input_tensor(self, tensors: list[Tensor] | Tensor) -> None:
        """What the stage before sent; called by Megatron's schedules."""
        self.received = tensors[0] if isinstance(tensors, list) else tensors

    def forward(self, factor: float) -> Tensor:
        """[8, 1, H] between stages, a scalar from the last."""
        if self.pre_process:
            dtype = self.config.pipeline_dtype or torch.float32
            hidden = torch.zeros(8, 1, self.config.hidden_size, dtype=dtype, device=self.weight.device)
        else:
            assert self.received is not None
            hidden = self.received
        if not self.post_process:
            return hidden + 0 * self.weight.sum().to(hidden.dtype)
        return self.weight.sum() * factor + 0 * hidden.sum()


def _build(model: Model) -> list[TrainedChunk]:
    """Probes in the place of the model's chunks, under its own configuration and DDP settings."""
    config = copy.copy(model.config)
    config.no_sync_func = config.grad_sync_func = config.param_sync_func = None
    ddp = cast(DistributedDataParallel, model.chunks[0]).ddp_config
    ranks = model.mesh.layout.data * model.mesh.layout.context
    chunks = [
        TrainedChunk(config, ddp, _Probe(config, chunk, ranks), disable_bucketing=i > 0)
        for i, chunk in enumerate(model.unwrapped)
    ]
    connect_schedule(config, ddp, chunks)
    return chunks


def _run(chunks: list[TrainedChunk], factors: list[float], scale: int) -> None:
    def forward_step(iterator, chunk):
        def loss(output: Tensor):
            return output * scale, torch.tensor(1), {}

        return chunk(next(iterator)), loss

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(factors) for _ in chunks],
        model=list[torch.nn.Module](chunks),
        num_microbatches=len(factors),
        seq_length=8,
        micro_batch_size=1,
        forward_only=False,
    )


def _own_gradients(chunk: DistributedDataParallel, mesh: Mesh) -> Tensor:
    """The gradients that this rank holds in the end: its shard, where the optimizer is distributed."""
    weight: Any = cast(_Probe, chunk.module).weight
    gradients: Tensor = weight.main_grad
    if not chunk.ddp_config.use_distributed_optimizer:
        return gradients
    rank = dist.get_rank(chunk.dp_cp_group)
    return gradients[rank * _SHARD : (rank + 1) * _SHARD]
