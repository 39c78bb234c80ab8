"""Weights in FP8 with a scale for each block of 128 x 128, as DeepSeek-V3 and its kin are published.

`NAME` is in e4m3, and `NAME_scale_inv` [ceil(rows / 128), ceil(columns / 128)] is what the numbers of a block
are multiplied by (arXiv 2412.19437, section 3.3). Tensors are multiplied out as they are read, one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Any

from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.fields import shown
from mcore_rl.model.hf.stored import BLOCK, StoredTensor
from mcore_rl.terminal import listed

SCALE = "_scale_inv"
"""what a scale's name ends with, after that of its weight"""
_E4M3 = "F8_E4M3"
_ONLY: Mapping[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
    "activation_scheme": "dynamic",
}
"""fields of quantization_config with the only value that is read; `fmt` may be absent"""
_HARMLESS = {"modules_to_not_convert", "ignored_layers", "scale_fmt", "dequantize"}
"""fields that do not change what the tensors of the files mean"""
_READ_AS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""dtype of config.json -> type in safetensors"""


def read_quantized(hf: Mapping[str, Any], where: str) -> str | None:
    """The type that weights in FP8 become, that of config.json; None where none are quantized.

    Raises:
        ConfigError: `quantization_config` tells of another form.
    """
    told = hf.get("quantization_config")
    if told is None or told.get("quant_method") == "mxfp4":  # which model.hf.mxfp4 reads
        return None
    other = {
        name for name, value in _ONLY.items() if told.get(name, "e4m3" if name == "fmt" else None) != value
    }
    other |= told.keys() - _ONLY.keys() - _HARMLESS
    if other:
        parts = {name: told.get(name) for name in sorted(other)}
        raise ConfigError(
            f"{where}: quantization_config = {shown(parts)} is not supported, only FP8 (e4m3) in blocks of "
            f"{BLOCK} x {BLOCK}, and mxfp4; take the weights in bfloat16"
        )
    return _READ_AS.get(hf.get("dtype") or hf.get("torch_dtype") or "float32", "F32")


def multiplied_out(stored: Mapping[str, StoredTensor], kind: str, where: str) -> dict[str, StoredTensor]:
    """The tensors of a directory with each scale beside its weight, which reads as `kind`.

    Raises:
        ConfigError: a scale has no weight in FP8, a weight has none, or their shapes do not fit.
    """
    scales = {name.removesuffix(SCALE): tensor for name, tensor in stored.items() if name.endswith(SCALE)}
    whole = {name: tensor for name, tensor in stored.items() if not name.endswith(SCALE)}
    quantized = {name for name, tensor in whole.items() if tensor.type == _E4M3}
    if alone := sorted(quantized ^ scales.keys()):
        raise ConfigError(
            f"{where}: {listed(alone)}: no {SCALE} beside a weight in FP8, or one beside none; fetch the "
            "published files again"
        )
    for name, scale in scales.items():
        grid = tuple(ceil(side / BLOCK) for side in whole[name].shape)
        if scale.shape != grid or scale.type not in ("F32", "BF16"):
            raise ConfigError(
                f"{where}: {name}{SCALE} has shape {scale.shape} and type {scale.type}, expected {grid} in "
                "F32 or BF16; fetch the published files again"
            )
    return {
        name: replace(tensor, type=kind, scale=scales[name]) if name in scales else tensor
        for name, tensor in whole.items()
    }
