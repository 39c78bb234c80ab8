"""What the servers get of the trainer's weights: the HF tensors as they are, or their matrices in FP8.

An encoding says what every HF tensor becomes, and makes it. It is the only place to change in order to
publish another form: a cast is an encoding of one method. Every transport, and the conversion to HF, asks
it.

FP8 is e4m3 in blocks of 128 x 128 (arXiv 2412.19437, section 3.3), the form that DeepSeek-V3 and Qwen3's FP8
models are published in, which SGLang reads: `weight` in e4m3 and `weight_scale_inv` [ceil(rows / 128),
ceil(columns / 128)] in float32, the last blocks cut by the edge. Which tensors are in FP8 is a property of
their rule (model/hf/parameters.py): the matrices of attention, MLP and experts are; embedding, lm_head,
norms, routers and biases are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mcore_rl.errors import ConfigError, NumericsError
from mcore_rl.model.hf.architecture import Architecture
from mcore_rl.model.hf.blocks import SCALE
from mcore_rl.model.hf.files import EMBEDDING
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.model.hf.stacked import Form, whole_of
from mcore_rl.model.hf.stored import BLOCK
from mcore_rl.model.hf.tables import Rule, is_stacked

LARGEST = 448.0
"""largest number of e4m3"""
_SMALLEST = torch.finfo(torch.float32).tiny
"""scale of a block of zeros, or of numbers so small that theirs would not be a normal number"""
_ELEMENTS_AT_ONCE = 1 << 22
"""numbers of a matrix that are rounded in one go: bounds the float32 copies that the rounding takes"""


class Encoding(Protocol):
    """What an HF tensor becomes before it leaves the trainer."""

    def forms(self, rule: Rule, name: str, form: Form) -> dict[str, Form]:
        """Names, shapes and types of what the HF tensor `name` of this rule becomes.

        Args:
            form: its shape, and its type in the trainer.

        Where that is one tensor of the same shape, shards are copied into it, and rounded to its type.
        """
        ...

    def encode(self, name: str, whole: Tensor, out: Mapping[str, Tensor]) -> None:
        """Fill `out`, which `forms` has named, from the whole HF tensor; asked where a copy is not enough.

        Raises:
            NumericsError: a number cannot be encoded.
        """
        ...

    def config(self, mapping: ParameterMap) -> dict[str, Any] | None:
        """The value of `quantization_config` in config.json, if it needs one."""
        ...


class PlainEncoding:
    """The trainer's own numbers in the trainer's own types."""

    def forms(self, rule: Rule, name: str, form: Form) -> dict[str, Form]:
        """The tensor itself."""
        return {name: form}

    def encode(self, name: str, whole: Tensor, out: Mapping[str, Tensor]) -> None:
        """Copy."""
        out[name].copy_(whole)

    def config(self, mapping: ParameterMap) -> dict[str, Any] | None:
        """Nothing to say."""
        return None


class Fp8Encoding(PlainEncoding):
    """Matrices in e4m3 with a scale for each block of 128 x 128; everything else as it is."""

    def forms(self, rule: Rule, name: str, form: Form) -> dict[str, Form]:
        """The e4m3 weight and its scales where the rule says FP8."""
        if not rule.fp8:
            return {name: form}
        shape, _ = form
        scales = tuple(ceil(side / BLOCK) for side in shape)
        return {name: (shape, torch.float8_e4m3fn), name + SCALE: (scales, torch.float32)}

    def encode(self, name: str, whole: Tensor, out: Mapping[str, Tensor]) -> None:
        """Round block by block; raises NumericsError where a weight is not finite."""
        if name + SCALE in out:
            quantize_blocks(name, whole, out[name], out[name + SCALE])
        else:
            super().encode(name, whole, out)

    def config(self, mapping: ParameterMap) -> dict[str, Any] | None:
        """The form of the weights, for SGLang and transformers, and which linear layers do not have it."""
        others = sorted(
            {
                whole_of(name).removesuffix(".weight")
                for entry in mapping.entries()
                for name, shape in zip(entry.hf, mapping.shapes(entry.rule), strict=True)
                if name != EMBEDDING and len(shape) == 2 and not entry.rule.fp8
            }
            | {"lm_head"}
        )
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": others,
        }


PLAIN, FP8 = PlainEncoding(), Fp8Encoding()
ENCODINGS: dict[str, Encoding] = {"none": PLAIN, "fp8": FP8}
"""publish.quantize, and --quantize of the conversion -> encoding"""


def check_encoding(arch: Architecture, quantize: str, key: str) -> None:
    """Raises ConfigError where `quantize`, the value of `key`, has no form for the model's tensors."""
    if quantize != "none" and is_stacked(arch):
        raise ConfigError(
            f"{key} = {quantize!r} is not supported with {arch.family!r}: no server reads its experts in "
            f"that form; leave {key} out"
        )


def encoded_forms(
    mapping: ParameterMap, encoding: Encoding, types: torch.dtype | Mapping[str, torch.dtype]
) -> dict[str, Form]:
    """Every tensor of the encoded model in the order of the table.

    Args:
        types: of the model's HF tensors by name, or the one that all have.
    """
    return {
        key: form
        for entry in mapping.entries()
        for name, shape in zip(entry.hf, mapping.shapes(entry.rule), strict=True)
        for key, form in encoding.forms(
            entry.rule, name, (shape, types if isinstance(types, torch.dtype) else types[name])
        ).items()
    }


def quantize_blocks(name: str, weight: Tensor, out: Tensor, scale: Tensor) -> None:
    """Round `weight` [rows, columns] to `out` in e4m3 and `scale` [blocks, blocks], a few rows at a time.

    The error of a weight is at most max(|w| / 16, scale / 1024): half the distance of e4m3 numbers, which
    have 3 bits behind the leading one and end at steps of 2^-9.

    Raises:
        NumericsError: a weight is not finite.
    """
    rows, columns = weight.shape
    stride = max(1, _ELEMENTS_AT_ONCE // (columns * BLOCK)) * BLOCK
    for begin in range(0, rows, stride):
        end = min(begin + stride, rows)
        scales = scale[begin // BLOCK : ceil(end / BLOCK)]
        _quantize(weight[begin:end], out[begin:end], scales)
        if not scales.isfinite().all():
            raise NumericsError(f"{name} is not finite and cannot be written in FP8; nothing was published")


def _quantize(weight: Tensor, out: Tensor, scale: Tensor) -> None:
    (rows, columns), grid = weight.shape, scale.shape
    padded = F.pad(weight.float(), (0, grid[1] * BLOCK - columns, 0, grid[0] * BLOCK - rows))
    blocks = padded.view(grid[0], BLOCK, grid[1], BLOCK)
    scale.copy_((blocks.abs().amax(dim=(1, 3)) / LARGEST).clamp(min=_SMALLEST))
    scaled = (blocks / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).view(padded.shape)
    out.copy_(scaled[:rows, :columns])
