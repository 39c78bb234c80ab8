"""The dense policy on Megatron: log-probs of transformers, weights in and out, gradients."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_rl.errors import ConfigError, LayoutError
from mcore_rl.model import step, weights_io
from mcore_rl.model.build import Model, build_policy
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.files import checkpoint_files
from mcore_rl.model.hf.parameters import ParameterEntry, ParameterMap
from mcore_rl.model.layouts import check_layout, padded_vocab
from mcore_rl.model.optimizer import build_optimizer, ddp_config
from mcore_rl.model.step import forward_backward
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.parallel.head import HeadOutput
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.training.batch import pack_share
from mcore_rl.types import PackedBatch
from mcore_rl.weights.buckets import gather
from mcore_rl.weights.disk import export as export_files
from tests.model.support import (
    at_layout,
    expected_log_probs,
    scored_log_probs,
    sequences,
    shape_at,
)

TEMPERATURE = 0.8


# --- log-probs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(dense_dir: Path) -> torch.Tensor:
    from transformers import Qwen3ForCausalLM

    return expected_log_probs(Qwen3ForCausalLM.from_pretrained(dense_dir), sequences(), TEMPERATURE)


@pytest.mark.parametrize("tokens", [16, 1000], ids=["one by one", "packed"])
def test_log_probs_are_those_of_transformers(
    pool1: Pool, dense_dir: Path, reference: torch.Tensor, tokens: int
) -> None:
    (got,) = at_layout(pool1, "tp1", scored_log_probs, dense_dir, sequences(), tokens, TEMPERATURE)
    torch.testing.assert_close(got.double(), reference, rtol=0, atol=2e-5)


def test_another_temperature_is_seen(pool1: Pool, dense_dir: Path, reference: torch.Tensor) -> None:
    (got,) = at_layout(pool1, "tp1", scored_log_probs, dense_dir, sequences(), 32, 0.81)
    assert (got - reference).abs().max() > 1e-2


def test_neighbours_in_a_pack_are_not_seen(pool1: Pool, dense_dir: Path) -> None:
    """A sequence scores the same beside any others, bit for bit where its micro-batch is as long."""
    first, *rest = sequences()
    (a,) = at_layout(pool1, "tp1", scored_log_probs, dense_dir, [first, *rest[:4]], 1000)
    (b,) = at_layout(pool1, "tp1", scored_log_probs, dense_dir, [first, *rest[4:8]], 1000)
    torch.testing.assert_close(a[: first.scored], b[: first.scored], rtol=0, atol=1e-6)


# --- weights in and out -----------------------------------------------------------------------------------


def export(mesh: Mesh, source: Path, target: Path) -> None:
    export_files(build_policy(source, mesh), target)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "pp2+vpp1"])
def test_weights_go_through_bitwise(pool2: Pool, layout: str, dense_dir: Path, tmp_path: Path) -> None:
    at_layout(pool2, layout, export, dense_dir, tmp_path / "out")
    exported = {k: v for file in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    original = load_file(dense_dir / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in original.items())


def test_transformers_loads_what_was_exported(pool2: Pool, dense_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    at_layout(pool2, "tp2", export, dense_dir, tmp_path / "out")
    tokens = torch.arange(12)[None]
    before, after = (
        AutoModelForCausalLM.from_pretrained(d)(tokens).logits for d in (dense_dir, tmp_path / "out")
    )
    assert torch.equal(before, after)


def reader(directory: Path):
    arch = read_architecture(directory)
    return weights_io.reader(directory, ParameterMap(arch, padded_vocab(arch, 1)))


def damaged(source: Path, target: Path, change) -> Path:
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors")
    return target


def test_every_wrong_tensor_is_listed(dense_dir: Path, tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.layers.1.mlp.up_proj.weight"]
        weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)
        weights["model.norm.weight"] = torch.zeros(31)

    with pytest.raises(ConfigError) as raised:
        reader(damaged(dense_dir, tmp_path / "bad", change))
    for part in (
        "missing model.layers.1.mlp.up_proj.weight",
        "unexpected model.layers.2.mlp.up_proj.weight",
        "model.norm.weight has shape (31,), config.json asks for (32,)",
    ):
        assert part in str(raised.value)


@pytest.mark.parametrize("left", [0, 5, 300, -1], ids=["nothing", "length", "names", "but a byte"])
def test_a_file_that_is_no_safetensors_file_is_named(dense_dir: Path, tmp_path: Path, left: int) -> None:
    """It was cut off, or it is of something else."""
    broken = shutil.copytree(dense_dir, tmp_path / "bad")
    reader(broken)
    whole = (broken / "model.safetensors").read_bytes()
    assert left < 300 or int.from_bytes(whole[:8], "little") > 300, "that is in the middle of the names"
    for content in (whole[:left], b"not tensors"):
        (broken / "model.safetensors").write_bytes(content)
        _check_named(broken)


def _check_named(broken: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.safetensors: not a readable safetensors file"):
        reader(broken)


def test_a_complete_directory_is_read(dense_dir: Path) -> None:
    assert reader(dense_dir)("model.norm.weight").shape == (32,)


def test_an_index_cannot_point_out_of_its_directory(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="outside the directory"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "gpt2"},
            'model_type "gpt2" is not supported; supported: llama, mistral, mixtral, qwen2',
        ),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported, only "silu"'),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "rope_type 'proportional'"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_a_config_that_would_change_the_maths_is_refused(
    dense_dir: Path, tmp_path: Path, change: dict, message: str
) -> None:
    config = json.loads((dense_dir / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ConfigError, match=message):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            Layout(tensor=3),
            r"parallel\.tensor = 3 does not divide the model's 8 attention heads; legal: \[1, 2, 4, 8\]",
        ),
        (Layout(tensor=16), r"parallel\.tensor = 16 does not divide the model's 8 attention heads"),
        (
            Layout(pipeline=4),
            r"parallel\.pipeline x parallel\.virtual_pipeline = 4 .* 2 layers; legal: \[1, 2\]",
        ),
    ],
)
def test_illegal_layouts(dense_dir: Path, layout: Layout, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        check_layout(read_architecture(dense_dir), layout)


# --- gradients --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NegativeLogLikelihood:
    in_parts: bool = True
    """the head may ask it in parts: fused mode, else recompute mode"""

    def rowwise(self, batch: PackedBatch) -> bool:
        return self.in_parts

    def __call__(self, batch: PackedBatch, head: HeadOutput):
        total = -head.log_prob.sum()
        return total, lambda: {"loss": total, "rows": torch.tensor(head.log_prob.numel())}


def batches_at(mesh: Mesh) -> list[PackedBatch]:
    return pack_share(sequences(), {}, shape_at(mesh), mesh)


def unmark(parameter: torch.nn.Parameter, entry: ParameterEntry) -> None:
    """Megatron-Core 0.19.2 marks a shard itself."""
    vars(parameter).pop("tensor_model_parallel", None)


def gradient_norm(mesh: Mesh, directory: Path, marked: bool = True) -> float:
    with pytest.MonkeyPatch.context() as patch:
        if not marked:
            patch.setattr(weights_io, "mark", unmark)
        model = build_policy(directory, mesh, ddp=ddp_config(distributed=False))
    optimizer = build_optimizer(model, lr=0.0, kind="sgd", clip_grad=0.0, distributed=False)
    optimizer.zero_grad()
    forward_backward(model, batches_at(mesh), NegativeLogLikelihood(), 1.0)
    return optimizer.step()


def test_the_gradient_norm_counts_every_shard(pool1: Pool, pool2: Pool, dense_dir: Path) -> None:
    """Unmarked shards are taken for duplicates of the first: the norm, and clipping with it, is too small."""
    (alone,) = at_layout(pool1, "tp1", gradient_norm, dense_dir)
    marked = at_layout(pool2, "tp2", gradient_norm, dense_dir)
    assert marked == pytest.approx([alone, alone], rel=1e-5)
    unmarked = at_layout(pool2, "tp2", gradient_norm, dense_dir, False)
    assert unmarked[0] < 0.99 * alone


def stepped(
    mesh: Mesh, directory: Path, clip: float, by_megatron: bool, lr: float = 0.1
) -> tuple[torch.Tensor, int, bool]:
    """The weights of this rank after one step that `clip` acts on, how often the norm was computed, and
    whether all weights are what they were.
    """
    model = build_policy(directory, mesh, ddp=ddp_config())
    optimizer = build_optimizer(model, lr=lr, eps=1.0, clip_grad=clip)
    before = _weights(model)
    optimizer.zero_grad()
    forward_backward(model, batches_at(mesh), NegativeLogLikelihood(), 1.0)
    norms = []
    norm = optimizer.megatron.get_grad_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer.megatron, "get_grad_norm", lambda: norms.append(norm()) or norms[-1])
        (optimizer.megatron if by_megatron else optimizer).step()
    assert norms[0] > 2 * clip
    return _weights(model), len(norms), torch.equal(_weights(model), before)


def _weights(model: Model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in global_parameters(model.unwrapped).values()])


def test_a_step_clips_and_updates_as_megatrons_own(pool2: Pool, dense_dir: Path) -> None:
    """Ours looks at the norm before any weight changes, and must not ask for it a second time."""
    ours = at_layout(pool2, "tp2", stepped, dense_dir, 1.0, False)
    megatrons = at_layout(pool2, "tp2", stepped, dense_dir, 1.0, True)
    unclipped = at_layout(pool2, "tp2", stepped, dense_dir, 0.0, False)
    for (weights, norms, still), (expected, *_), (other, *_) in zip(ours, megatrons, unclipped, strict=True):
        assert torch.equal(weights, expected)
        assert not torch.equal(weights, other)
        assert norms == 1
        assert not still


def test_a_learning_rate_of_0_changes_no_bit(pool2: Pool, dense_dir: Path) -> None:
    """Of a step whose gradient is none; the control is above."""
    assert [still for *_, still in at_layout(pool2, "tp2", stepped, dense_dir, 1.0, False, 0.0)] == [True] * 2


@pytest.mark.parametrize("name", ["scaled", "total"])
def test_metrics_do_not_share_memory_with_the_loss(name: str) -> None:
    """The schedule divides the loss in place, after the metrics were taken."""
    total = torch.tensor(6.0, requires_grad=True).clone()
    scaled, count, (metrics,) = step._scaled_loss(
        lambda batch, output: (total, lambda: {"loss": total}), None, 4, torch.zeros(3)
    )
    assert (scaled.item(), count.item()) == (24.0, 1)
    with torch.no_grad():
        {"scaled": scaled, "total": total}[name].div_(4)
    assert metrics["loss"].item() == 6.0
    assert not metrics["loss"].requires_grad


def main_gradients(
    mesh: Mesh, directory: Path, grad_scale: float, in_parts: bool
) -> tuple[dict[str, torch.Tensor], list]:
    """HF name -> gradient of three micro-batches under a loss scaler; the metrics."""
    model = build_policy(directory, mesh, ddp=ddp_config(distributed=False))
    model.config.grad_scale_func = partial(torch.mul, other=torch.tensor(grad_scale))
    batches = batches_at(mesh)[:3]
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    metrics = forward_backward(model, batches, NegativeLogLikelihood(in_parts), 1.0)
    parameters = global_parameters(model.unwrapped)
    gradients = {name: parameter.main_grad for name, parameter in parameters.items()}
    return gather(gradients, model.mapping, mesh), metrics


@pytest.mark.parametrize("layout", ["tp2", "tp2+sp", "pp2"])
def test_a_loss_scaler_reaches_the_head_in_both_modes(pool2: Pool, dense_dir: Path, layout: str) -> None:
    """The head adds its weight gradient to main_grad itself: scaled like all others, in either mode."""
    plain = at_layout(pool2, layout, main_gradients, dense_dir, 1.0, False)
    for in_parts in (False, True):
        scaled = at_layout(pool2, layout, main_gradients, dense_dir, 1024.0, in_parts)
        for (one, _), (other, _) in zip(plain, scaled, strict=True):
            for name, gradient in one.items():
                if in_parts:
                    torch.testing.assert_close(other[name] / 1024, gradient, rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(other[name], 1024 * gradient), name
    assert any("lm_head.weight" in one and one["lm_head.weight"].abs().max() > 0 for one, _ in plain)


def test_metrics_are_those_of_the_loss_in_both_modes(pool2: Pool, dense_dir: Path) -> None:
    """In fused mode the loss is known after the backward pass of each micro-batch."""
    apart, fused = (
        [metrics for _, metrics in at_layout(pool2, "pp2", main_gradients, dense_dir, 1.0, in_parts)]
        for in_parts in (False, True)
    )
    assert apart[0] == fused[0] == []
    assert [m["rows"] for m in fused[1]] == [m["rows"] for m in apart[1]]
    torch.testing.assert_close([m["loss"] for m in fused[1]], [m["loss"] for m in apart[1]])
    assert all(m["loss"] > 1 for m in fused[1])
