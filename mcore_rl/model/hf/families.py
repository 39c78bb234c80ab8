"""The model families: what each `model_type` of transformers means, field by field of its config.json.

A field is read (model.hf.architecture), or must have the only value that is implemented, or is harmless: it
does not change what the model computes. Values that transformers assumes for absent fields count as written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mcore_rl.model.hf import latent


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers."""

    qk_norm: bool = False
    """RMSNorm of every query and key head"""
    whole_qk_norm: bool = False
    """RMSNorm of all query channels together, and of all key channels"""
    qkv_bias: bool = False
    input_norms: bool = True
    """RMSNorm of what attention and the MLP read"""
    output_norms: bool = False
    """RMSNorm of what attention and the MLP add to the residual stream"""
    interleaved: bool = False
    """rotary embeddings turn neighbours, instead of one channel of each half"""
    latent: bool = False
    """latent attention: keys and values come from a small vector of the token"""
    sparse: bool = False
    """some layers are mixtures of experts"""
    sigmoid: bool = False
    """the router scores by sigmoid and chooses by score plus a bias; else by softmax"""
    theta: float = 10000.0
    """what transformers takes for an absent rope_theta"""
    partial: float | None = None
    """the same of partial_rotary_factor; None: heads are turned whole"""
    ropes: tuple[str, ...] = ()
    """rope types that it has; every one where none are told"""
    local_theta: float | None = None
    """what it takes for an absent theta of layers with a window, where those turn by numbers of their own"""
    window: str = ""
    """which layers have a sliding window: key of hf.windows.PATTERNS; "" for a family without windows"""
    output_bias: bool = False
    """attention_bias means one on the output projection as well"""
    centered_norms: bool = False
    """the weights of norms are stored less 1"""
    root_embedding: bool = False
    """embeddings are multiplied by the root of the hidden size, rounded to the model's type"""
    activation: str = "silu"
    """of the gate in an MLP: key of model.activations"""
    sinks: bool = False
    """a score of every head that takes part in the softmax, without a value"""
    rope: dict[str, Any] = field(default_factory=dict)
    """what it takes for absent rotary parameters; empty for rope_type default"""
    own_keys: bool = False
    """without num_key_value_heads every head has its own keys and values; else the field must be there"""
    names: Mapping[str, str] = field(default_factory=dict)
    """field of this family -> what it is called here"""
    reads: frozenset[str] = frozenset()
    """fields that only some families have"""
    only: dict[str, Any] = field(default_factory=dict)
    """fields of this family with the only value that is implemented"""
    harmless: frozenset[str] = frozenset()
    """fields of this family that do not matter while those of `only` have their value"""
    defaults: dict[str, Any] = field(default_factory=dict)
    """what transformers takes where the field is absent, as far as it differs from what is read here"""


