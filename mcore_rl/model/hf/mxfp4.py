"""Reads experts that are stored in MXFP4 (OCP Microscaling Formats v1.0, section 5): gpt-oss as published.

A tensor NAME of [experts, columns, rows] lies in the files as NAME_blocks, uint8 [experts, rows, blocks, 16],
and NAME_scales, uint8 [experts, rows, blocks]: 32 numbers of a row are a block, two in a byte, the first one
in its low half; each is a number of 4 bits times 2 to the power of the block's scale less 127.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.stacked import piece
from mcore_rl.model.hf.stored import StoredTensor

BLOCKS, SCALES = "_blocks", "_scales"
_BIAS = 127
_HALF = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
NUMBERS = torch.cat([_HALF, -_HALF])
"""[16] the numbers of 4 bits: a sign, two bits of exponent, one of mantissa"""


@dataclass(frozen=True)
class Mxfp4Piece(StoredTensor):
    """What a stacked tensor has of one expert; `name`, `file` and `part` are those of its blocks."""

    scales: StoredTensor | None = None

    def read(self) -> Tensor:
        """[columns, rows] in bfloat16, which holds every such number exactly unless it overflows."""
        assert self.scales is not None
        return dequantized(super().read(), self.scales.read()).t()


def dequantized(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks uint8 [rows, n, 16] and scales uint8 [rows, n] -> [rows, 32 n] in bfloat16."""
    halves = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    exponents = scales.to(torch.int32)[..., None] - _BIAS
    return torch.ldexp(NUMBERS[halves.long()], exponents).flatten(-2).bfloat16()


def pieces_of(whole: str, blocks: StoredTensor, scales: StoredTensor) -> Iterator[tuple[str, StoredTensor]]:
    """(name, where it lies) of every expert's piece of the stacked tensor `whole`.

    Raises:
        ConfigError: blocks and scales are no such pair.
    """
    shape = blocks.shape
    fits = len(shape) == 4 and shape[3] == 16 and scales.shape == shape[:3]
    if not fits or {blocks.type, scales.type} != {"U8"}:
        raise ConfigError(
            f"{blocks.file}: {blocks.name} {blocks.type} {list(shape)} and {scales.name} {scales.type} "
            f"{list(scales.shape)} are no MXFP4 tensor; fetch the file again"
        )
    for number in range(shape[0]):
        of_scales = StoredTensor(scales.file, scales.name, scales.shape[1:], scales.type, (number,))
        form = (32 * shape[2], shape[1])
        yield (
            piece(whole, number),
            Mxfp4Piece(blocks.file, blocks.name, form, "BF16", (number,), scales=of_scales),
        )


def take_quantized(stored: dict[str, StoredTensor], stacked: frozenset[str]) -> None:
    """Put the pieces of `stacked` tensors in the place of their blocks and scales, where these are stored."""
    for whole in stacked:
        names = whole + BLOCKS, whole + SCALES
        if all(name in stored for name in names):
            blocks, scales = (stored.pop(name) for name in names)
            stored |= dict(pieces_of(whole, blocks, scales))
