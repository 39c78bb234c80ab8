"""The tables between Hugging Face and Megatron parameters, one for a family, of rules that families share.

A rule joins one Megatron parameter to one or more HF tensors; model.hf.parameters applies it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mcore_rl.model.hf.architecture import Architecture
from mcore_rl.model.hf.stacked import is_piece


@dataclass(frozen=True)
class Rule:
    """One line of the table; `{layer}` and `{expert}` stand for global numbers, from 0."""

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[str, ...]
    """the shape of each HF tensor, its sides by the names of `sides`"""
    merge: str = "single"
    axis: int | None = None
    layers: str = "all"
    """which layers have it: `all`, `dense` or `sparse` (those with a mixture of experts)"""
    needs: str = ""
    """field of Architecture that says whether the model has it; "" where every model of the family does"""
    joined: bool = False
    """the HF tensors that `shapes` tells lie one after the other in a single one"""
    fp8: bool = False
    """whether a model in FP8 has the HF tensors in FP8; the others stay in the model's own type"""


def sides(arch: Architecture) -> dict[str, int]:
    """The sides that an HF tensor of this model can have, by the names that a rule calls them."""
    return {
        "one": 1,
        "vocab": arch.vocab,
        "hidden": arch.hidden,
        "queries": arch.heads * arch.head_dim,
        "keys": arch.kv_heads * arch.head_dim,
        "head": arch.head_dim,
        "mlp": arch.intermediate,
        "expert_mlp": arch.experts.intermediate if arch.experts else 0,
        "shared_mlp": arch.experts.shared if arch.experts else 0,
        "experts": arch.experts.count if arch.experts else 0,
        "gate_up": 2 * arch.experts.intermediate if arch.experts else 0,
        "heads": arch.heads,
        **_latent_sides(arch),
    }


def _latent_sides(arch: Architecture) -> dict[str, int]:
    if arch.latent is None:
        return {}
    return {
        "query_latent": arch.latent.query_rank or 0,
        "latent": arch.latent.rank,
        "latent_and_key": arch.latent.cached,
        "keys_values": arch.heads * (arch.latent.plain + arch.latent.value),
        "values": arch.heads * arch.latent.value,
    }


_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def _mlp_rules(
    megatron: str,
    hf: str,
    side: str,
    layers: str,
    axes: tuple[int | None, int | None],
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Rule, Rule]:
    """The two matrices of a SwiGLU MLP; `axes`: where gate and up, and down, are cut."""
    gate, up, down = names
    return (
        Rule(
            f"{megatron}.linear_fc1.weight",
            (f"{hf}.{gate}.weight", f"{hf}.{up}.weight"),
            (f"{side} hidden",) * 2,
            "stack",
            axes[0],
            layers,
            fp8=True,
        ),
        Rule(
            f"{megatron}.linear_fc2.weight",
            (f"{hf}.{down}.weight",),
            (f"hidden {side}",),
            "single",
            axes[1],
            layers,
            fp8=True,
        ),
    )


def _norm(megatron: str, hf: str, side: str = "hidden", needs: str = "", axis: int | None = None) -> Rule:
    return Rule(f"{megatron}.weight", (f"{hf}.weight",), (side,), axis=axis, needs=needs)


def _joined(rule: Rule, hf: str) -> Rule:
    """`rule` where its HF tensors lie one after the other in the tensor `hf`."""
    return replace(rule, hf=(hf,), joined=True)


