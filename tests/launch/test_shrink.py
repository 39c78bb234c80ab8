"""The tiny model of a rehearsal has every part of the model that it stands for, in every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers

from mcore_rl.config.parallel import ParallelConfig
from mcore_rl.errors import ConfigError
from mcore_rl.launch.shrink import kind_of, shrink_model
from mcore_rl.model.hf.architecture import Architecture, architecture_of
from mcore_rl.model.hf.windows import FULL, SLIDING
from tests.model.families import FAMILIES, GEMMA, WINDOW
from tests.model.support import DENSE, MOE

VOCABULARY = 14
SIZES = {"layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "init_std", "windows"}
"""fields of Architecture that a tiny model has others of; those that are objects are compared below"""
OBJECTS = {"rotary", "local_rotary", "experts", "scales", "latent", "unturned_layers", "quantized"}
STAGES = (ParallelConfig(), ParallelConfig(pipeline=2, virtual_pipeline=2))


def written(family: str, **changes: Any) -> dict[str, Any]:
    """config.json of the tests' tiny model, as transformers writes it, with layers in plenty."""
    kind, settings = FAMILIES[family]
    return getattr(transformers, kind)(**settings | changes).to_dict()


def kinds(arch: Architecture) -> set[tuple[bool, bool, bool]]:
    return {kind_of(arch, layer) for layer in range(arch.layers)}


def parts(arch: Architecture) -> dict[str, Any]:
    """What is there and what is not, whatever its size."""
    experts, latent = arch.experts, arch.latent
    found: dict[str, Any] = {name: value for name, value in vars(arch).items() if name not in SIZES | OBJECTS}
    ropes = {"rotary": arch.rotary, "local": arch.local_rotary}
    found |= {
        name: rope and (type(rope.scaling), rope.theta, rope.interleaved) for name, rope in ropes.items()
    }
    found["share turned"] = arch.rotary.channels / (latent.turned if latent else arch.head_dim)
    if arch.local_rotary:
        found["share turned locally"] = arch.local_rotary.channels / arch.head_dim
    found["latent"] = latent and latent.query_rank is None
    found["scales"] = replace(arch.scales, embedding=arch.scales.rounded or arch.scales.embedding)
    found["experts"] = experts and {
        "groups": (experts.groups > 1, experts.groups_per_token < experts.groups, experts.judged_by),
        "scores": (experts.sigmoid, experts.normalized, experts.scale),
        "beside": (experts.shared > 0, experts.shared_gate, experts.biased),
    }
    return found


def check(hf: dict[str, Any], parallel: ParallelConfig) -> Architecture:
    """The tiny architecture, which has all that `hf` asks for."""
    small = shrink_model(hf, parallel, VOCABULARY, "config.json")
    before, after = architecture_of(hf), architecture_of(small)
    assert kinds(after) == kinds(before)
    assert parts(after) == parts(before)
    assert after.layers % (parallel.pipeline * (parallel.virtual_pipeline or 1)) == 0
    assert (after.vocab, after.hidden) == (VOCABULARY, 64)
    assert after.layers <= 4
    assert max((after.windows.of(layer) or 0) for layer in range(after.layers)) <= 8
    return after


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_stays(family: str) -> None:
    for parallel in STAGES:
        check(written(family), parallel)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_tiny_model_alike(family: str) -> None:
    small = shrink_model(written(family), ParallelConfig(), VOCABULARY, "config.json")
    theirs = getattr(transformers, FAMILIES[family][0]).from_dict(dict(small)).to_dict()
    assert architecture_of(theirs) == architecture_of(small)


SIXTH = [FULL if (layer + 1) % 6 == 0 else SLIDING for layer in range(26)]
"""Gemma 3 1B: neither its first two layers nor its last two are of both kinds"""

ONE_ROPE = {name: value for name, value in (DENSE | WINDOW).items() if name != "rope_parameters"}


@pytest.mark.parametrize(
    "hf",
    [
        written("gemma3", num_hidden_layers=26, layer_types=SIXTH),
        ONE_ROPE | GEMMA | {"model_type": "gemma3_text", "num_hidden_layers": 26},
        MOE | {"model_type": "qwen3_moe", "num_hidden_layers": 8, "mlp_only_layers": [5]},
        MOE | {"model_type": "qwen3_moe", "num_hidden_layers": 8, "mlp_only_layers": [0, 1, 2]},
        MOE | {"model_type": "qwen3_moe", "num_hidden_layers": 8, "decoder_sparse_step": 4},
        DENSE | {"model_type": "smollm3", "num_hidden_layers": 36},
        ONE_ROPE | {"model_type": "olmo3", "num_hidden_layers": 32},
        written("deepseek_v3", num_hidden_layers=8, first_k_dense_replace=3),
        written("glm4_moe", n_routed_experts=16, n_group=8, topk_group=8),
    ],
)
def test_kinds_of_layers_that_a_slice_would_lose(hf: dict[str, Any]) -> None:
    for parallel in STAGES:
        after = check(hf, parallel)
        assert len(kinds(after)) == 2


def test_the_sizes_of_absent_fields_are_small_too() -> None:
    """transformers' own are those of the published models, and would not fit the tiny ones."""
    for family, absent in (("mixtral", "num_key_value_heads"), ("deepseek_v3", "kv_lora_rank")):
        hf = {name: value for name, value in written(family).items() if name != absent}
        assert check(hf, ParallelConfig()).hidden == 64


def test_a_model_that_is_not_supported_is_named() -> None:
    with pytest.raises(ConfigError, match=r'where/config\.json: model_type "gpt2" is not supported'):
        shrink_model({"model_type": "gpt2"}, ParallelConfig(), VOCABULARY, "where/config.json")
