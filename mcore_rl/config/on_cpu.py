"""What an optimizer that is in part on the CPU cannot be together with."""

from __future__ import annotations

from collections.abc import Iterator

from mcore_rl.config.sections import ModelConfig, OptimizerConfig
from mcore_rl.config.state import CheckpointConfig, ResidencyConfig


def wrong_on_cpu(
    optimizer: OptimizerConfig, model: ModelConfig, residency: ResidencyConfig, checkpoint: CheckpointConfig
) -> Iterator[str]:
    """`section.key: what, remedy` for what cannot go with optimizer.cpu_fraction above 0."""
    if not optimizer.distributed:
        yield "optimizer.cpu_fraction: it is a distributed optimizer; set optimizer.distributed = true"
    if model.precision == "fp32":
        yield 'optimizer.cpu_fraction: it takes no float32 weights; drop it, or set model.precision = "bf16"'
    if model.precision == "fp8" and model.fp8_param_gather:
        yield (
            "optimizer.cpu_fraction: with model.fp8_param_gather Megatron hands its optimizer on the CPU no "
            "weights to update, and quantizes none afterwards; drop one of them"
        )
    if residency.optimizer != "resident":
        yield "optimizer.cpu_fraction: residency.optimizer moves the same state; drop one of them"
    if checkpoint.every:
        yield (
            "optimizer.cpu_fraction: a checkpoint does not hold what the CPU updates; set "
            'checkpoint.every = 0, or take residency.optimizer = "offloaded" in its place'
        )
