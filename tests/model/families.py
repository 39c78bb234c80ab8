"""A tiny model of every family as transformers makes it: config class and arguments by name."""

from __future__ import annotations

from typing import Any

from tests.model.support import DENSE, MOE

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
"""the sequences of the tests are longer than the original context: all three bands of frequencies are used"""

SMALL: dict[str, Any] = {"initializer_range": 0.1}
WITHOUT_HEAD_DIM = {name: value for name, value in DENSE.items() if name != "head_dim"} | {"hidden_size": 64}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", DENSE | SMALL | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", DENSE | SMALL | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", WITHOUT_HEAD_DIM | SMALL),
    "qwen2_tied": ("Qwen2Config", WITHOUT_HEAD_DIM | SMALL | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", DENSE | SMALL),
    "qwen3_moe": ("Qwen3MoeConfig", MOE | SMALL),
}
