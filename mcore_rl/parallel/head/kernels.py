"""The row kernels of the head: what is done with logits between their GEMM and the two of the gradient."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch


@cache
def row_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module for logits of that kind: Triton's on a GPU, where it is installed; else torch's.

    Both have `shard_statistics` and `logit_gradient`. Triton is asked for only here, so that nothing imports
    it on a CPU; it computes in float32, so that float64 is torch's on a GPU, too.
    """
    on_gpu = device.type == "cuda" and dtype != torch.float64 and find_spec("triton") is not None
    return import_module(f"{__package__}.{'triton_rows' if on_gpu else 'rows'}")
