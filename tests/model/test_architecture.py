"""config.json is read completely, or refused by the name of the field."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.data.balance import model_shape
from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.architecture import architecture_of, read_hf_config
from mcore_rl.model.hf.fields import KINDS
from mcore_rl.model.hf.files import INDEX, check_side_files, checkpoint_files
from mcore_rl.model.hf.rope import Llama3
from mcore_rl.model.rotary import rotary_frequencies
from tests.any_json import examples, json_values
from tests.model.families import FAMILIES, HALF_TURNED, LLAMA3, LONGROPE, YARN


def hf_config(family: str, **change) -> dict:
    import transformers

    kind, settings = FAMILIES[family]
    config = getattr(transformers, kind)(**settings).to_diff_dict() | change
    return {name: value for name, value in config.items() if value != "absent"}


VALID = {family: hf_config(family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_is_read(family: str) -> None:
    arch = architecture_of(hf_config(family))
    assert arch.tied is (family in ("llama", "qwen2_tied", "granite", "gemma2", "gemma3"))
    assert arch.qkv_bias is (family.startswith(("qwen2", "glm4")) or family in BIASED)
    assert arch.output_bias is (family in BIASED)
    assert (arch.windows.size > 0) is (
        family.endswith("window") or family.startswith(("gemma", "olmo3", "gpt"))
    )
    assert arch.qk_norm is (family.startswith("qwen3") or family in ("glm4_moe", "gemma3"))
    assert (arch.experts is not None) is ("num_experts_per_tok" in FAMILIES[family][1])
    assert arch.head_dim == (16 if arch.latent else 8)
    assert (arch.latent is not None) is family.startswith("deepseek")


BIASED = ("llama_biased", "qwen3_window", "gpt_oss")
"""with a bias on the output projection"""
REFUSED = [
    ("mistral", {"mlp_bias": True}, "mlp_bias = true: no supported field of 'mistral'"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported, only 0.0"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: no supported field"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0: no supported field"),
    (
        "llama",
        {"quantization_config": {"bits": 4}},
        'quantization_config = {"activation_scheme": null, "bits": 4',
    ),
    ("llama", {"auto_map": {"a": "b"}}, 'auto_map = {"a": "b"}: no supported field'),
    ("llama", {"sliding_window": 4096}, "sliding_window = 4096: no supported field of 'llama'"),
    ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "['sliding_attention'] are not supp"),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "contradict sliding_window = null"),
    ("mistral_window", {"layer_types": ["full_attention"] * 2}, "contradict sliding_window = 5"),
    ("mistral", {"sliding_window": 0}, "sliding_window = 0 is not supported"),
    (
        "qwen2",
        {"layer_types": ["sliding_attention"] * 2, "sliding_window": 5},
        "sliding_attention, and use_sliding_window = false",
    ),
    ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer_types ['chunked_attention'] are not supp"),
    ("gemma2", {"sliding_window": None}, "names sliding_attention, and sliding_window = null"),
    ("gemma2", {"sliding_window": None, "layer_types": None}, "sliding_window = null is not supported"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = true is not supported"),
    ("gemma2", {"hidden_activation": "gelu"}, 'hidden_activation = "gelu" is not supported'),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not supported, only null"),
    ("gemma3", {"rope_parameters": LLAMA3}, "is one object for full_attention and one for sliding_attention"),
    ("gemma3", {"rope_theta": 5e5}, "rope_parameters contradicts rope_scaling or rope_theta"),
    ("olmo3", {"rope_theta": 1e4, "rope_parameters": None}, "only 500000.0: transformers takes it for full"),
    (
        "qwen3_moe",
        {"shared_expert_intermediate_size": 8},
        "shared_expert_intermediate_size = 8: no supported",
    ),
    ("qwen3", {"num_experts": 8}, "num_experts = 8: no supported field of 'qwen3'"),
    ("qwen3", {"num_hidden_layers": "absent"}, "field 'num_hidden_layers' is missing"),
    ("qwen3", {"num_hidden_layers": "2"}, 'num_hidden_layers = "2", expected a whole number'),
    ("qwen3", {"num_key_value_heads": 3}, "3 key/value heads do not divide 8 attention heads"),
    ("qwen3", {"head_dim": 7}, "head_dim = 7 is odd"),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_type": "mrope"}}, "rope_type 'mrope' is not supported"),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_type": "yarn"}}, "['high_freq_factor', 'low_freq_factor']"),
    ("qwen2", {"rope_parameters": YARN | {"beta_fast": 0.5}}, "'yarn' needs beta_fast >= beta_slow"),
    ("qwen2", {"rope_parameters": YARN | {"short_factor": [1.0]}}, "['short_factor'] are not supported with"),
    (
        "llama",
        {"rope_parameters": LONGROPE | {"partial_rotary_factor": 1.0}},
        "short_factor has 3 numbers, but by",
    ),
    ("phi3", {"rope_parameters": HALF_TURNED | {"partial_rotary_factor": 0.2}}, "turns 1 of a head's 8"),
    (
        "phi3",
        {"partial_rotary_factor": 0.5, "rope_parameters": HALF_TURNED | {"partial_rotary_factor": 1.0}},
        "partial_rotary_factor = 0.5 contradicts",
    ),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok = 9 of num_experts = 4"),
    ("smollm3", {"no_rope_layers": [1, 1, 0]}, "no_rope_layers names 3 layers, num_hidden_layers is 2"),
    ("glm4_moe", {"topk_group": 1}, "do not leave num_experts_per_tok = 4 of 8"),
    (
        "glm4_moe",
        {"n_group": 8, "topk_group": 4},
        "makes groups of 1 experts, and a group is judged by its 2",
    ),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = true is not supported, only false"),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc' is not supported, only greedy"),
    ("deepseek_v3", {"topk_method": "greedy"}, 'topk_method = "greedy" is not supported, only "noaux_tc"'),
    ("deepseek_v3", {"attention_bias": True}, "attention_bias = true is not supported, only false"),
    (
        "deepseek_v3",
        {"num_key_value_heads": 4},
        "num_key_value_heads = 4 contradicts num_attention_heads = 8",
    ),
    ("deepseek_v3", {"qk_head_dim": 15}, "qk_head_dim = 15 contradicts qk_nope_head_dim + qk_rope_head_dim"),
    ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7 is odd"),
    ("llama", {"kv_lora_rank": 8}, "kv_lora_rank = 8: no supported field of 'llama'"),
    ("glm4_moe", {"num_experts": 4}, "contradicts another name of num_experts"),
    ("llama", {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ("llama", {"rope_parameters": LLAMA3 | {"beta_fast": 1}}, "['beta_fast'] are not supported with"),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_type": "default"}}, "'factor', 'high_freq_factor'"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters contradicts"),
    ("llama", {"rope_theta": 5e5}, "rope_parameters contradicts rope_scaling or rope_theta"),
]


@pytest.mark.parametrize(("family", "change", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_changes_the_maths_is_refused_by_name(family: str, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        architecture_of(hf_config(family, **change), "DIR/config.json")
    assert str(raised.value).startswith("DIR/config.json: ")


WRONG: list[Any] = ["8", True, None, -1, 0, 1.5, 10**400, float("nan"), 1e308, [8], {"a": 8}, 2**40]
NUMBERS = [
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("vocab_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("field", NUMBERS)
def test_a_size_of_the_wrong_type_or_range_is_refused_by_name(field: str, value: Any) -> None:
    """A count of experts that is null is as good as absent, which is refused too."""
    hf = hf_config("qwen3_moe", num_experts=8, num_local_experts="absent") | {field: value}
    with pytest.raises(ConfigError, match=rf"^config.json: .*{field}.*; "):
        architecture_of(hf)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("model_type", value) for value in WRONG],
        *[("layer_types", value) for value in ("full_attention", 3, [3], [["full_attention"]], [{}])],
        ("layer_types", ["full_attention"]),
        *[("rope_parameters", value) for value in ("default", 3, ["rope_theta"])],
        *[("rms_norm_eps", value) for value in ("1e-6", True, None, -1.0, float("nan"), 10**400, [1])],
        *[("initializer_range", value) for value in ("0.02", True, -1.0, float("inf"), 10**400, {})],
        *[("rope_theta", value) for value in ("1e4", True, 0, -1.0, 10**400, [1e4])],
        *[("tie_word_embeddings", value) for value in ("false", 0, [])],
        *[("norm_topk_prob", value) for value in ("false", 1, [])],
        *[("mlp_only_layers", value) for value in ("0", 0, ["0"], [-1], [True], [[0]])],
        *[("decoder_sparse_step", value) for value in (0, -1, "1", 1.0)],
        *[("head_dim", value) for value in ("8", -8, 0, 8.0, True, 10**400)],
        *[("max_position_embeddings", value) for value in ("512", -1, 0, 1.5, True)],
        *[("pad_token_id", value) for value in ("0", 0.5, [0])],
        *[("eos_token_id", value) for value in ("0", 0.5, ["0"], [[0]])],
        *[("attention_dropout", value) for value in ("0", [0.0], None, 10**400)],
        ("torch_dtype", ["float32"]),
    ],
    ids=lambda value: str(value)[:24],
)
def test_any_field_of_the_wrong_type_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^config.json: .*{field}"):
        architecture_of(hf_config("qwen3_moe") | {field: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[
            (name, value)
            for name in ("factor", "rope_theta")
            for value in ("8", None, True, -1, 10**400, [8])
        ],
        ("original_max_position_embeddings", 16.5),
        ("rope_type", 3),
        ("rope_type", ["llama3"]),
        ("partial_rotary_factor", "1.0"),
    ],
    ids=lambda value: str(value)[:24],
)
@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
def test_a_rotary_parameter_of_the_wrong_type_is_refused_by_name(field: str, name: str, value: Any) -> None:
    hf = hf_config("llama", rope_parameters="absent") | {field: LLAMA3 | {name: value}}
    with pytest.raises(ConfigError, match=rf"^config.json: {field}: {name} = "):
        architecture_of(hf)


def test_fields_that_change_nothing_are_read_over() -> None:
    plain = architecture_of(hf_config("llama"))
    assert architecture_of(hf_config("llama", unk_token_id=0, _model_name_or_path="m")) == plain


def test_one_expert_a_token_with_normalised_weights_is_refused_by_both_fields() -> None:
    one = hf_config("qwen3_moe", num_experts_per_tok=1)
    with pytest.raises(ConfigError, match="num_experts_per_tok = 1 with norm_topk_prob = true"):
        architecture_of(one | {"norm_topk_prob": True})
    experts = architecture_of(one | {"norm_topk_prob": False}).experts
    assert experts is not None
    assert experts.per_token == 1, "the control"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, r"config.json:1: nested too deeply"),
        (b'{"a": ' * 400 + b"1" + b"}" * 400, r"config.json:1: nested too deeply"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", r"config.json:1: an integer of more than 4300 digits"),
        (b'{"a": 1,\n"b": \xff}', r"config.json:2: byte 14 is not UTF-8"),
        (b'{"a": 1,\n"b"', r"config.json:2: not JSON at column 4"),
        (b"[1]", r"config.json: holds a list"),
        (b"", r"config.json:1: not JSON"),
    ],
)
def test_a_file_that_is_no_object_is_refused_with_its_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config.json: not a plain file; "):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", b"[" * 10_000, "generation_config.json:1: nested too deeply"),
        ("generation_config.json", b'{"eos_token_id": "x"}', 'eos_token_id = "x", expected a token id'),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: holds a list"),
        ("special_tokens_map.json", b"\xff", "special_tokens_map.json:1: byte 0 is not UTF-8"),
        ("added_tokens.json", b'{"a": ' + b"9" * 5000 + b"}", "added_tokens.json:1: an integer of more than"),
    ],
)
def test_a_damaged_file_beside_the_weights_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    check_side_files(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        check_side_files(tmp_path)


@pytest.mark.parametrize(
    "content", [b"[" * 10_000, b"[]", b'{"weight_map": null}', b'{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_of_shards_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(ConfigError, match=INDEX):
        checkpoint_files(tmp_path)


fields = st.sampled_from(
    [*KINDS, "rope_type", "hidden_act", "sliding_window", "attention_bias", "unheard_of"]
)


@settings(max_examples=examples(150))
@given(st.sampled_from([*FAMILIES]), st.dictionaries(fields, json_values(), max_size=3), st.booleans())
def test_any_config_json_is_read_or_refused_by_the_name_of_a_field(
    family: str, change: dict[str, Any], in_rope: bool
) -> None:
    hf = copy.deepcopy(VALID[family])
    inner = hf.get("rope_parameters") if in_rope else hf
    (inner or hf).update(change)
    try:
        arch = architecture_of(hf)
    except ConfigError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert refused.startswith("config.json: ")
        assert len(refused) < 2000
        return
    assert all(type(n) is int and n > 0 for n in (arch.layers, arch.heads, arch.head_dim, arch.vocab))
    model_shape(hf)


def test_null_is_as_good_as_absent() -> None:
    assert architecture_of(hf_config("llama", final_logit_softcapping=None)).family == "llama"


def test_the_names_of_transformers_4_mean_the_same() -> None:
    old = hf_config(
        "llama", rope_parameters="absent", rope_theta=LLAMA3["rope_theta"], torch_dtype="bfloat16"
    )
    old["rope_scaling"] = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    assert architecture_of(old) == architecture_of(hf_config("llama"))
    assert architecture_of(old).rotary.scaling == Llama3(8.0, 1.0, 4.0, 16)


LONG = {"short_factor": [1.0 + n / 9 for n in range(64)], "long_factor": [9.0] * 64}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "llama3": LLAMA3,
    "llama3 8192": LLAMA3 | {"original_max_position_embeddings": 8192},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
    "yarn": YARN,
    "yarn 4096": YARN | {"original_max_position_embeddings": 4096, "beta_fast": None, "beta_slow": 2.0},
    "yarn untruncated": YARN | {"original_max_position_embeddings": 4096, "truncate": False},
    "yarn mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.4},
    "yarn factor": YARN | {"attention_factor": 1.3},
    "longrope": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64} | LONG,
    "longrope factor": LONG
    | {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    | {"attention_factor": 1.7, "factor": 8.0},
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_the_rotary_embedding_is_that_of_transformers(rope: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = hf_config("llama", rope_parameters=rope, head_dim=128, max_position_embeddings=128)
    expected = LlamaRotaryEmbedding(LlamaConfig(**copy.deepcopy(config)))
    rotary = architecture_of(config).rotary
    torch.testing.assert_close(rotary_frequencies(rotary), expected.inv_freq, rtol=2e-7, atol=0)
    assert rotary.scale == pytest.approx(expected.attention_scaling, rel=1e-15)
    assert (rotary.longest is not None) is (rope["rope_type"] in ("dynamic", "longrope"))


MANY = {f"field_{number}": 1 for number in range(5000)}
LONG = "k" * 50_000


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": LONG}},
        {"rope_parameters": {"rope_theta": 1e4, LONG: 1}},
        {"rope_parameters": {"rope_theta": 1e4} | MANY},
        {"layer_types": [LONG]},
        {"layer_types": list(MANY)},
        {LONG: 1},
        MANY,
    ],
    ids=lambda fields: ",".join(fields)[:20],
)
def test_a_message_repeats_the_beginning_of_what_a_config_holds(fields: dict) -> None:
    with pytest.raises(ConfigError) as refused:
        architecture_of(VALID["qwen3"] | fields)
    assert len(str(refused.value)) < 3000
