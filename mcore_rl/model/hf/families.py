"""The model families: what each `model_type` of transformers means, field by field of its config.json.

A field is read (model.hf.architecture), or must have the only value that is implemented, or is harmless: it
does not change what the model computes. Values that transformers assumes for absent fields count as written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers."""

    qk_norm: bool = False
    """RMSNorm of every query and key head"""
    qkv_bias: bool = False
    sparse: bool = False
    """some layers are mixtures of experts"""
    only: dict[str, Any] = field(default_factory=dict)
    """fields of this family with the only value that is implemented"""
    harmless: frozenset[str] = frozenset()
    """fields of this family that do not matter while those of `only` have their value"""
    defaults: dict[str, Any] = field(default_factory=dict)
    """what transformers takes where the field is absent, as far as it differs from what is read here"""


_NO_WINDOW = {"use_sliding_window": False}
_WINDOW = frozenset({"sliding_window", "max_window_layers"})
_NO_BIAS = {"attention_bias": False}
FAMILIES: dict[str, Family] = {
    "llama": Family(only=_NO_BIAS | {"mlp_bias": False}, harmless=frozenset({"pretraining_tp"})),
    "mistral": Family(only={"sliding_window": None}, defaults={"sliding_window": 4096}),
    "qwen2": Family(qkv_bias=True, only=_NO_WINDOW, harmless=_WINDOW),
    "qwen3": Family(qk_norm=True, only=_NO_WINDOW | _NO_BIAS, harmless=_WINDOW, defaults={"head_dim": 128}),
    "qwen3_moe": Family(
        qk_norm=True,
        sparse=True,
        only=_NO_WINDOW | _NO_BIAS,
        # The auxiliary loss belongs to pretraining; it has no part in the model's answer.
        harmless=_WINDOW | {"output_router_logits", "router_aux_loss_coef"},
    ),
}
"""model_type -> what it means"""

_ONLY = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "is_llama_config": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "use_mrope": False,
}
_READ = """
    model_type num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim
    intermediate_size vocab_size rms_norm_eps tie_word_embeddings initializer_range layer_types
    rope_theta rope_scaling rope_parameters
"""
_READ_EXPERTS = """
    num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob mlp_only_layers
    decoder_sparse_step
"""
_HARMLESS = """
    architectures transformers_version torch_dtype dtype use_cache bos_token_id eos_token_id pad_token_id
    max_position_embeddings output_attentions output_hidden_states return_dict id2label label2id problem_type
    tokenizer_class _name_or_path _attn_implementation attn_implementation _attn_implementation_autoset
    unk_token_id sep_token_id decoder_start_token_id _model_name_or_path _commit_hash finetuning_task
    task_specific_params prefix is_decoder torchscript use_bfloat16 tf_legacy_loss transformers.js_config
"""
"""how a library runs the model, where it came from, or which tokens it starts and ends with"""
_GENERATION = """
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
    top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens
"""
"""what transformers 4 wrote here for its `generate`; sampling is the run's own"""


def only_values(family: Family) -> dict[str, Any]:
    """Field -> the one value that is implemented."""
    return _ONLY | family.only


def is_known(name: str, family: Family) -> bool:
    """Whether the meaning of this field is known; any other is refused."""
    words = f"{_READ} {_HARMLESS} {_GENERATION} {_READ_EXPERTS if family.sparse else ''}"
    known = frozenset(words.split()) | only_values(family).keys() | family.harmless
    return name in known or name.startswith("unsloth_")
