"""What a model says of a layout before it is built: which are legal, how many rows, which dtype.

Megatron-Core is not imported, so that `plan` need not wait for it.
"""

from __future__ import annotations

import torch

from mcore_rl.errors import LayoutError
from mcore_rl.lora import Lora
from mcore_rl.model.hf.adapters import AdapterMap
from mcore_rl.model.hf.architecture import Architecture
from mcore_rl.parallel.layout import Layout

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.bfloat16,  # of all that is no GEMM of a layer: arXiv 2209.05433
    "fp64": torch.float64,
}
"""precision -> parameter dtype. fp64 is for verification only."""


def check_layout_of(arch: Architecture, layout: Layout, key: str) -> None:
    """Check the layout of the model that `key` of the config names, which is cut as the policy is."""
    try:
        check_layout(arch, layout)
    except LayoutError as error:
        raise LayoutError(f"{key} is cut as the policy is: {error}") from error


def check_adapters(arch: Architecture, layout: Layout, lora: Lora) -> None:
    """Raises ConfigError or LayoutError where a model's adapters are not supported at a layout."""
    AdapterMap(arch, lora)
    if "qkv" in lora.targets and layout.tensor > arch.kv_heads:
        raise LayoutError(
            f"parallel.tensor = {layout.tensor}: with adapters of 'qkv', the model's {arch.kv_heads} key "
            f"heads cannot be cut further; set it to {arch.kv_heads} or less, or leave 'qkv' out of "
            "lora.targets"
        )


def check_layout(arch: Architecture, layout: Layout) -> None:
    """Raise LayoutError, naming the number that does not divide, before any process group exists."""
    layout.check()
    _check_experts(arch, layout)
    stages = layout.pipeline * (layout.virtual_pipeline or 1)
    rules = (
        (arch.heads, layout.tensor, "attention heads", "parallel.tensor"),
        (arch.intermediate, layout.tensor, "intermediate size", "parallel.tensor"),
        (
            arch.experts.shared if arch.experts else 0,
            layout.tensor,
            "shared expert's size",
            "parallel.tensor",
        ),
        (arch.layers, stages, "layers", "parallel.pipeline x parallel.virtual_pipeline"),
        (arch.experts.count if arch.experts else 1, layout.expert, "experts", "parallel.expert"),
    )
    for number, degree, what, key in rules:
        if number % degree:
            legal = [d for d in range(1, number + 1) if number % d == 0]
            raise LayoutError(f"{key} = {degree} does not divide the model's {number} {what}; legal: {legal}")
    _check_key_heads(arch, layout.tensor)


def _check_key_heads(arch: Architecture, tensor: int) -> None:
    """Each rank has whole key heads, or the ranks of a head are equally many and compute it all."""
    heads = arch.kv_heads
    if heads % tensor == 0:
        return
    rows = (arch.heads + 2 * heads) * arch.head_dim
    if arch.whole_qk_norm:
        why = "whose norm is of all of them together"
    elif tensor % heads or rows % tensor:
        why = f"and is no multiple of them that divides the {rows} rows of query, key and value"
    else:
        return
    legal = [d for d in range(1, heads + 1) if heads % d == 0]
    raise LayoutError(
        f"parallel.tensor = {tensor} does not divide the model's {heads} key/value heads, {why}; "
        f"legal: {legal}"
    )


def _check_experts(arch: Architecture, layout: Layout) -> None:
    if arch.experts is None and layout.expert > 1:
        raise LayoutError(
            f"parallel.expert = {layout.expert}, but a {arch.family} model has no experts; set it to 1"
        )
    if arch.experts is not None and layout.tensor > 1 and not layout.sequence:
        raise LayoutError(
            "experts with tensor parallelism need sequence parallelism, or every rank would send them all "
            "tokens; set parallel.sequence = true"
        )


def padded_vocab(arch: Architecture, tensor: int, align: int = 1) -> int:
    """Vocabulary rows including padding: a multiple of `align` on every tensor-parallel rank."""
    unit = tensor * align
    return -(-arch.vocab // unit) * unit
