"""What must be set before Megatron-Core is imported; the packages that import it import this module first.

Megatron-Core decorates its fused functions with `torch.compile` while it is imported. That alone loads
TorchInductor, some two CPU-seconds in every process, and the portable layers never call what it compiles. So
these stay plain functions on a machine without CUDA.

Megatron-Core also imports W&B and TensorBoard, a third and a sixth of a CPU-second, to know whether they are
there, and nothing that a rank does asks them. It is told no; what sends a run's metrics imports them as ever.

Libraries also warn, on every rank, of what only their own developers can change; these warnings are filtered.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

QUIET = (
    ".*Apex.* not installed.*",
    "Apex is not installed.*",
    "full scope is deprecated",
    # model.platform sets what this asks for
    "When using (async grad allreduce|sequence parallelism) it is recommended",
    # collectives that Megatron-Core calls have new names in newer torch
    "`torch.distributed.(reduce_scatter|all_gather_into)_tensor` is deprecated",
)
"""warnings of Megatron-Core about optional packages, unset fields and deprecated names"""

_compile = torch.compile


def compile_unless_megatron(model: Any = None, **options: Any) -> Any:
    """`torch.compile`, except that without CUDA a function of Megatron-Core is returned as it is."""
    if getattr(model, "__module__", "").startswith("megatron.core") and not torch.cuda.is_available():
        return model
    return _compile(model, **options)


_TRACKERS = ("wandb", "torch.utils.tensorboard")


class NoTracker:
    """The finder that answers where Megatron-Core imports a tracker, and no other import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raises ModuleNotFoundError where a module of Megatron-Core asks for a tracker."""
        if name not in _TRACKERS:
            return None
        asking = sys._getframe(1)
        while asking.f_back is not None and asking.f_globals.get("__name__", "").startswith("importlib."):
            asking = asking.f_back
        if asking.f_globals.get("__name__", "").startswith("megatron.core"):
            raise ModuleNotFoundError(f"Megatron-Core does without {name} here", name=name)
        return None


def _filter_warnings() -> None:
    for text in QUIET:
        warnings.filterwarnings("ignore", message=text)
    # Its optimizer looks for a gradient on parameters that are views of one buffer.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", module="megatron.core.optimizer")


torch.compile = compile_unless_megatron
sys.meta_path.insert(0, NoTracker())
_filter_warnings()
