"""Megatron-Core's fused functions stay plain functions on a machine without CUDA.

Megatron-Core decorates them with `torch.compile` while it is imported. That alone loads TorchInductor, some
two CPU-seconds in every process, and the portable layers never call the compiled functions. The packages that
import Megatron-Core import this module first.
"""

from __future__ import annotations

from typing import Any

import torch

_compile = torch.compile


def compile_unless_megatron(model: Any = None, **options: Any) -> Any:
    """`torch.compile`, except that without CUDA a function of Megatron-Core is returned as it is."""
    if getattr(model, "__module__", "").startswith("megatron.core") and not torch.cuda.is_available():
        return model
    return _compile(model, **options)


torch.compile = compile_unless_megatron
