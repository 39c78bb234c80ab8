"""Megatron's fast paths: what is on where, experts as one grouped layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from mcore_rl.checkpoint.pieces import model_pieces, optimizer_pieces
from mcore_rl.errors import ConfigError
from mcore_rl.lora import Lora
from mcore_rl.model import fusions, spec
from mcore_rl.model.adapters import adapter_parameters
from mcore_rl.model.build import Model, build_policy
from mcore_rl.model.hf.adapters import AdapterMap
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.optimizer import Optimizer, build_optimizer, ddp_config
from mcore_rl.model.portable import PORTABLE
from mcore_rl.model.spec import transformer_config
from mcore_rl.model.step import forward_backward
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.precision import Fp8
from mcore_rl.training.batch import pack_share
from mcore_rl.training.supervised import NegativeLogLikelihood
from mcore_rl.tuning import Tuning
from mcore_rl.weights.buckets import gather
from mcore_rl.weights.disk import export
from tests.model.families import FAMILIES
from tests.model.support import at_layout, sequences, shape_at

pytestmark = [
    pytest.mark.filterwarnings("ignore:full scope is deprecated"),  # Megatron about its own default
    pytest.mark.filterwarnings("ignore:If you are using transformer_engine"),  # core_attn, which we ask for
]

KERNELS = {
    rope_utils: ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"),
    moe_utils: (
        *("fused_permute", "fused_permute_with_probs", "fused_unpermute"),
        *("fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs"),
    ),
}
"""what Megatron asks for before it accepts a fusion: Transformer Engine's, absent from a CPU"""


@contextmanager
def with_engine() -> Iterator[None]:
    """Layers of bf16 are Transformer Engine's, as far as a configuration can tell; nothing is computed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "takes_transformer_engine", lambda dtype: dtype == torch.bfloat16)
        for module, names in KERNELS.items():
            for name in names:
                patch.setattr(module, name, object(), raising=False)
        yield


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_megatron_accepts_what_is_on_beside_transformer_engine(family: str, tmp_path: Path) -> None:
    kind, settings = FAMILIES[family]
    getattr(transformers, kind)(**settings).save_pretrained(tmp_path)
    arch = read_architecture(tmp_path)
    off = transformer_config(arch, Layout(), "bf16")
    with with_engine():
        on = transformer_config(arch, Layout(), "bf16")
        assert not transformer_config(arch, Layout(), "fp32").persist_layer_norm  # it stays to compare with
    assert on.apply_rope_fusion is (arch.latent is None)
    mixture = arch.experts is not None
    assert (on.moe_permute_fusion, on.moe_router_fusion) == (mixture, mixture)
    assert on.moe_grouped_gemm is (mixture and not arch.experts.biased)
    assert not any((off.apply_rope_fusion, off.moe_permute_fusion, off.moe_grouped_gemm))
    assert not fusions.groups_experts(arch, Fp8("delayed"))


@pytest.mark.parametrize(
    ("tuning", "says"),
    [
        (Tuning(dispatcher="deepep"), 'parallel.dispatcher = "deepep" needs a GPU and the package deep_ep'),
        (Tuning("selective", ("layernorm",)), 'train.recompute_modules has "layernorm".*leave it out'),
        (Tuning("selective", ("moe",)), 'train.recompute_modules has "moe", and a qwen3 model has no such'),
        (Tuning(offload=("core_attn",)), "train.offload_modules.*do not run here"),
    ],
)
def test_what_cannot_run_here_is_refused_by_name(dense_dir: Path, tuning: Tuning, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        transformer_config(read_architecture(dense_dir), Layout(), "fp32", tuning)


def test_choices_reach_megatron(moe_dir: Path) -> None:
    with with_engine():
        tuning = Tuning("selective", ("core_attn", "mlp"), ("core_attn", "attn_proj"))
        config: Any = transformer_config(read_architecture(moe_dir), Layout(), "bf16", tuning)
    assert (config.recompute_granularity, config.recompute_modules) == ("selective", ["core_attn", "mlp"])
    assert (config.fine_grained_activation_offloading, config.offload_modules) == (True, list(tuning.offload))


# --- experts as one layer: Megatron's TEGroupedMLP, on linear layers that a CPU can run ---------------------


class GroupedLinear(nn.Module):
    """What Transformer Engine's grouped linear layer computes, one expert after the other; no biases."""

    def __init__(
        self, experts: int, inputs: int, outputs: int, *, config: Any, pg_collection: Any, **_: Any
    ) -> None:
        super().__init__()
        self.experts, self.groups = experts, pg_collection
        for i in range(experts):
            setattr(self, f"weight{i}", nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype)))

    def forward(self, x: Tensor, tokens: list[int]) -> tuple[Tensor, None]:
        parts = zip(x.split(tokens), range(self.experts), strict=True)
        return torch.cat([part @ getattr(self, f"weight{i}").T for part, i in parts]), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        """The weights of each expert under one key, along an axis of experts."""
        count = self.experts * self.groups.ep.size()
        first = self.experts * self.groups.ep.rank()
        found = {}
        for i in range(self.experts):
            place = (*sharded_offsets, (len(sharded_offsets), first + i, count))
            group = {"tp_group": self.groups.expt_tp, "dp_cp_group": metadata["dp_cp_group"]}
            weight = {"weight": getattr(self, f"weight{i}")}
            (shard,) = make_sharded_tensors_for_checkpoint(weight, prefix, {}, place, **group).values()
            shard.replica_id = (*shard.replica_id[:2], self.groups.expt_dp.rank())
            found[f"{prefix}weight{i}"] = shard
        return found


