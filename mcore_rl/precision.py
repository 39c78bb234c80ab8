"""Precisions and FP8 recipes: what config, plan and model know of them, in one table.

FP8 is that of Transformer Engine (arXiv 2209.05433): the GEMMs of the layers take e4m3 weights and
activations and e5m2 gradients. The lm_head, norms and routers stay in bf16 or fp32, main gradients in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm, sqrt
from typing import Literal, NamedTuple

PrecisionName = Literal["fp32", "bf16", "fp8"]
RecipeName = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]

ITEM_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp8": 2}
"""precision -> bytes of a parameter, or of an activation outside the FP8 GEMMs; fp64 is for verification"""


@dataclass(frozen=True)
class Recipe:
    """How Transformer Engine scales a tensor before it rounds it to FP8."""

    capability: tuple[int, int]
    """CUDA compute capability of the first GPUs that run it"""
    gpus: str
    """the same, by name"""
    tokens: int
    """a rank's tokens are a multiple of this: a GEMM over tokens takes no other"""
    remembers: bool = False
    """scales follow from earlier steps, which the modules keep as state"""


RECIPES: dict[str, Recipe] = {
    "delayed": Recipe((8, 9), "Ada, Hopper or newer", 16, remembers=True),
    "tensorwise": Recipe((8, 9), "Ada, Hopper or newer", 16),
    "blockwise": Recipe((9, 0), "Hopper or newer", 16),
    "mxfp8": Recipe((10, 0), "Blackwell or newer", 32),
}
"""a scale per tensor by its history; one per tensor; per 128 x 128 (weights) or 1 x 128; per 1 x 32"""


@dataclass(frozen=True)
class Fp8:
    """What of FP8 a run chooses; without effect at any other precision."""

    recipe: RecipeName = "blockwise"
    param_gather: bool = False
    """keep the layers' weights in FP8, and gather them so over the data-parallel ranks; no bf16 copy"""
    first_last_bf16: bool = False
    """the first and the last layer of the model stay in bf16"""


DEFAULT_FP8 = Fp8()


def token_multiple(precision: str, recipe: str) -> int:
    """What the tokens of one rank must be a multiple of."""
    return RECIPES[recipe].tokens if precision == "fp8" else 1


def packed_multiple(tensor: int, context: int, tokens: int = 1, *, sequence: bool) -> int:
    """What the length of every packed sequence must be a multiple of.

    2 x CP for the zig-zag (where CP > 1), TP under sequence parallelism, and `tokens` (token_multiple) in the
    share of EVERY context-parallel rank: lcm(2 x CP x TP, tokens) would leave a rank of two with half of it.
    """
    share = lcm((2 if context > 1 else 1) * (tensor if sequence else 1), tokens)
    return context * share


class Tolerances(NamedTuple):
    """How far log-probs of the same weights by two sound engines may be apart."""

    p999: float
    """99.9 % of a step's"""
    largest: float
    """any that is compared after a publish"""


FP32_TOLERANCES = Tolerances(1e-4, 2e-4)
_PER_ROOT_OF_LAYERS = {"bf16": 0.3, "fp8": 0.5}
"""the limit of 99.9 % of the log-probs, divided by the square root of the layers"""
_LARGEST = 2
"""the limit of the largest, in terms of that quantile's, as in float32"""


def tolerances(precision: str, layers: int) -> Tolerances:
    """What engines of a model of so many layers may differ by, where one of them computes in `precision`.

    Rounding adds up as a random walk over the layers, in float32 as below it; there it is larger than what a
    step changes (benchmarks/float32_floor.py, benchmarks/reduced_floor.py).
    """
    if precision == "fp32":
        return FP32_TOLERANCES
    p999 = _PER_ROOT_OF_LAYERS[precision] * sqrt(layers)
    return Tolerances(p999, _LARGEST * p999)
