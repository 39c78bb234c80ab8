"""config.json of a tiny model for a rehearsal: the family and every kind of layer stay, sizes are small."""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

from mcore_rl.config.parallel import ParallelConfig
from mcore_rl.model.hf.architecture import Architecture, architecture_of
from mcore_rl.model.hf.families import FAMILIES
from mcore_rl.model.hf.windows import FULL, SLIDING

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "n_routed_experts": 4,
    "initializer_range": 0.125,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "torch_dtype": "float32",
    "dtype": "float32",
}
_LATENT_SIZES = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "qk_head_dim": 24,
}
"""of a model with latent attention"""
_MOST = {"sliding_window": 8, "sliding_window_size": 8, "num_experts_per_tok": 2}
"""a window that the rehearsal's few tokens fill"""


def shrink_model(hf: dict[str, Any], parallel: ParallelConfig, vocabulary: int, where: str) -> dict[str, Any]:
    """config.json of a tiny model of the same family: every field that is not a size stays.

    Args:
        parallel: of the rehearsal; its stages get equally many layers.
        vocabulary: tokens of the rehearsal.
        where: the file that `hf` was read from.

    Raises:
        ConfigError: the model is not supported.
    """
    arch = architecture_of(hf, where)
    hf = FAMILIES[arch.family].defaults | hf
    sizes = _SIZES | (_LATENT_SIZES if arch.latent else {}) | {"vocab_size": vocabulary}
    tiny = hf | {name: value for name, value in sizes.items() if name in hf or name == "pad_token_id"}
    tiny |= {name: min(hf[name], most) for name, most in _MOST.items() if hf.get(name)}
    tiny.pop("quantization_config", None)  # the tiny weights are plain
    if arch.has_whole_query:
        tiny["q_lora_rank"] = None
    if arch.experts is not None and arch.experts.groups > 1:
        some = arch.experts.groups_per_token < arch.experts.groups
        tiny |= {"n_group": 2, "topk_group": 1 if some else 2}
    tiny |= _layers(hf, arch, parallel.pipeline * (parallel.virtual_pipeline or 1))
    for name in ("rope_parameters", "rope_scaling"):
        tiny |= _fewer_pairs(name, tiny)
    return tiny


def kind_of(arch: Architecture, layer: int) -> tuple[bool, bool, bool]:
    """Whether `layer` (from 0) is a mixture, has a window, and turns queries and keys."""
    return arch.is_sparse(layer), arch.windows.of(layer) is not None, layer not in arch.unturned_layers


def _layers(hf: dict[str, Any], arch: Architecture, stages: int) -> dict[str, Any]:
    """The fields that say how many layers there are and of which kind each is: all kinds of the model."""
    kinds = list(dict.fromkeys(kind_of(arch, layer) for layer in range(arch.layers)))
    count = stages * max(1, -(-max(2, len(kinds)) // stages))
    kept = list(islice(cycle(kinds), count))
    first = "first_k_dense_replace" in FAMILIES[arch.family].reads
    if first:
        kept.sort()  # dense layers come before the others
    sparse, windowed, turned = zip(*kept, strict=True)
    fields: dict[str, Any] = {"num_hidden_layers": count}
    if hf.get("layer_types") or len(set(windowed)) == 2:
        fields["layer_types"] = [SLIDING if one else FULL for one in windowed]
    if arch.unturned_layers or hf.get("no_rope_layers"):
        fields["no_rope_layers"] = [int(one) for one in turned]
    if first:
        fields["first_k_dense_replace"] = sparse.count(False)
    elif "mlp_only_layers" in FAMILIES[arch.family].reads:
        dense = [layer for layer in range(count) if not sparse[layer]]
        fields |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    return fields


def _fewer_pairs(name: str, hf: dict[str, Any]) -> dict[str, Any]:
    """LongRoPE has a number for each pair of channels."""
    rope = hf.get(name)
    if not isinstance(rope, dict) or "short_factor" not in rope:
        return {}
    share = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    pairs = int((hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]) * share) // 2
    factors = {factor: (rope[factor] * pairs)[:pairs] for factor in ("short_factor", "long_factor")}
    return {name: rope | factors}
