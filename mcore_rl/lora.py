"""Low-rank adapters (LoRA, arXiv 2106.09685): what config, plan and model know of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Literal

Target = Literal["qkv", "proj", "fc1", "fc2", "experts"]
"""matrices that can have an adapter: queries, keys and values; attention's output; gate and up, and down, of
dense and of shared MLPs; all three of every routed expert"""
DENSE_TARGETS: tuple[Target, ...] = ("qkv", "proj", "fc1", "fc2")


@dataclass(frozen=True)
class Lora:
    """Every target matrix W of a frozen model acts as W + scale B A, of which A and B are trained."""

    rank: int
    """rows of A, columns of B"""
    alpha: float
    targets: tuple[Target, ...] = DENSE_TARGETS
    rslora: bool = False
    """the scale is alpha / sqrt(rank) (arXiv 2312.03732) instead of alpha / rank"""
    seed: int = 0
    """of A where training starts; B starts at 0, so that the model is the frozen one"""
    path: Path | None = None
    """directory of an adapter in PEFT's format that training starts from"""

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)
