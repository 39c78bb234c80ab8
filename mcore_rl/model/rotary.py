"""The frequencies of rotary embeddings, from what config.json asks for (model.hf.rope)."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from mcore_rl.model.hf.rope import Linear, Llama3, LongRope, Rotary, Yarn


def turn(x: Tensor, angles: Tensor, *, interleaved: bool, scale: float = 1.0) -> Tensor:
    """x [T, 1, N, R], angles [T, 1, 1, R] of Megatron's table -> the same, its pairs turned and scaled.

    A pair are neighbours where `interleaved`, else one channel of each half; so the table has it.
    """
    return cast(Tensor, _Turn.apply(x, *_cosines_sines(angles, x.dtype, scale), interleaved))


def _cosines_sines(angles: Tensor, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
    """The two of angles, times `scale`; kept with them, as every layer asks for the same."""
    known: dict[tuple[torch.dtype, float], tuple[Tensor, Tensor]] = vars(angles).setdefault("_turns", {})
    if (dtype, scale) not in known:
        known[dtype, scale] = tuple((f(angles) * scale).to(dtype) for f in (torch.cos, torch.sin))  # pyright: ignore[reportArgumentType]
    return known[dtype, scale]


class _Turn(torch.autograd.Function):
    """A pair (a, b) becomes (a cos - b sin, b cos + a sin), its gradient is turned back; x is not kept."""

    @staticmethod
    def forward(ctx, x: Tensor, cosines: Tensor, sines: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        ctx.interleaved = interleaved
        out = x * cosines
        (first, second), (a, b), (sin_a, sin_b) = (_pairs(one, interleaved) for one in (out, x, sines))
        first.sub_(b * sin_a)
        second.add_(a * sin_b)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        cosines, sines = ctx.saved_tensors
        out = grad * cosines
        (first, second), (a, b), (sin_a, sin_b) = (_pairs(one, ctx.interleaved) for one in (out, grad, sines))
        first.add_(b * sin_b)
        second.sub_(a * sin_a)
        return out, None, None, None


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and the second of all pairs."""
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def rotary_frequencies(rotary: Rotary) -> Tensor:
    """[channels / 2] float32: radians per position of each pair of channels (arXiv 2104.09864)."""
    exponents = torch.arange(0, rotary.channels, 2, dtype=torch.float32) / rotary.channels
    frequencies = 1.0 / (rotary.theta**exponents)
    match rotary.scaling:
        case Llama3() as scaling:
            return _llama3(frequencies, scaling)
        case Linear(factor):
            return frequencies / factor
        case Yarn() as scaling:
            return _yarn(frequencies, scaling, rotary)
        case LongRope(divisors):
            return 1.0 / (torch.tensor(divisors) * rotary.theta**exponents)
        case None:
            return frequencies


def rotary_table(positions: Tensor, frequencies: Tensor) -> Tensor:
    """[T] positions and [channels / 2] -> [T, 1, 1, channels] angles, halves of a head against each other."""
    angles = torch.outer(positions.to(frequencies.dtype), frequencies)
    return torch.cat((angles, angles), dim=-1)[:, None, None]


def _llama3(frequencies: Tensor, scaling: Llama3) -> Tensor:
    """Slow pairs `factor` times slower, fast ones as they were, a linear blend in turns per context between.

    Source: arXiv 2407.21783 section 3.4.1. Megatron has this formula with the numbers of Llama 3.1 written
    into it; here they come from config.json.
    """
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return frequencies * ((1 - blend) / scaling.factor + blend)


def _yarn(frequencies: Tensor, scaling: Yarn, rotary: Rotary) -> Tensor:
    """Slow pairs `factor` times slower, fast ones as they were, a linear blend in their number between.

    Source: arXiv 2309.00071 section 3.2, in the form of transformers: the bounds are numbers of pairs.
    """

    def pair(turns: float) -> float:
        wavelengths = scaling.original_positions / (turns * 2 * math.pi)
        return rotary.channels * math.log(wavelengths) / (2 * math.log(rotary.theta))

    low, high = pair(scaling.fast), pair(scaling.slow)
    if scaling.whole_pairs:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.channels - 1)
    pairs = torch.arange(len(frequencies), dtype=torch.float32)
    stretched = ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)
