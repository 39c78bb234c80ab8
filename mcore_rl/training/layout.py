"""What a config says of layout, memory, FP8 and adapters in their terms; `plan` needs no Megatron for it."""

from __future__ import annotations

from mcore_rl.config import Config
from mcore_rl.lora import Lora
from mcore_rl.parallel.layout import Layout
from mcore_rl.precision import Fp8
from mcore_rl.tuning import Tuning


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


def tuning_of(config: Config, *, trained: bool) -> Tuning:
    """What [train] and [parallel] say of time and memory; a frozen model keeps no activations."""
    t, dispatcher = config.train, config.parallel.dispatcher
    if not trained:
        return Tuning(dispatcher=dispatcher)
    return Tuning(t.recompute, t.recompute_modules, t.offload_modules, dispatcher)


def lora_of(config: Config) -> Lora | None:
    """What [lora] asks for; None where the weights themselves are trained."""
    o = config.lora
    return Lora(o.rank, o.alpha, o.targets, o.rslora, o.seed, o.path) if o.rank else None
