"""config.json is read completely, or refused by the name of the field."""

from __future__ import annotations

import re

import pytest
import torch

from mcore_rl.errors import ConfigError
from mcore_rl.model.architecture import RopeScaling, architecture_of
from mcore_rl.model.rotary import rotary_frequencies
from tests.model.families import FAMILIES, LLAMA3


def hf_config(family: str, **change) -> dict:
    import transformers

    kind, settings = FAMILIES[family]
    config = getattr(transformers, kind)(**settings).to_diff_dict() | change
    return {name: value for name, value in config.items() if value != "absent"}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_read(family: str) -> None:
    arch = architecture_of(hf_config(family))
    assert arch.tied is (family in ("llama", "qwen2_tied"))
    assert arch.qkv_bias is family.startswith("qwen2")
    assert arch.qk_norm is family.startswith("qwen3")
    assert (arch.experts is not None) is (family == "qwen3_moe")
    assert arch.head_dim == 8


REFUSED = [
    ("llama", {"attention_bias": True}, "attention_bias = true is not supported, only false"),
    ("llama", {"mlp_bias": True}, "mlp_bias = true is not supported, only false"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported, only 0.0"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: no supported field"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0: no supported field"),
    ("llama", {"quantization_config": {"bits": 4}}, 'quantization_config = {"bits": 4}: no supported field'),
    ("llama", {"auto_map": {"a": "b"}}, 'auto_map = {"a": "b"}: no supported field'),
    ("mistral", {"sliding_window": 4096}, "sliding_window = 4096 is not supported, only null"),
    ("mistral", {"sliding_window": "absent"}, "sliding_window = 4096 is not supported, only null"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window = true is not supported, only false"),
    ("qwen2", {"layer_types": ["sliding_attention"]}, "layer_types ['sliding_attention'] are not supported"),
    ("qwen3", {"attention_bias": True}, "attention_bias = true"),
    (
        "qwen3_moe",
        {"shared_expert_intermediate_size": 8},
        "shared_expert_intermediate_size = 8: no supported",
    ),
    ("qwen3", {"num_experts": 8}, "num_experts = 8: no supported field of 'qwen3'"),
    ("qwen3", {"num_hidden_layers": "absent"}, "field 'num_hidden_layers' is missing"),
    ("qwen3", {"num_hidden_layers": "2"}, "not positive whole numbers: layers = '2'"),
    ("qwen3", {"num_key_value_heads": 3}, "3 key/value heads do not divide 8 attention heads"),
    ("qwen3", {"head_dim": 7}, "head_dim = 7 is odd"),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_type": "dynamic"}}, "rope_type 'dynamic' is not supported"),
    (
        "llama",
        {"rope_parameters": LLAMA3 | {"rope_type": "longrope"}},
        "rope_type 'longrope' is not supported",
    ),
    ("llama", {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ("llama", {"rope_parameters": LLAMA3 | {"beta_fast": 1}}, "['beta_fast'] are not supported with"),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_type": "default"}}, "'factor', 'high_freq_factor'"),
    ("llama", {"rope_parameters": {"rope_type": "default"}}, "field 'rope_theta' is missing"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters contradicts"),
    ("llama", {"rope_theta": 5e5}, "rope_parameters contradicts rope_scaling or rope_theta"),
]


@pytest.mark.parametrize(("family", "change", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_changes_the_maths_is_refused_by_name(family: str, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        architecture_of(hf_config(family, **change), "DIR/config.json")
    assert str(raised.value).startswith("DIR/config.json: ")


def test_null_is_as_good_as_absent() -> None:
    assert architecture_of(hf_config("llama", final_logit_softcapping=None)).family == "llama"


def test_the_names_of_transformers_4_mean_the_same() -> None:
    old = hf_config(
        "llama", rope_parameters="absent", rope_theta=LLAMA3["rope_theta"], torch_dtype="bfloat16"
    )
    old["rope_scaling"] = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    assert architecture_of(old) == architecture_of(hf_config("llama"))
    assert architecture_of(old).rope_scaling == RopeScaling(8.0, 1.0, 4.0, 16)


@pytest.mark.parametrize("scaling", [None, LLAMA3, LLAMA3 | {"original_max_position_embeddings": 8192}])
def test_rotary_frequencies_are_those_of_transformers(scaling: dict | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 5e5} if scaling is None else scaling
    config = hf_config("llama", rope_parameters=rope, head_dim=128)
    expected = LlamaRotaryEmbedding(LlamaConfig(**config)).inv_freq
    torch.testing.assert_close(rotary_frequencies(architecture_of(config)), expected, rtol=2e-7, atol=0)
