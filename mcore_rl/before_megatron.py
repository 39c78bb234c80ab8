"""What must be set before Megatron-Core is imported; the packages that import it import this module first.

Megatron-Core decorates its fused functions with `torch.compile` while it is imported. That alone loads
TorchInductor, some two CPU-seconds in every process, and the portable layers never call what it compiles. So
these stay plain functions on a machine without CUDA.

Libraries also warn, on every rank, of what only their own developers can change; these warnings are filtered.
"""

from __future__ import annotations

import warnings
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


def _filter_warnings() -> None:
    for text in QUIET:
        warnings.filterwarnings("ignore", message=text)
    # Its optimizer looks for a gradient on parameters that are views of one buffer.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", module="megatron.core.optimizer")


torch.compile = compile_unless_megatron
_filter_warnings()
