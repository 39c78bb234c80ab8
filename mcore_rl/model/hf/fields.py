"""What a field of config.json may hold: a table of types and ranges, checked before any number is used.

The ranges are far beyond every published model. They are there because a size of 10^12 is a damaged file,
which would otherwise be found out by loops and tables that never end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mcore_rl.errors import ConfigError

_SHOWN = 60
"""characters of a wrong value"""


@dataclass(frozen=True)
class Kind:
    """A type with its range."""

    words: str
    """what was expected, for a message"""
    holds: Callable[[Any], bool]
    optional: bool = False
    """null is as good as an absent field"""


def is_whole(value: Any, low: int, high: int) -> bool:
    """Whether a JSON value is an integer in [low, high]; true and false are none."""
    return type(value) is int and low <= value <= high


def is_real(value: Any, low: float, high: float) -> bool:
    """Whether a JSON value is a number in [low, high]; NaN is in no range, however large an integer is."""
    return type(value) in (int, float) and low <= value <= high and math.isfinite(value)


def _whole(low: int, high: int, *, optional: bool = False) -> Kind:
    words = f"a whole number from {low} to {high}"
    return Kind(words, lambda value: is_whole(value, low, high), optional)


def _real(low: float, high: float, *, optional: bool = False) -> Kind:
    words = f"a number from {low:g} to {high:g}"
    return Kind(words, lambda value: is_real(value, low, high), optional)


def _list(words: str, holds: Callable[[Any], bool]) -> Kind:
    def all_hold(value: Any) -> bool:
        return isinstance(value, list) and all(map(holds, value))

    return Kind(f"a list of {words}", all_hold, optional=True)


def _is_token(value: Any) -> bool:
    return is_whole(value, -1, _SIZE)


_SIZE = 2**24
_MOST_LAYERS = 2**12
_MOST_EXPERTS = 2**12
_flag = Kind("true or false", lambda value: isinstance(value, bool), optional=True)
_text = Kind("a string", lambda value: isinstance(value, str), optional=True)
_object = Kind("an object", lambda value: isinstance(value, dict), optional=True)
_token = Kind("a token id", _is_token, optional=True)
_tokens = Kind(
    "a token id or a list of them",
    lambda value: _is_token(value) or (isinstance(value, list) and all(map(_is_token, value))),
    optional=True,
)
_size = _whole(1, _SIZE)
KINDS: Mapping[str, Kind] = {
    "model_type": Kind("a string", lambda value: isinstance(value, str)),
    "num_hidden_layers": _whole(1, _MOST_LAYERS),
    "hidden_size": _size,
    "num_attention_heads": _size,
    "num_key_value_heads": _whole(1, _SIZE, optional=True),
    "head_dim": _whole(1, _SIZE, optional=True),
    "intermediate_size": _size,
    "vocab_size": _size,
    "rms_norm_eps": _real(0, 1),
    "tie_word_embeddings": _flag,
    "initializer_range": _real(0, 1e6, optional=True),
    "layer_types": _list("strings", lambda value: isinstance(value, str)),
    "rope_theta": _real(1e-6, 1e30, optional=True),
    "rope_scaling": _object,
    "rope_parameters": _object,
    "partial_rotary_factor": _real(0, 1, optional=True),
    "original_max_position_embeddings": _whole(1, 2**40, optional=True),
    "no_rope_layers": _list("0 and 1", lambda value: is_whole(value, 0, 1)),
    "no_rope_layer_interval": _whole(1, _MOST_LAYERS, optional=True),
    "attention_bias": _flag,
    "mlp_bias": _flag,
    "use_qk_norm": _flag,
    "quantization_config": _object,
    "swiglu_alpha": _real(1e-6, 1e6),
    "swiglu_limit": _real(1e-6, 1e9),
    "sliding_window": _whole(0, 2**40, optional=True),
    "use_sliding_window": _flag,
    "max_window_layers": _whole(0, _MOST_LAYERS, optional=True),
    "sliding_window_pattern": _whole(1, _MOST_LAYERS, optional=True),
    "rope_local_base_freq": _real(1e-6, 1e30, optional=True),
    "query_pre_attn_scalar": _real(1e-9, 1e9),
    "attn_logit_softcapping": _real(1e-6, 1e9, optional=True),
    "final_logit_softcapping": _real(1e-6, 1e9, optional=True),
    "embedding_multiplier": _real(-1e6, 1e6, optional=True),
    "residual_multiplier": _real(-1e6, 1e6, optional=True),
    "attention_multiplier": _real(1e-9, 1e6, optional=True),
    "logits_scaling": _real(1e-6, 1e6, optional=True),
    "num_experts": _whole(1, _MOST_EXPERTS, optional=True),
    "num_local_experts": _whole(1, _MOST_EXPERTS, optional=True),
    "num_experts_per_tok": _whole(1, _MOST_EXPERTS),
    "moe_intermediate_size": _size,
    "shared_expert_intermediate_size": _whole(1, _SIZE, optional=True),
    "n_routed_experts": _whole(1, _MOST_EXPERTS, optional=True),
    "n_shared_experts": _whole(0, _MOST_EXPERTS, optional=True),
    "n_group": _whole(1, _MOST_EXPERTS, optional=True),
    "topk_group": _whole(1, _MOST_EXPERTS, optional=True),
    "first_k_dense_replace": _whole(0, _MOST_LAYERS, optional=True),
    "routed_scaling_factor": _real(1e-6, 1e6, optional=True),
    "norm_topk_prob": _flag,
    "num_nextn_predict_layers": _whole(0, _MOST_LAYERS, optional=True),
    "num_mtp_layers": _whole(0, _MOST_LAYERS, optional=True),
    "mlp_only_layers": _list("layer numbers", lambda value: is_whole(value, 0, _MOST_LAYERS)),
    "decoder_sparse_step": _whole(1, _MOST_LAYERS, optional=True),
    "q_lora_rank": _whole(1, _SIZE, optional=True),
    "kv_lora_rank": _size,
    "qk_nope_head_dim": _size,
    "qk_rope_head_dim": _size,
    "qk_head_dim": _whole(1, _SIZE, optional=True),
    "v_head_dim": _size,
    "rope_interleave": _flag,
    "topk_method": _text,
    # These change nothing here, but servers read them, and some of the checks before a run.
    "max_position_embeddings": _whole(1, 2**40, optional=True),
    "torch_dtype": _text,
    "dtype": _text,
    "use_cache": _flag,
    "bos_token_id": _tokens,
    "eos_token_id": _tokens,
    "pad_token_id": _token,
    "unk_token_id": _token,
    "architectures": _list("strings", lambda value: isinstance(value, str)),
    "transformers_version": _text,
}
"""field -> what it may hold"""
GENERATION_KINDS = {name: KINDS[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
"""the same of generation_config.json, as far as it is read here"""
ROPE_KINDS: Mapping[str, Kind] = {
    "rope_type": _text,
    "type": _text,
    "rope_theta": _real(1e-6, 1e30),
    "partial_rotary_factor": _real(0, 1, optional=True),
    "factor": _real(1, 1e9),
    "low_freq_factor": _real(1e-9, 1e9),
    "high_freq_factor": _real(1e-9, 1e9),
    "original_max_position_embeddings": _whole(2, 2**40, optional=True),
    "beta_fast": _real(1e-6, 1e9, optional=True),
    "beta_slow": _real(1e-6, 1e9, optional=True),
    "mscale": _real(0, 1e6, optional=True),
    "mscale_all_dim": _real(0, 1e6, optional=True),
    "attention_factor": _real(1e-6, 1e6, optional=True),
    "truncate": _flag,
    "short_factor": _list("numbers", lambda value: is_real(value, 1e-6, 1e9)),
    "long_factor": _list("numbers", lambda value: is_real(value, 1e-6, 1e9)),
}
"""the same of the rotary parameters"""


def check_kinds(fields: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """Raises ConfigError that names every one of `fields` that does not hold what `kinds` says."""
    wrong = [
        f"{name} = {shown(fields[name])}, expected {kind.words}"
        for name, kind in kinds.items()
        if name in fields and not kind.holds(fields[name]) and not (kind.optional and fields[name] is None)
    ]
    if wrong:
        raise ConfigError(f"{where}: {'; '.join(wrong)}; fetch the published file again, or correct it")


def shown(value: Any) -> str:
    """A JSON value for a message, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
