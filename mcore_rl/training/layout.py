"""What a config says of layout, memory, FP8 and adapters in their terms; `plan` needs no Megatron for it."""

from __future__ import annotations

from mcore_rl.config import Config
from mcore_rl.lora import Lora
from mcore_rl.model.hf.architecture import Architecture, read_architecture
from mcore_rl.model.layouts import check_adapters, check_layout, check_layout_of
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


def check_models(config: Config, layout: Layout) -> Architecture:
    """Whether every model of the run can be cut so, by its config.json; returns the trained one's numbers.

    Raises:
        ConfigError: one is no supported model, or its adapters are not.
        LayoutError: one does not divide by the layout; says the number, and which degrees do.
    """
    arch = read_architecture(config.model.path)
    check_layout(arch, layout)
    lora = lora_of(config)
    if lora is not None:
        check_adapters(arch, layout, lora)
    others = {"reward.model": config.reward.model, "critic.path": config.critic.path}
    others |= {f"distill.teachers.{name}": path for name, path in config.distill.teachers.items()}
    for key, path in others.items():
        if path is not None:
            check_layout_of(read_architecture(path), layout, key)
    return arch


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