_SWITCHED = frozenset({"use_sliding_window", "sliding_window"})
_WINDOW = _SWITCHED | {"max_window_layers"}
_BIASES = frozenset({"attention_bias", "mlp_bias"})
_BIAS = frozenset({"attention_bias"})
_NO_BIAS = {"attention_bias": False}
_AUXILIARY = frozenset({"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})
"""losses and noise of the router's pretraining; they have no part in the model's answer"""
_QWEN_EXPERTS = frozenset({"norm_topk_prob", "mlp_only_layers", "decoder_sparse_step"})
_SIGMOID_EXPERTS = frozenset(
    {"norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "first_k_dense_replace"}
    | {"n_shared_experts"}
)
_SIGMOID_DEFAULTS = {"norm_topk_prob": True, "n_shared_experts": 1}
PREDICTING = frozenset({"num_nextn_predict_layers", "num_mtp_layers"})
"""fields that count the layers behind the last one, which predict later tokens"""
_GLM = {"head_dim": 128}
_GELU = "gelu_pytorch_tanh"
_GEMMA = Family(
    centered_norms=True,
    root_embedding=True,
    output_norms=True,
    output_bias=True,
    activation="gelu_tanh",
    reads=_BIAS
    | {"sliding_window", "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping"},
    only={"hidden_activation": _GELU, "hidden_act": _GELU, "use_bidirectional_attention": False},
    harmless=frozenset({"cache_implementation"}),
    defaults={
        "head_dim": 256,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
)
_DEEPSEEK_HARMLESS = frozenset(
    # losses of the pretraining, how its own program spread the experts, and code that is never run
    {"aux_loss_alpha", "seq_aux", "ep_size", "auto_map", "output_router_logits"}
)
_DEEPSEEK_NAMES = {"n_routed_experts": "num_experts", "num_local_experts": "num_experts"}
_LATENT_DEFAULTS = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
FAMILIES: dict[str, Family] = {
    "llama": Family(own_keys=True, output_bias=True, reads=_BIASES),
    "mistral": Family(window="all", reads=frozenset({"sliding_window"}), defaults={"sliding_window": 4096}),
    "mixtral": Family(
        own_keys=True,
        sparse=True,
        theta=1e6,
        window="all",
        reads=frozenset({"sliding_window"}),
        names={"intermediate_size": "moe_intermediate_size"},
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5},
        harmless=_AUXILIARY,
    ),
    "qwen2": Family(qkv_bias=True, window="later", reads=_WINDOW, defaults={"sliding_window": 4096}),
    "qwen2_moe": Family(
        qkv_bias=True,
        sparse=True,
        window="earlier even",
        reads=_QWEN_EXPERTS | _WINDOW | {"shared_expert_intermediate_size"},
        only={"qkv_bias": True},
        harmless=_AUXILIARY,
        defaults={"shared_expert_intermediate_size": 5632, "sliding_window": 4096},
    ),
    "qwen3": Family(
        qk_norm=True,
        window="later",
        output_bias=True,
        reads=_WINDOW | _BIAS,
        defaults={"head_dim": 128, "sliding_window": 4096},
    ),
    "qwen3_moe": Family(
        qk_norm=True,
        sparse=True,
        window="all",
        output_bias=True,
        reads=_QWEN_EXPERTS | _SWITCHED | _BIAS,
        harmless=_AUXILIARY | {"max_window_layers"},
        defaults={"sliding_window": 4096},
    ),
    "olmo2": Family(
        own_keys=True,
        whole_qk_norm=True,
        input_norms=False,
        output_norms=True,
        output_bias=True,
        reads=_BIAS,
        defaults={"rms_norm_eps": 1e-5},
    ),
    "olmo3": Family(
        own_keys=True,
        whole_qk_norm=True,
        input_norms=False,
        output_norms=True,
        output_bias=True,
        window="three of four",
        theta=500000.0,
        local_theta=500000.0,
        reads=_BIAS | {"sliding_window"},
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096},
    ),
    "granite": Family(
        own_keys=True,
        output_bias=True,
        reads=_BIASES
        | {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"},
        defaults={"attention_multiplier": 1.0},
    ),
    "gemma2": replace(
        _GEMMA,
        window="even",
        names={"sliding_window_size": "sliding_window"},
        defaults=_GEMMA.defaults | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    ),
    "gemma3_text": replace(
        _GEMMA,
        window="by pattern",
        qk_norm=True,
        theta=1e6,
        local_theta=1e4,
        reads=_GEMMA.reads - {"attn_logit_softcapping"} | {"sliding_window_pattern", "rope_local_base_freq"},
        only=_GEMMA.only | {"attn_logit_softcapping": None},  # transformers reads over it
        harmless=_GEMMA.harmless | {"_sliding_window_pattern"},
    ),
    "gpt_oss": Family(
        sparse=True,
        theta=150000.0,
        window="even",
        output_bias=True,
        sinks=True,
        activation="clamped",
        rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        names={"intermediate_size": "moe_intermediate_size"},
        reads=_BIAS | {"sliding_window", "swiglu_alpha", "swiglu_limit", "quantization_config"},
        harmless=_AUXILIARY | {"initial_context_length", "experts_per_token"},
        defaults={
            "attention_bias": True,
            "head_dim": 64,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "sliding_window": 128,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
        },
    ),
    "phi3": Family(
        own_keys=True,
        partial=1.0,
        ropes=("default", "longrope"),
        window="all",
        only=_NO_BIAS
        | {"mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1}
        | {"embd_pdrop": 0.0, "resid_pdrop": 0.0},
        reads=frozenset({"original_max_position_embeddings", "sliding_window"}),
        harmless=frozenset({"auto_map"}),  # code of before transformers had the family, which is never run
        defaults={"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "smollm3": Family(
        own_keys=True,
        theta=2e6,
        window="unturned",
        output_bias=True,
        reads=_BIASES | _SWITCHED | {"no_rope_layers", "no_rope_layer_interval"},
        harmless=frozenset({"max_window_layers"}),
        defaults={"no_rope_layer_interval": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "glm4": Family(
        output_norms=True,
        interleaved=True,
        partial=0.5,
        reads=frozenset({"attention_bias"}),
        defaults=_GLM | {"attention_bias": True, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-7},
    ),
    "glm4_moe": Family(
        sparse=True,
        sigmoid=True,
        partial=0.5,
        names={"n_routed_experts": "num_experts", "num_local_experts": "num_experts"},
        reads=_SIGMOID_EXPERTS | PREDICTING | {"attention_bias", "use_qk_norm"},
        harmless=_AUXILIARY,
        defaults=_SIGMOID_DEFAULTS | {"first_k_dense_replace": 1, "rms_norm_eps": 1e-5},
    ),
    "deepseek_v2": Family(
        own_keys=True,
        latent=True,
        sparse=True,
        interleaved=True,
        names=_DEEPSEEK_NAMES,
        only=_NO_BIAS
        | {"mlp_bias": False, "scoring_func": "softmax", "moe_layer_freq": 1, "norm_topk_prob": False},
        reads=latent.FIELDS | _SIGMOID_EXPERTS - {"norm_topk_prob"} | {"topk_method"},
        harmless=_DEEPSEEK_HARMLESS,
        defaults=_LATENT_DEFAULTS
        | {"n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407}
        | {"topk_method": "greedy"},
    ),
    "deepseek_v3": Family(
        own_keys=True,
        latent=True,
        sparse=True,
        sigmoid=True,
        interleaved=True,
        names=_DEEPSEEK_NAMES,
        only=_NO_BIAS | {"scoring_func": "sigmoid", "moe_layer_freq": 1, "topk_method": "noaux_tc"},
        reads=latent.FIELDS | _SIGMOID_EXPERTS | PREDICTING | {"rope_interleave"},
        harmless=_DEEPSEEK_HARMLESS,
        defaults=_LATENT_DEFAULTS
        | _SIGMOID_DEFAULTS
        | {"num_key_value_heads": 128, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8}
        | {"topk_group": 4, "first_k_dense_replace": 3, "moe_intermediate_size": 2048}
        | {"routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1},
    ),
}
"""model_type -> what it means"""

_ONLY = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
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
    rope_theta rope_scaling rope_parameters partial_rotary_factor quantization_config
"""
_READ_EXPERTS = "num_experts num_local_experts num_experts_per_tok moe_intermediate_size"
_HARMLESS = """
    architectures transformers_version torch_dtype dtype use_cache bos_token_id eos_token_id pad_token_id
    max_position_embeddings output_attentions output_hidden_states return_dict id2label label2id problem_type
    tokenizer_class _name_or_path _attn_implementation attn_implementation _attn_implementation_autoset
    unk_token_id sep_token_id decoder_start_token_id _model_name_or_path _commit_hash finetuning_task
    task_specific_params prefix is_decoder torchscript use_bfloat16 tf_legacy_loss transformers.js_config
    pretraining_tp
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
    known = frozenset(words.split()) | only_values(family).keys() | family.harmless | family.reads
    return name in known or name in family.names or name.startswith("unsloth_")
