"""The frequencies of rotary embeddings, from what config.json asks for (model.hf.rope)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mcore_rl.model.hf.rope import Linear, Llama3, LongRope, Rotary, Yarn


def turn(x: Tensor, angles: Tensor, *, interleaved: bool, scale: float = 1.0) -> Tensor:
    """x [T, 1, N, R], angles [T, 1, 1, R] of Megatron's table -> the same, its pairs turned and scaled.

    A pair are neighbours where `interleaved`, else one channel of each half; so the table has it.
    """
    cosines, sines = ((f(angles) * scale).to(x.dtype) for f in (torch.cos, torch.sin))
    if interleaved:
        across = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        across = torch.cat((-second, first), dim=-1)
    return x * cosines + across * sines


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
