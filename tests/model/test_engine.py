"""Transformer Engine's layers, as built for every family and recipe: kinds, names, weights there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from mcore_rl.model import spec
from mcore_rl.model.fusions import groups_experts
from mcore_rl.model.hf.architecture import Architecture, read_architecture
from mcore_rl.model.hf.parameters import canonical
from mcore_rl.model.spec import transformer_config
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.precision import RECIPES, Fp8
from mcore_rl.weights.disk import export
from tests.model.conftest import save
from tests.model.engine import NEEDS_ENGINE, built
from tests.model.families import FAMILIES
from tests.model.support import at_layout

pytestmark = NEEDS_ENGINE


def described(mesh: Mesh, directory: Path, recipe: str | None, target: Path) -> dict[str, Any]:
    """Its parameters' names and its modules' kinds; the weights exported to `target`."""
    model = built(mesh, directory, recipe)
    export(model, target)
    (chunk,) = model.unwrapped
    kinds = {name: f"{type(m).__module__}.{type(m).__name__}" for name, m in chunk.named_modules()}
    return {
        "names": [name for name, _ in chunk.named_parameters()],
        "canonical": list(global_parameters(model.unwrapped)),
        "entries": [entry.megatron for entry in model.mapping.entries()],
        "kinds": kinds,
        "fp8": (model.config.fp8, model.config.fp8_recipe if model.config.fp8 else None),
    }


@pytest.fixture(scope="session", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def directory(family: str, tmp_path_factory) -> Path:
    """A model in bf16; norm weights and biases are not those of a new model."""
    kind, settings = FAMILIES[family]
    config = getattr(transformers, kind)(**settings)
    where = save(
        transformers.AutoModelForCausalLM.from_config, config, tmp_path_factory.mktemp(family) / "hf"
    )
    weights = {name: tensor.bfloat16() for name, tensor in load_file(where / "model.safetensors").items()}
    save_file(weights, where / "model.safetensors", metadata={"format": "pt"})
    return where


def unequal(directory: Path, exported: Path) -> list[str]:
    """HF tensors that are not bitwise the same in both, of one rank or more."""
    found: dict[str, Tensor] = {}
    for file in exported.glob("*.safetensors"):
        found |= load_file(file)
    original = load_file(directory / "model.safetensors")
    assert found.keys() == original.keys()
    return [name for name, tensor in original.items() if not torch.equal(found[name], tensor)]


NORM = "transformer_engine.pytorch.module.rmsnorm.RMSNorm"
GROUPED_COLUMN, GROUPED_ROW = "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"
FUSED, COLUMN, ROW = "TELayerNormColumnParallelLinear", "TEColumnParallelLinear", "TERowParallelLinear"


def attention_parts(arch: Architecture) -> dict[str, str]:
    """Module of attention -> its class."""
    parts = {"core_attention": "PackedEngineAttention", "linear_proj": ROW}
    if arch.latent is None:
        return parts | {"linear_qkv": FUSED if arch.input_norms else COLUMN}
    parts |= {"linear_kv_down_proj": "TELinear", "kv_layernorm": "RMSNorm", "linear_kv_up_proj": COLUMN}
    if arch.latent.query_rank is None:
        return parts | {"linear_q_proj": COLUMN}
    return parts | {"linear_q_down_proj": "TELinear", "q_layernorm": "RMSNorm", "linear_q_up_proj": COLUMN}


def check_layers(found: dict[str, str], arch: Architecture, fp8: Fp8 | None) -> None:
    """Every layer is of Transformer Engine's modules; the lm_head is Megatron's own, under our class."""
    last = {name: kind.rsplit(".", 1)[-1] for name, kind in found.items()}
    for layer in range(arch.layers):
        here = f"decoder.layers.{layer}."
        attention = attention_parts(arch)
        assert {part: last[f"{here}self_attention.{part}"] for part in attention} == attention
        sparse = arch.is_sparse(layer)
        joined = arch.input_norms and not sparse
        grouped = sparse and groups_experts(arch, fp8)
        where = f"{here}mlp.experts." if sparse else f"{here}mlp."
        where += "local_experts.3." if sparse and not grouped else ""
        linears = {"linear_fc1": FUSED if joined else COLUMN, "linear_fc2": ROW}
        if grouped:
            linears = {"linear_fc1": GROUPED_COLUMN, "linear_fc2": GROUPED_ROW}
        assert {part: last[where + part] for part in linears} == linears
        assert (found[f"{here}input_layernorm"] == NORM) is (arch.latent is not None)
        assert (found[f"{here}pre_mlp_layernorm"] == NORM) is (sparse and arch.input_norms)
        if arch.qk_norm:
            assert found[f"{here}self_attention.q_layernorm"] == NORM
        if arch.output_norms:
            assert found[f"{here}mlp_bda.norm"] == NORM
    assert found["decoder.final_layernorm"] == NORM
    assert last["output_layer"] == "LogProbHead"
    assert not any(kind.startswith("mcore_rl.model.portable") for kind in found.values())


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_weights_go_through_its_names_bitwise(
    pool1: Pool, family: str, directory: Path, recipe: str | None, tmp_path: Path
) -> None:
    (found,) = at_layout(pool1, "tp1", described, directory, recipe, tmp_path / "exported")
    assert found["fp8"] == (("hybrid", recipe) if recipe else (None, None))
    arch = read_architecture(directory)
    check_layers(found["kinds"], arch, Fp8(recipe) if recipe else None)  # pyright: ignore[reportArgumentType]
    assert sorted(found["canonical"]) == sorted(found["entries"])
    assert [canonical(name) for name in found["names"]] == found["canonical"]
    fused = [name for name in found["names"] if ".layer_norm_weight" in name]
    # None before a router, and none before latent attention, which two linear layers read.
    joined = sum((arch.latent is None) + (not arch.is_sparse(layer)) for layer in range(arch.layers))
    assert len(fused) == joined * arch.input_norms
    assert unequal(directory, tmp_path / "exported") == []


@pytest.mark.parametrize(
    "family", ["qwen3", "qwen3_moe", "qwen2", "deepseek_v3"], scope="session", indirect=True
)
def test_at_two_tensor_parallel_ranks_too(pool2: Pool, family: str, directory: Path, tmp_path: Path) -> None:
    at_layout(pool2, "tp2+sp", described, directory, "blockwise", tmp_path / "exported")
    assert unequal(directory, tmp_path / "exported") == []


@pytest.mark.parametrize("family", ["qwen3"], scope="session", indirect=True)
def test_norms_that_change_places_are_seen(pool1: Pool, directory: Path, tmp_path: Path) -> None:
    """Negative control: the two fused norms of every layer under each other's names."""
    at_layout(pool1, "tp1", with_swapped_norms, directory, tmp_path / "exported")
    names = unequal(directory, tmp_path / "exported")
    assert sorted({name.split(".", 3)[-1] for name in names}) == [
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    ]


def with_swapped_norms(mesh: Mesh, directory: Path, target: Path) -> None:
    model = built(mesh, directory, "blockwise")
    for layer in model.unwrapped[0].decoder.layers:
        one, other = layer.self_attention.linear_qkv.layer_norm_weight, layer.mlp.linear_fc1.layer_norm_weight
        one.data, other.data = other.data, one.data
    export(model, target)


@pytest.mark.parametrize("family", ["qwen3"], scope="session", indirect=True)
def test_without_the_answers_nothing_of_it_is_built(pool1: Pool, directory: Path) -> None:
    assert at_layout(pool1, "tp1", parts_without_a_gpu, directory) == [True]


def parts_without_a_gpu(mesh: Mesh, directory: Path) -> bool:
    config = transformer_config(read_architecture(directory), mesh.layout, "bf16")
    return spec.parts_of(config) is spec.PORTABLE
