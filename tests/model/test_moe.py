"""Qwen3-MoE on Megatron: the numbers of transformers, experts by global index, the same at every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_rl.errors import ConfigError, LayoutError
from mcore_rl.model.build import build_policy
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.model.layouts import check_layout, padded_vocab
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.weights.disk import export as export_files
from tests.model.support import at_layout, expected_log_probs, scored_log_probs, sequences


@pytest.fixture(scope="module", params=[True, False], ids=["normalized", "raw"])
def directory(moe_dir: Path, request, tmp_path_factory) -> Path:
    """The same weights with routing weights that sum to 1, or do not."""
    copy = tmp_path_factory.mktemp("moe") / "model"
    copy.mkdir()
    config = json.loads((moe_dir / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"norm_topk_prob": request.param}))
    (copy / "model.safetensors").write_bytes((moe_dir / "model.safetensors").read_bytes())
    return copy


@pytest.fixture(scope="module")
def reference(directory: Path) -> torch.Tensor:
    from transformers import Qwen3MoeForCausalLM

    return expected_log_probs(Qwen3MoeForCausalLM.from_pretrained(directory), sequences(), 1.0)


def test_log_probs_are_those_of_transformers(pool1: Pool, directory: Path, reference: torch.Tensor) -> None:
    (got,) = at_layout(pool1, "tp1", scored_log_probs, directory, sequences())
    torch.testing.assert_close(got.double(), reference, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ep2", "tp2ep2", "tp2+sp", "pp2"])
def test_they_do_not_depend_on_the_layout(
    pool2: Pool, layout: str, directory: Path, reference: torch.Tensor
) -> None:
    for got in at_layout(pool2, layout, scored_log_probs, directory, sequences()):
        torch.testing.assert_close(got.double(), reference, rtol=0, atol=1e-5)


def test_an_expert_out_of_place_is_seen(pool1: Pool, moe_dir: Path, tmp_path: Path) -> None:
    """Negative control: two experts of the first layer change places."""
    weights = load_file(moe_dir / "model.safetensors")
    name = "model.layers.0.mlp.experts.{}.down_proj.weight"
    weights[name.format(0)], weights[name.format(3)] = weights[name.format(3)], weights[name.format(0)]
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((moe_dir / "config.json").read_bytes())
    right, wrong = (
        at_layout(pool1, "tp1", scored_log_probs, where, sequences())[0] for where in (moe_dir, tmp_path)
    )
    assert (right - wrong).abs().max() > 1e-2


def export(mesh: Mesh, source: Path, target: Path) -> list[str]:
    model = build_policy(source, mesh)
    export_files(model, target)
    return sorted(name for name in global_parameters(model.unwrapped) if "local_experts" in name)


@pytest.mark.parametrize("layout", ["ep2", "tp2ep2", "pp2"])
def test_weights_go_through_bitwise(pool2: Pool, layout: str, moe_dir: Path, tmp_path: Path) -> None:
    held = at_layout(pool2, layout, export, moe_dir, tmp_path / "out")
    exported = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    original = load_file(moe_dir / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in original.items())
    if "ep2" in layout:
        assert not set(held[0]) & set(held[1]), "each rank holds experts of its own"


def test_the_table_covers_dense_and_sparse_layers(moe_dir: Path) -> None:
    arch = read_architecture(moe_dir)
    mapping = ParameterMap(arch, padded_vocab(arch, 1))
    assert set(mapping.hf_shapes()) == set(load_file(moe_dir / "model.safetensors"))
    for entry in mapping.entries():
        assert mapping.entry(entry.megatron) == entry
    with pytest.raises(ConfigError, match=r"decoder\.layers\.0\.mlp\.shared.* has no rule"):
        mapping.entry("decoder.layers.0.mlp.shared_experts.linear_fc1.weight")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tensor=2), r"parallel\.sequence = true"),
        (
            Layout(expert=3, data=3),
            r"parallel\.expert = 3 does not divide the model's 4 experts; legal: \[1, 2, 4\]",
        ),
    ],
)
def test_illegal_layouts(moe_dir: Path, layout: Layout, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        check_layout(read_architecture(moe_dir), layout)


def test_a_dense_model_has_no_experts_to_spread(dense_dir: Path) -> None:
    with pytest.raises(LayoutError, match="no experts; set it to 1"):
        check_layout(read_architecture(dense_dir), Layout(expert=2, data=2))