_INPUT_NORM = _norm(f"{_LAYER}input_layernorm", f"{_HF_LAYER}input_layernorm")
_MLP_NORM = _norm(f"{_LAYER}pre_mlp_layernorm", f"{_HF_LAYER}post_attention_layernorm")
_QKV = Rule(
    f"{_LAYER}self_attention.linear_qkv.weight",
    tuple(f"{_HF_LAYER}self_attn.{x}_proj.weight" for x in "qkv"),
    ("queries hidden", "keys hidden", "keys hidden"),
    "qkv",
    0,
    fp8=True,
)
_QKV_BIAS = Rule(
    f"{_LAYER}self_attention.linear_qkv.bias",
    tuple(f"{_HF_LAYER}self_attn.{x}_proj.bias" for x in "qkv"),
    ("queries", "keys", "keys"),
    "qkv",
    0,
    needs="qkv_bias",
)
_OUTPUT = Rule(
    f"{_LAYER}self_attention.linear_proj.weight",
    (f"{_HF_LAYER}self_attn.o_proj.weight",),
    ("hidden queries",),
    axis=1,
    fp8=True,
)
_OUTPUT_BIAS = Rule(
    f"{_LAYER}self_attention.linear_proj.bias",
    (f"{_HF_LAYER}self_attn.o_proj.bias",),
    ("hidden",),
    needs="output_bias",
)
_ENDS = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("vocab hidden",), "vocab", 0),
    _norm("decoder.final_layernorm", "model.norm"),
    Rule("output_layer.weight", ("lm_head.weight",), ("vocab hidden",), "vocab", 0),
)
_QK_NORM = tuple(
    _norm(f"{_LAYER}self_attention.{x}_layernorm", f"{_HF_LAYER}self_attn.{x}_norm", "head", needs="qk_norm")
    for x in "qk"
)
_WHOLE_QK_NORM = tuple(
    _norm(f"{_LAYER}self_attention.{name}_norm", f"{_HF_LAYER}self_attn.{name[0]}_norm", side, axis=0)
    for name, side in (("query", "queries"), ("key", "keys"))
)
_ATTENTION = (_QKV, _QKV_BIAS, _OUTPUT, _OUTPUT_BIAS)
_BACKBONE = (*_ENDS, _INPUT_NORM, *_ATTENTION, _MLP_NORM, *_QK_NORM)
_MLP = _mlp_rules(f"{_LAYER}mlp", f"{_HF_LAYER}mlp", "mlp", "dense", (1, 1))
_MLP_BIAS = (
    Rule(
        f"{_LAYER}mlp.linear_fc1.bias",
        (f"{_HF_LAYER}mlp.gate_proj.bias", f"{_HF_LAYER}mlp.up_proj.bias"),
        ("mlp", "mlp"),
        "stack",
        1,
        "dense",
        needs="mlp_bias",
    ),
    Rule(
        f"{_LAYER}mlp.linear_fc2.bias",
        (f"{_HF_LAYER}mlp.down_proj.bias",),
        ("hidden",),
        layers="dense",
        needs="mlp_bias",
    ),
)
_JOINED_MLP = (_joined(_MLP[0], f"{_HF_LAYER}mlp.gate_up_proj.weight"), _MLP[1])


def _output_norms(attention: str, mlp: str) -> tuple[Rule, Rule]:
    """The norms of what attention and the MLP add to the residual stream, by their HF names."""
    return (
        _norm(f"{_LAYER}self_attn_bda.norm", f"{_HF_LAYER}{attention}"),
        _norm(f"{_LAYER}mlp_bda.norm", f"{_HF_LAYER}{mlp}"),
    )


def _experts(
    hf: str = "mlp", names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Rule, ...]:
    """Router and experts of the HF module `hf`."""
    return (
        Rule(
            f"{_LAYER}mlp.router.weight",
            (f"{_HF_LAYER}{hf}.gate.weight",),
            ("experts hidden",),
            layers="sparse",
        ),
        *_mlp_rules(
            f"{_LAYER}mlp.experts.local_experts.{{expert}}",
            f"{_HF_LAYER}{hf}.experts.{{expert}}",
            "expert_mlp",
            "sparse",
            (None, None),
            names,
        ),
    )


def _shared_expert(hf: str) -> tuple[Rule, ...]:
    """The MLP `hf` beside the experts; it is cut over the tensor-parallel ranks as a dense one is."""
    rules = _mlp_rules(f"{_LAYER}mlp.shared_experts", f"{_HF_LAYER}mlp.{hf}", "shared_mlp", "sparse", (1, 1))
    return tuple(replace(rule, needs="has_shared_expert") for rule in rules)


def _of_expert(megatron: str, hf: str, shape: str, merge: str = "single") -> Rule:
    """A parameter of an expert that a stacked tensor has (hf.stacked)."""
    return Rule(
        f"{_LAYER}mlp.experts.local_experts.{{expert}}.{megatron}",
        (f"{_HF_LAYER}mlp.experts.{hf}[{{expert}}]",),
        (shape,),
        merge,
        layers="sparse",
    )


_STACKED_EXPERTS = (
    _of_expert("linear_fc1.weight", "gate_up_proj", "hidden gate_up", "interleaved"),
    _of_expert("linear_fc1.bias", "gate_up_proj_bias", "gate_up", "interleaved"),
    _of_expert("linear_fc2.weight", "down_proj", "expert_mlp hidden", "transposed"),
    _of_expert("linear_fc2.bias", "down_proj_bias", "hidden"),
)
_BIASED_ROUTER = (
    Rule(
        f"{_LAYER}mlp.router.weight",
        (f"{_HF_LAYER}mlp.router.weight",),
        ("experts hidden",),
        layers="sparse",
    ),
    Rule(f"{_LAYER}mlp.router.bias", (f"{_HF_LAYER}mlp.router.bias",), ("experts",), layers="sparse"),
)
_SINKS = Rule(
    f"{_LAYER}self_attention.core_attention.softmax_offset",
    (f"{_HF_LAYER}self_attn.sinks",),
    ("heads",),
    axis=0,
)
_SHARED_GATE = Rule(
    f"{_LAYER}mlp.shared_experts.gate_weight",
    (f"{_HF_LAYER}mlp.shared_expert_gate.weight",),
    ("one hidden",),
    layers="sparse",
    needs="has_shared_expert",
)
_ROUTER_BIAS = Rule(
    f"{_LAYER}mlp.router.expert_bias",
    (f"{_HF_LAYER}mlp.gate.e_score_correction_bias",),
    ("experts",),
    layers="sparse",
)


