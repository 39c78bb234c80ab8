"""config.json as models are published with it: read, counted and rehearsed; weights are not needed for these.

The files have every field of the published ones. Phi-4-mini's rotary factors are ones here.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from mcore_rl.kindred import KINDRED
from mcore_rl.model.hf.architecture import Architecture, architecture_of
from mcore_rl.model.hf.families import FAMILIES
from mcore_rl.parallel.layout import Layout
from mcore_rl.plan.count import count_policy
from tests.launch.test_shrink import STAGES, check
from tests.sources import ROOT

PUBLISHED = {  # parameters, without those of layers that predict later tokens
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V3": 671_026_419_200,
    "GLM-4-9B-0414": 9_400_279_040,
    "GLM-4.5-Air": 106_852_251_264,
    "Kimi-K2": 1_026_408_232_448,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Moonlight-16B-A3B": 15_960_110_208,
    "OLMo-2-1124-7B": 7_298_617_344,
    "Olmo-3-7B": 7_298_011_136,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
    "Phi-4-mini-instruct": 3_836_021_760,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen2.5-7B": 7_615_616_512,
    "SmolLM3-3B": 3_075_098_624,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b-it": 999_885_952,
    "gpt-oss-20b": 20_914_757_184,
    "granite-3.1-8b": 8_170_848_256,
}


def fields(model: str) -> dict[str, Any]:
    return json.loads((ROOT / "tests" / "model" / "published" / f"{model}.json").read_text())


def counted(arch: Architecture) -> int:
    (stage,) = count_policy(arch, Layout.parse("tp1"))
    return stage.total


def theirs(model: str) -> transformers.PreTrainedConfig:
    """What transformers makes of the file."""
    hf = fields(model)
    kind = KINDRED.get(hf.pop("model_type"), fields(model)["model_type"])
    hf.pop("quantization_config", None)
    return transformers.AutoConfig.for_model(kind, **hf)


def test_every_family_is_among_them() -> None:
    kinds = {architecture_of(fields(model)).family for model in PUBLISHED}
    assert FAMILIES.keys() - kinds == {"llama", "qwen3", "qwen3_moe"}, "which examples/models has"


@pytest.mark.slow
@pytest.mark.parametrize("model", PUBLISHED)
def test_it_has_as_many_parameters_as_published(model: str) -> None:
    arch = architecture_of(fields(model))
    assert counted(arch) == PUBLISHED[model]
    config = theirs(model)
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config)
    biases = {name: buffer for name, buffer in module.named_buffers() if "e_score_correction" in name}
    tensors = [*module.parameters(), *biases.values()]
    assert sum(tensor.numel() for tensor in tensors) == PUBLISHED[model]


@pytest.mark.parametrize("model", PUBLISHED)
def test_what_transformers_writes_of_it_means_the_same(model: str) -> None:
    assert architecture_of(theirs(model).to_dict()) == architecture_of(fields(model))


@pytest.mark.parametrize("model", PUBLISHED)
def test_its_rehearsal_has_every_part(model: str) -> None:
    for parallel in STAGES:
        check(fields(model), parallel)


def test_the_count_sees_one_bias_too_many() -> None:
    """Negative control: GLM-4-9B without the biases of its queries, keys and values."""
    less = architecture_of(fields("GLM-4-9B-0414") | {"attention_bias": False})
    assert PUBLISHED["GLM-4-9B-0414"] - counted(less) == 40 * (4096 + 2 * 256)
