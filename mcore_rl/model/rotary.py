"""Rotary frequencies (arXiv 2104.09864), and Llama 3.1's scaled ones (arXiv 2407.21783, section 3.4.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mcore_rl.model.hf.architecture import Architecture, RopeScaling


def rotary_frequencies(arch: Architecture) -> Tensor:
    """[head_dim / 2] float32: radians per position of each pair of channels."""
    exponents = torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim
    frequencies = 1.0 / (arch.rope_theta**exponents)
    return frequencies if arch.rope_scaling is None else scaled(frequencies, arch.rope_scaling)


def scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow pairs `factor` times slower, fast ones as they were, a linear blend in turns per context between.

    Megatron has this formula with the numbers of Llama 3.1 written into it; here they come from config.json.
    """
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return frequencies * ((1 - blend) / scaling.factor + blend)
