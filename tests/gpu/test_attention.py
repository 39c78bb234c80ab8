"""Attention on packed sequences (THD), Transformer Engine's and the portable one, against float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from mcore_rl.model.build import build_policy
from mcore_rl.model.packed_layout import PackedLayout
from mcore_rl.model.portable import PackedAttention
from mcore_rl.parallel.mesh import Mesh
from tests.gpu.conftest import SIZES

BOUNDARIES = (0, 16, 64, 72, 200)
TOLERANCE = 0.02
"""of the largest entry: a few roundings to the 8 bits of bf16"""

Attention = Callable[..., Tensor]

pytestmark = pytest.mark.usefixtures("engine")


def layout(boundaries: tuple[int, ...]) -> PackedLayout:
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device="cuda")
    positions = torch.cat([torch.arange(n, device="cuda") for n in cu_seqlens.diff().tolist()])
    longest = max(b - a for a, b in pairwise(boundaries))
    return PackedLayout.of(positions, cu_seqlens, longest)


def states(dtype: torch.dtype) -> list[Tensor]:
    """Query [T, 1, N, D], key and value [T, 1, K, D], a gradient [T, 1, N * D]; what bf16 can hold."""
    generator = torch.Generator("cuda").manual_seed(0)
    heads, keys, width = (SIZES[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    shapes = [(heads, width), (keys, width), (keys, width), (heads * width,)]
    made = [torch.randn(BOUNDARIES[-1], 1, *s, generator=generator, device="cuda") for s in shapes]
    return [x.bfloat16().to(dtype).requires_grad_() for x in made]


def passed(attend: Attention, dtype: torch.dtype, boundaries: tuple[int, ...] = BOUNDARIES) -> list[Tensor]:
    """The output and the three gradients, in float64."""
    *qkv, gradient = states(dtype)
    out = attend(*qkv, attn_mask_type=AttnMaskType.causal, packed_seq_params=layout(boundaries))
    return [x.detach().double() for x in (out, *torch.autograd.grad(out, qkv, gradient))]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, exact, strict=True)]


def test_packed_sequences_against_float64(directory: Path, mesh: Mesh) -> None:
    model = build_policy(directory, mesh, precision="bf16")
    engine = model.unwrapped[0].decoder.layers[0].self_attention.core_attention
    portable = PackedAttention(model.config, 1, AttnMaskType.causal, "self")
    exact = passed(portable, torch.float64)
    of_engine = errors(passed(engine, torch.bfloat16), exact)
    of_portable = errors(passed(portable, torch.bfloat16), exact)
    print(f"output, dq, dk, dv: Transformer Engine {of_engine}, portable {of_portable}")
    assert max(of_engine) <= TOLERANCE
    assert max(of_portable) <= TOLERANCE
    joined = passed(engine, torch.bfloat16, (0, 16, 72, 200))  # two sequences as if they were one
    assert max(errors(joined, exact)) > 10 * TOLERANCE