def _latent_linear(megatron: str, hf: str, shape: str, axis: int | None, needs: str = "") -> Rule:
    return Rule(
        f"{_LAYER}self_attention.{megatron}.weight",
        (f"{_HF_LAYER}self_attn.{hf}.weight",),
        (shape,),
        axis=axis,
        needs=needs,
        fp8=True,
    )


def _latent_norm(name: str, side: str, needs: str = "") -> Rule:
    hf = f"{_HF_LAYER}self_attn.{name}_a_layernorm"
    return _norm(f"{_LAYER}self_attention.{name}_layernorm", hf, side, needs)


# Every tensor-parallel rank makes the latents whole, and its own heads of them.
_LATENT_ATTENTION = (
    _latent_linear("linear_q_proj", "q_proj", "queries hidden", 0, "has_whole_query"),
    _latent_linear("linear_q_down_proj", "q_a_proj", "query_latent hidden", None, "has_query_latent"),
    _latent_norm("q", "query_latent", "has_query_latent"),
    _latent_linear("linear_q_up_proj", "q_b_proj", "queries query_latent", 0, "has_query_latent"),
    _latent_linear("linear_kv_down_proj", "kv_a_proj_with_mqa", "latent_and_key hidden", None),
    _latent_norm("kv", "latent"),
    _latent_linear("linear_kv_up_proj", "kv_b_proj", "keys_values latent", 0),
    _latent_linear("linear_proj", "o_proj", "hidden values", 1),
)
_PLAIN = _BACKBONE + _MLP
_BIASED = _PLAIN + _MLP_BIAS
_MIXTURE = _PLAIN + _experts()
_POST_NORMS = _output_norms("post_attention_layernorm", "post_feedforward_layernorm")
_LATENT_MIXTURE = (
    *_ENDS,
    _INPUT_NORM,
    *_LATENT_ATTENTION,
    _MLP_NORM,
    *_MLP,
    *_experts(),
    *_shared_expert("shared_experts"),
)
_SANDWICH = _output_norms("post_self_attn_layernorm", "post_mlp_layernorm")
_OLMO = (*_ENDS, *_ATTENTION, *_WHOLE_QK_NORM, *_POST_NORMS, *_MLP)
_GEMMA = (
    *_ENDS,
    _INPUT_NORM,
    *_ATTENTION,
    *_QK_NORM,
    _norm(f"{_LAYER}pre_mlp_layernorm", f"{_HF_LAYER}pre_feedforward_layernorm"),
    *_POST_NORMS,
    *_MLP,
)
TABLES: dict[str, tuple[Rule, ...]] = {
    "llama": _BIASED,
    "mistral": _PLAIN,
    "mixtral": _BACKBONE + _experts("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen2": _PLAIN,
    "qwen2_moe": (*_MIXTURE, *_shared_expert("shared_expert"), _SHARED_GATE),
    "qwen3": _PLAIN,
    "qwen3_moe": _MIXTURE,
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "granite": _BIASED,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt_oss": (*_BACKBONE, _SINKS, *_BIASED_ROUTER, *_STACKED_EXPERTS),
    "phi3": (
        *_ENDS,
        _INPUT_NORM,
        _joined(_QKV, f"{_HF_LAYER}self_attn.qkv_proj.weight"),
        _OUTPUT,
        _MLP_NORM,
        *_JOINED_MLP,
    ),
    "smollm3": _BIASED,
    "glm4": (*_BACKBONE, *_SANDWICH, *_JOINED_MLP),
    "glm4_moe": (*_MIXTURE, *_shared_expert("shared_experts"), _ROUTER_BIAS),
    "deepseek_v2": _LATENT_MIXTURE,
    "deepseek_v3": (*_LATENT_MIXTURE, _ROUTER_BIAS),
}
"""family -> rules"""


def rules_of(arch: Architecture) -> tuple[Rule, ...]:
    """The rules of a model's parameters."""
    return tuple(rule for rule in TABLES[arch.family] if not rule.needs or getattr(arch, rule.needs))


def is_stacked(arch: Architecture) -> bool:
    """Whether an HF tensor holds a matrix of every expert of a layer (hf.stacked)."""
    return any(is_piece(name.format(layer=0, expert=0)) for rule in rules_of(arch) for name in rule.hf)
