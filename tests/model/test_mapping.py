"""The table between Hugging Face and Megatron: strict about what it gets, one name for every parameter."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mcore_rl.model.hf.architecture import architecture_of
from mcore_rl.model.hf.parameters import ParameterMap, canonical
from tests.model.families import FAMILIES
from tests.model.test_architecture import hf_config


def mapping_of(family: str, **change) -> ParameterMap:
    arch = replace(architecture_of(hf_config(family)), **change)
    return ParameterMap(arch, arch.vocab)


def forms(mapping: ParameterMap, dtype: str = "BF16") -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (shape, dtype) for name, shape in mapping.hf_shapes().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_complete_model_has_no_problems(family: str) -> None:
    mapping = mapping_of(family)
    assert mapping.problems(forms(mapping)) == []
    for entry in mapping.entries():
        assert mapping.entry(entry.megatron) == entry


def test_every_problem_is_listed() -> None:
    mapping = mapping_of("qwen2")
    found = forms(mapping)
    del found["model.layers.1.self_attn.k_proj.bias"]
    found["model.layers.7.mlp.up_proj.weight"] = ((1,), "BF16")
    found["model.norm.weight"] = ((63,), "BF16")
    found["model.layers.0.mlp.up_proj.weight"] = (found["model.layers.0.mlp.up_proj.weight"][0], "F32")
    found["model.layers.0.mlp.down_proj.weight"] = (
        found["model.layers.0.mlp.down_proj.weight"][0],
        "F8_E4M3",
    )
    assert mapping.problems(found) == [
        "missing model.layers.1.self_attn.k_proj.bias",
        "unexpected model.layers.7.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight has type F8_E4M3, not one of F64, F32, F16, BF16",
        "model.norm.weight has shape (63,), config.json asks for (64,)",
        "model.layers.0.mlp.up_proj.weight has type F32, model.layers.0.mlp.gate_proj.weight BF16",
    ]


def test_tied_and_untied_are_not_mixed_up() -> None:
    tied, untied = mapping_of("qwen2", tied=True), mapping_of("qwen2", tied=False)
    assert tied.problems(forms(untied)) == [
        "unexpected lm_head.weight (config.json has tie_word_embeddings = true)"
    ]
    assert untied.problems(forms(tied)) == [
        "missing lm_head.weight (config.json has tie_word_embeddings = false)"
    ]


LAYER = "decoder.layers.3."


@pytest.mark.parametrize(
    ("fused", "name"),
    [
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        ("mlp.experts.linear_fc1.weight12", "mlp.experts.local_experts.12.linear_fc1.weight"),
        ("mlp.experts.linear_fc2.weight0", "mlp.experts.local_experts.0.linear_fc2.weight"),
    ],
)
def test_transformer_engine_names_become_those_of_the_portable_spec(fused: str, name: str) -> None:
    assert canonical(LAYER + fused) == LAYER + name
    assert (
        mapping_of("qwen3_moe").entry(canonical("decoder.layers.0." + fused)).megatron
        == "decoder.layers.0." + name
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_canonical_names_stay(family: str) -> None:
    for entry in mapping_of(family).entries():
        assert canonical(entry.megatron) == entry.megatron


def test_the_fused_names_are_those_of_megatron() -> None:
    """Megatron writes its own unfused layers under the fused names: the same pairs, the other way round."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    pairs = get_gpt_layer_local_spec().submodules.sharded_state_dict_keys_map
    assert len(pairs) == 2
    for unfused, fused in pairs.items():
        assert canonical(f"{LAYER}{fused}weight") == f"{LAYER}{unfused}weight"