@contextmanager
def as_one_layer(grouped: bool) -> Iterator[None]:
    """Experts are TEGroupedMLP's, where `grouped`."""
    with pytest.MonkeyPatch.context() as patch:
        if grouped:
            parts = replace(PORTABLE, grouped_column=GroupedLinear, grouped_row=GroupedLinear)
            patch.setattr(spec, "parts_of", lambda _: parts)
            fast = fusions.fast_settings
            patch.setattr(spec, "fast_settings", lambda *a, **k: fast(*a, **k) | {"moe_grouped_gemm": True})
        yield


def saved(mesh: Mesh, directory: Path, grouped: bool) -> dict[tuple[str, tuple[int, ...]], Tensor]:
    """What this rank would write into a checkpoint after an update, by key and place."""
    with as_one_layer(grouped):
        model = build_policy(directory, mesh, ddp=ddp_config())
        optimizer = build_optimizer(model, lr=1e-3)
        learn(model, optimizer)
        optimizer.step()
        pieces = [*model_pieces(model), *optimizer_pieces(optimizer)]
        return {(piece.key, tuple(piece.offset)): piece.data.clone() for piece in pieces}


def trained(mesh: Mesh, directory: Path, grouped: bool, target: Path) -> tuple[str, float, dict[str, Tensor]]:
    """Kind of the experts, gradient norm, gradients by HF name; weights after one update go to `target`."""
    with as_one_layer(grouped):
        model = build_policy(directory, mesh, ddp=ddp_config(distributed=False))
        optimizer = build_optimizer(model, lr=1e-3, distributed=False)
        learn(model, optimizer)
        named = global_parameters(model.unwrapped)
        gradients = gather({name: vars(p)["main_grad"] for name, p in named.items()}, model.mapping, mesh)
        norm = optimizer.step()
        export(model, target)
        (experts,) = {
            type(m) for m in model.unwrapped[0].modules() if isinstance(m, TEGroupedMLP | SequentialMLP)
        }
        return experts.__name__, norm, gradients


def learn(model: Model, optimizer: Optimizer) -> None:
    """Gradients of one micro-batch."""
    optimizer.zero_grad()
    scored = sequences()
    weight = [1.0 / sum(one.scored for one in scored)] * len(scored)
    batches = pack_share(scored, {"weight": weight}, shape_at(model.mesh), model.mesh)
    forward_backward(model, batches, NegativeLogLikelihood(), 1.0)


def files(directory: Path) -> dict[str, Tensor]:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("layout", ["ep2", "tp2ep2"])
def test_grouped_experts_are_the_same_experts(
    pool2: Pool, layout: str, moe_dir: Path, tmp_path: Path
) -> None:
    """Weights in and out by the same names, gradients and their norm, an update, at every rank."""
    one = at_layout(pool2, layout, trained, moe_dir, False, tmp_path / "one")
    grouped = at_layout(pool2, layout, trained, moe_dir, True, tmp_path / "grouped")
    assert {kind for kind, *_ in one} == {"SequentialMLP"}
    assert {kind for kind, *_ in grouped} == {"TEGroupedMLP"}
    for (_, norm, gradients), (_, its_norm, its_gradients) in zip(one, grouped, strict=True):
        assert its_norm == pytest.approx(norm, rel=1e-6)
        assert gradients.keys() == its_gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(its_gradients[name], gradient, rtol=1e-5, atol=1e-7)
    ours, theirs = files(tmp_path / "one"), files(tmp_path / "grouped")
    assert ours.keys() == theirs.keys() == load_file(moe_dir / "model.safetensors").keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, rtol=0, atol=1e-5)


def adapted(mesh: Mesh, directory: Path, grouped: bool) -> list[str]:
    with as_one_layer(grouped):
        model = build_policy(directory, mesh, ddp=ddp_config(), lora=Lora(2, 2.0, ("qkv", "experts")))
        return sorted(adapter_parameters(model.unwrapped))


def test_experts_with_adapters_are_layers_of_their_own(pool2: Pool, moe_dir: Path) -> None:
    """One grouped layer has no place for them; they would be left out, as if they were not asked for."""
    every = AdapterMap(read_architecture(moe_dir), Lora(2, 2.0, ("qkv", "experts")))
    wanted = {entry.megatron for entry in every.entries()}
    ranks = at_layout(pool2, "ep2", adapted, moe_dir, True)
    assert {name for names in ranks for name in names} == wanted
    assert ranks == at_layout(pool2, "ep2", adapted, moe_dir, False)


def test_a_checkpoint_holds_the_same_pieces_in_either_form(pool2: Pool, moe_dir: Path) -> None:
    one, grouped = (at_layout(pool2, "ep2", saved, moe_dir, form) for form in (False, True))
    for mine, its in zip(one, grouped, strict=True):
        assert mine.keys() == its.keys()
        assert any("experts" in key for key, _ in mine)
        for place, tensor in mine.items():
            torch.testing.assert_close(its[place], tensor, rtol=1e-4, atol=1e-5)
