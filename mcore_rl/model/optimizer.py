"""Megatron's optimizers: the distributed one for training, the plain one for verification; checked steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from mcore_rl.errors import ConfigError, NumericsError
from mcore_rl.model.build import Model
from mcore_rl.model.layouts import DTYPES
from mcore_rl.model.routing import forget_counts, move_biases
from mcore_rl.precision import DEFAULT_FP8, Fp8


def ddp_config(
    *, distributed: bool = True, overlap: bool = False, fp8_param_gather: bool = False
) -> DistributedDataParallelConfig:
    """Megatron DDP: fp32 gradient buffers; `distributed` shards optimizer state over data-parallel ranks.

    Args:
        overlap: gradients are reduced beside the backward pass, and sharded weights gathered beside the next
            forward pass: `Model.gather` must come before anything else that reads them.
    """
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed,
        use_distributed_optimizer=distributed,
        fp8_param_gather=fp8_param_gather,
        average_in_collective=False,  # our loss carries global denominators; see step.loss_scale
    )


@dataclass(frozen=True)
class Optimizer:
    """A Megatron optimizer with its schedule."""

    megatron: MegatronOptimizer
    schedule: OptimizerParamScheduler
    model: Model
    router_bias_rate: float = 0.0
    """what a step moves routers' biases by; see routing.move_biases"""

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return max(float(group["lr"]) for group in self.megatron.param_groups)

    def zero_grad(self) -> None:
        """Before the first micro-batch of a step."""
        for chunk in _trained(self.model):
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()
        if self.router_bias_rate:
            forget_counts(self.model.unwrapped)

    def step(self, *, finite: bool = True) -> float:
        """Clip, update, advance the schedule. Returns the global gradient norm before clipping.

        Args:
            finite: of the loss on this rank.

        Raises:
            NumericsError: on every rank alike, before any weight changes, when the loss of a rank or the
                gradient is not finite.
        """
        found_inf = self.megatron.prepare_grads()
        norm = self.megatron.get_grad_norm()
        bad = torch.tensor([float(found_inf or not math.isfinite(norm)), float(not finite)])
        dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=self.model.mesh.world)
        if bad.any():
            what = f"gradient norm is {norm}" if bad[0] else "the loss is not finite"
            raise NumericsError(f"{what}: no weight was changed")
        self._clip(norm)
        if not self.megatron.step_with_ready_grads():
            raise NumericsError("Megatron's optimizer skipped the update although the gradient is finite")
        for chunk in self.model.gathered_beside:
            if not chunk.remove_forward_pre_hook_handles:
                chunk.enable_forward_pre_hook()
        if self.router_bias_rate:
            move_biases(self.model.unwrapped, self.router_bias_rate)
        self.schedule.step(increment=1)
        return norm

    def _clip(self, norm: float) -> None:
        """What Megatron's own `step` does between the norm, which it would compute again, and the update."""
        for part in getattr(self.megatron, "chained_optimizers", [self.megatron]):
            parameters = part.get_parameters()
            if parameters and part.config.clip_grad > 0:
                apart = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(
                    parameters, part.config.clip_grad, norm, use_decoupled_grad=apart
                )


def _trained(model: Model) -> list[DistributedDataParallel]:
    """The model's chunks in Megatron's DDP, which build wraps around what is trained."""
    return [cast(DistributedDataParallel, chunk) for chunk in model.chunks]


def _learning(chunk: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in chunk.parameters() if parameter.requires_grad]


def _on_cpu(fraction: float) -> dict[str, Any]:
    """Megatron's hybrid optimizer, which asks for the form that keeps its own fp32 weights."""
    if not fraction:
        return {}
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": fraction,
        "use_precision_aware_optimizer": True,
    }


def build_optimizer(
    model: Model,
    *,
    lr: float,
    kind: str = "adam",
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_grad: float = 1.0,
    precision: str = "fp32",
    fp8: Fp8 = DEFAULT_FP8,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    decay: str = "constant",
    distributed: bool = True,
    router_bias_rate: float = 0.0,
    cpu_fraction: float = 0.0,
) -> Optimizer:
    """Megatron's optimizer over all chunks of `model`, whose DDP must agree on `distributed`.

    Args:
        kind: "adam", or "sgd" (momentum 0) for verification.
        decay: "constant", "linear" or "cosine" to 0 over `decay_steps` optimizer steps after `warmup_steps`.
        router_bias_rate: see routing.move_biases; 0 leaves the biases as they are.
        cpu_fraction: share of the parameters whose state is in host memory and whose update the CPU makes.

    Raises:
        ConfigError: some of these are float32, whose update Megatron's hybrid optimizer would leave out.
    """
    if cpu_fraction and any(p.dtype == torch.float32 for chunk in model.unwrapped for p in _learning(chunk)):
        raise ConfigError(
            "optimizer.cpu_fraction: it takes no weights in float32, which value heads have and models of "
            'model.precision = "fp32"; set residency.optimizer = "offloaded" in its place'
        )
    config = OptimizerConfig(
        optimizer=kind,
        lr=lr,
        min_lr=0.0,
        weight_decay=weight_decay,
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_eps=eps,
        sgd_momentum=0.0,
        clip_grad=clip_grad,
        bf16=precision in ("bf16", "fp8"),
        fp8_recipe=fp8.recipe if precision == "fp8" else None,
        params_dtype=DTYPES[precision],
        use_distributed_optimizer=distributed,
        **_on_cpu(cpu_fraction),
    )
    megatron = get_megatron_optimizer(config, cast("list[MegatronModule]", _trained(model)))
    schedule = OptimizerParamScheduler(
        megatron,
        init_lr=lr / (warmup_steps + 1),  # from 0 the first update would have no size
        max_lr=lr,
        min_lr=0.0,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=warmup_steps + max(1, decay_steps or 1),
        lr_decay_style=decay,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return Optimizer(megatron, schedule, model, router_bias_rate)
