"""What this machine can run, of precisions and updates; what it cannot is refused, with the remedy."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from mcore_rl.errors import ConfigError
from mcore_rl.precision import RECIPES

_REMEDY = 'set model.precision = "bf16"'
NEEDS_ENGINE = (
    'model.precision = "fp8" needs Transformer Engine, which is not installed: tools/gpu_machine.sh '
    f"installs it; or {_REMEDY}"
)


def check_precision(precision: str, recipe: str = "blockwise") -> None:
    """Raise ConfigError where `precision` cannot run on this machine."""
    if precision == "fp8":
        check_fp8(recipe)


def check_fp8(recipe: str) -> None:
    """Raise ConfigError where Transformer Engine cannot run `recipe` on this machine."""
    if not torch.cuda.is_available():
        raise ConfigError(
            f'model.precision = "fp8" needs a GPU, and this machine has none; {_REMEDY}, '
            "or try the code here with --rehearse"
        )
    capability, needed = torch.cuda.get_device_capability(), RECIPES[recipe]
    if capability < needed.capability:
        able = [name for name, other in RECIPES.items() if capability >= other.capability]
        remedy = f'set it to "{able[-1]}"' if able else _REMEDY
        raise ConfigError(
            f'model.fp8_recipe = "{recipe}" needs {needed.gpus}, and {torch.cuda.get_device_name()} has '
            f"capability {capability[0]}.{capability[1]}; {remedy}"
        )
    if not engine_is_importable():
        raise ConfigError(NEEDS_ENGINE)


def check_cpu_fraction(fraction: float) -> None:
    """Raise ConfigError where Megatron's optimizer cannot leave a share of the update to the CPU."""
    remedy = 'drop it, or set residency.optimizer = "offloaded" in its place'
    if fraction and not torch.cuda.is_available():
        raise ConfigError(
            f"optimizer.cpu_fraction = {fraction}: it moves parameters from a GPU, and this machine has "
            f"none; {remedy}"
        )
    if fraction and not engine_is_importable():
        raise ConfigError(
            f"optimizer.cpu_fraction = {fraction}: Megatron-Core asks Transformer Engine for its version, "
            f"and it is not installed: tools/gpu_machine.sh installs it; or {remedy}"
        )


def takes_transformer_engine(dtype: torch.dtype) -> bool:
    """Whether layers of `dtype` are Transformer Engine's here; float32 stays portable, to compare with."""
    return dtype == torch.bfloat16 and torch.cuda.is_available() and engine_is_importable()


def engine_is_importable() -> bool:
    """Transformer Engine is installed."""
    return find_spec("transformer_engine") is not None
