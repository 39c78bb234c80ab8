"""A tiny model of every family as transformers makes it: config class and arguments by name.

A family has several where a flag of its config.json changes the maths. Layers are of both kinds, shapes odd.
"""

from __future__ import annotations

from typing import Any

from tests.model.support import DENSE, MOE

THETA = {"rope_theta": 10000.0}
LLAMA3 = THETA | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
"""the sequences of the tests are longer than the original context: all three bands of frequencies are used"""
YARN = THETA | {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = THETA | {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.5],
    "long_factor": [1.0, 3.0, 9.0],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
}

SMALL: dict[str, Any] = {"initializer_range": 0.1}
WITHOUT_HEAD_DIM = {name: value for name, value in DENSE.items() if name != "head_dim"} | {"hidden_size": 64}
WIDE = WITHOUT_HEAD_DIM | SMALL
MIXTRAL = DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
SHARED = WIDE | {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.5,
}
HALF_TURNED = THETA | {"rope_type": "default", "partial_rotary_factor": 0.5}
GLM4: dict[str, Any] = {"rope_parameters": HALF_TURNED, "pad_token_id": None}
GLM_MOE: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "use_qk_norm": True,
    "attention_bias": True,
}
WINDOW = {"sliding_window": 5}
"""shorter than the sequences of the tests and than their halves, that context parallelism makes"""
BIASED = {"attention_bias": True, "mlp_bias": True}
GEMMA: dict[str, Any] = {
    "query_pre_attn_scalar": 24,
    "final_logit_softcapping": 2.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": None,
    "tie_word_embeddings": True,
}
TWO_ROPES = {"sliding_attention": THETA | {"rope_type": "default"}, "full_attention": YARN}
LATENT = {name: value for name, value in WIDE.items() if name != "num_key_value_heads"} | {
    "num_key_value_heads": 8,
    "kv_lora_rank": 12,
    "q_lora_rank": None,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
}
DEEPSEEK = LATENT | {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}
DEEPSEEK_YARN = YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", DENSE | SMALL | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_biased": ("LlamaConfig", DENSE | SMALL | BIASED),
    "mistral": ("MistralConfig", DENSE | SMALL | {"sliding_window": None}),
    "mistral_window": ("MistralConfig", DENSE | SMALL | WINDOW),
    "mixtral": ("MixtralConfig", MIXTRAL | SMALL),
    "qwen2": ("Qwen2Config", WIDE),
    "qwen2_tied": ("Qwen2Config", WIDE | {"tie_word_embeddings": True}),
    "qwen2_yarn": ("Qwen2Config", WIDE | {"rope_parameters": YARN}),
    "qwen2_moe": ("Qwen2MoeConfig", SHARED),
    "qwen3": ("Qwen3Config", DENSE | SMALL),
    "qwen3_window": (
        "Qwen3Config",
        DENSE | SMALL | WINDOW | {"use_sliding_window": True, "max_window_layers": 1, "attention_bias": True},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", MOE | SMALL),
    "olmo2": ("Olmo2Config", WIDE | {"pad_token_id": None}),
    "olmo3": (
        "Olmo3Config",
        WIDE | WINDOW | {"rope_parameters": TWO_ROPES, "num_hidden_layers": 4, "pad_token_id": None},
    ),
    "gemma2": ("Gemma2Config", DENSE | SMALL | GEMMA | WINDOW | {"attn_logit_softcapping": 1.5}),
    "gemma3": (
        "Gemma3TextConfig",
        DENSE
        | SMALL
        | GEMMA
        | WINDOW
        | {
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": THETA | {"rope_type": "default"},
            },
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        DENSE
        | SMALL
        | WINDOW
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 24,
            "swiglu_alpha": 1.3,
            "swiglu_limit": 0.4,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    "granite": ("GraniteConfig", WIDE | GRANITE | {"tie_word_embeddings": True}),
    "phi3": ("Phi3Config", WIDE | {"pad_token_id": None}),
    "phi3_longrope": (
        "Phi3Config",
        WIDE | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64, "pad_token_id": None},
    ),
    "smollm3": ("SmolLM3Config", WIDE | {"no_rope_layers": [1, 0], "pad_token_id": None}),
    "glm4": ("Glm4Config", DENSE | SMALL | GLM4),
    "glm4_moe": ("Glm4MoeConfig", DENSE | SMALL | GLM4 | GLM_MOE),
    "deepseek_v2": ("DeepseekV2Config", DEEPSEEK),
    "deepseek_v2_groups": (
        "DeepseekV2Config",
        DEEPSEEK
        | {"topk_method": "group_limited_greedy", "q_lora_rank": 10, "rope_parameters": DEEPSEEK_YARN},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        DEEPSEEK | {"q_lora_rank": 10, "rms_norm_eps": 1e-5, "rope_parameters": DEEPSEEK_YARN},
    ),
    "deepseek_v3_halves": (
        "DeepseekV3Config",
        DEEPSEEK | {"rope_interleave": False, "norm_topk_prob": False, "topk_group": 3},
    ),
}
