"""Weights in FP8 for rollout servers: e4m3 in blocks of 128 x 128 (arXiv 2412.19437, section 3.3).

The form that DeepSeek-V3 and Qwen3's FP8 models are published in, which SGLang reads: `weight` in e4m3 and
`weight_scale_inv` [ceil(rows / 128), ceil(columns / 128)] in float32, the last blocks cut by the edge.
Quantized are the matrices of attention, MLP and experts, not embedding, lm_head, norms, routers and biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mcore_rl.errors import NumericsError

BLOCK = 128
LARGEST = 448.0
"""of e4m3"""
SCALE = "_scale_inv"
"""what a scale's name ends with, after that of its weight"""
_QUANTIZED = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))
_SMALLEST = torch.finfo(torch.float32).tiny
"""scale of a block of zeros, or of numbers so small that theirs would not be a normal number"""


def is_quantized(name: str) -> bool:
    """Whether the HF tensor `name` is written in FP8."""
    return name.endswith(_QUANTIZED)


def quantize_blocks(name: str, weight: Tensor) -> dict[str, Tensor]:
    """[rows, columns] -> the e4m3 weight and its scales by name, on the same device.

    Off by at most max(|w| / 16, scale / 1024): half the distance of e4m3 numbers, which have 3 bits behind
    the leading one and end at steps of 2^-9.

    Raises:
        NumericsError: a weight is not finite.
    """
    wide = weight.float()
    rows, columns = wide.shape
    grid = (ceil(rows / BLOCK), ceil(columns / BLOCK))
    padded = F.pad(wide, (0, grid[1] * BLOCK - columns, 0, grid[0] * BLOCK - rows))
    blocks = padded.view(grid[0], BLOCK, grid[1], BLOCK)
    scale = (blocks.abs().amax(dim=(1, 3)) / LARGEST).clamp(min=_SMALLEST)
    if not scale.isfinite().all():
        raise NumericsError(f"{name} is not finite and cannot be written in FP8; no file was written")
    scaled = (blocks / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).view(padded.shape)
    return {name: scaled[:rows, :columns].to(torch.float8_e4m3fn), name + SCALE: scale}


def dequantize_blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """[rows, columns] in float32, by the scales of its blocks."""
    rows, columns = weight.shape
    spread = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight.float() * spread


def quantized_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Of every tensor of the quantized model, from those of the model."""
    scales = {
        name + SCALE: tuple(ceil(side / BLOCK) for side in shape)
        for name, shape in shapes.items()
        if is_quantized(name)
    }
    return {**shapes, **scales}


def quantization_config(names: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of it; `names` are the model's HF tensors."""
    routers = sorted(name.removesuffix(".weight") for name in names if name.endswith(".mlp.gate.weight"))
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", *routers],
    }
