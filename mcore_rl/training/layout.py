"""What a config says of layout and FP8, in their own terms; `plan` asks too, without Megatron-Core."""

from __future__ import annotations

from mcore_rl.config import Config
from mcore_rl.parallel.layout import Layout
from mcore_rl.precision import Fp8


def layout_of(config: Config, world_size: int) -> Layout:
    """The layout that [parallel] asks for; `data` unset takes what the world size leaves."""
    p = config.parallel
    replica = p.tensor * p.pipeline * p.context
    return Layout(
        tensor=p.tensor,
        sequence=p.sequence,
        pipeline=p.pipeline,
        virtual_pipeline=p.virtual_pipeline,
        context=p.context,
        expert=p.expert,
        data=p.data or max(1, world_size // replica),
    )


def fp8_of(config: Config) -> Fp8:
    """What [model] says of FP8."""
    m = config.model
    return Fp8(m.fp8_recipe, m.fp8_param_gather, m.fp8_first_last_bf16)
