"""The table against that of mbridge, which others convert with: names, order and shards of every parameter.

mbridge builds models of Transformer Engine only, so its conversions are called by themselves, on its names.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from mcore_rl.model.hf.parameters import ParameterEntry, ParameterMap, canonical
from tests.model.families import FAMILIES
from tests.model.test_mapping import mapping_of

pytest.importorskip("mbridge", reason="pip install 'mcore-rl[dev]' installs mbridge")

# of Megatron's TransformerConfig, which mbridge fills
pytestmark = pytest.mark.filterwarnings("ignore:full scope is deprecated")

UNKNOWN = ("mistral", "olmo2", "granite", "phi3", "phi3_longrope", "smollm3", "glm4")
UNKNOWN += ("mistral_window", "olmo3", "gemma2", "gemma3", "gpt_oss")
UNKNOWN += ("deepseek_v2", "deepseek_v2_groups")
"""families that mbridge does not register"""
BROKEN = ("deepseek_v3", "deepseek_v3_halves")
"""families whose bridge reads `rope_theta` where transformers 5 has it no more"""
UNNAMED = ("llama_biased", "qwen3_window")
"""models with a bias that it has no name for"""
COVERED = [name for name in FAMILIES if name not in UNKNOWN + UNNAMED + BROKEN]
RANKS = 2


def bridge_of(family: str):
    """mbridge's conversions for a tiny model of this family, without a process group."""
    from mbridge.core.auto_bridge import _MODEL_REGISTRY
    from mbridge.core.parallel_states import ParallelStates

    config_class, arguments = FAMILIES[family]
    config = getattr(transformers, config_class)(**arguments)
    registered = _MODEL_REGISTRY[config.model_type]
    # a tied model changes its class's table, and with it every later bridge of the family
    own_table = {"_DIRECT_MAPPING": dict(registered._DIRECT_MAPPING)}
    return type(registered.__name__, (registered,), own_table)(config, torch.float32, ParallelStates())


def fused(entry: ParameterEntry, mapping: ParameterMap) -> str:
    """The parameter's name where Transformer Engine builds the layers."""
    name = entry.megatron.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    if entry.layer is not None and not mapping.arch.is_sparse(entry.layer):
        name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    if entry.is_expert:
        head, _, tail = name.partition(".local_experts.")
        number, matrix, _ = tail.split(".")
        name = f"{head}.{matrix}.weight{number}"
    assert canonical(name) == entry.megatron
    return name


def drawn(entry: ParameterEntry, mapping: ParameterMap) -> list[Tensor]:
    return [torch.randn(shape) for shape in mapping.shapes(entry.rule)]


@pytest.mark.parametrize("family", COVERED)
def test_every_parameter(family: str) -> None:
    mapping, bridge = mapping_of(family), bridge_of(family)
    for entry in mapping.entries():
        if mapping.arch.experts and entry.layer is not None and not mapping.arch.is_sparse(entry.layer):
            continue  # mbridge knows no dense layer among sparse ones
        name = fused(entry, mapping)
        assert bridge._weight_name_mapping_mcore_to_hf(name) == list(entry.hf)
        hf = drawn(entry, mapping)
        whole = bridge._weight_to_mcore_format(name, hf)
        assert torch.equal(mapping.to_shard(entry, hf, 0, 1), whole), name
        ours = [mapping.to_shard(entry, hf, rank, RANKS) for rank in range(RANKS)]
        if (
            not entry.is_expert
        ):  # theirs are cut by expert tensor parallelism, which this project does not have
            theirs = bridge._weight_split_across_tp(name, whole, nn.Parameter(ours[0]), RANKS)
            assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True)), name
        for mine, other in zip(hf, bridge._weight_to_hf_format(name, whole)[1], strict=True):
            assert torch.equal(mine, other), name


def test_a_wrong_arrangement_is_seen() -> None:
    """Query, key and value one after the other, rather than per group."""
    mapping, bridge = mapping_of("qwen3"), bridge_of("qwen3")
    entry = mapping.entry("decoder.layers.0.self_attention.linear_qkv.weight")
    hf = drawn(entry, mapping)
    whole = bridge._weight_to_mcore_format(fused(entry, mapping), hf)
    assert not torch.equal(torch.cat(hf), whole)
