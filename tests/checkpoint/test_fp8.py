"""What FP8's `delayed` recipe remembers, through a checkpoint: real modules and recipe states, on a CPU."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_rl.checkpoint import find, fp8_pieces, model_pieces
from mcore_rl.checkpoint.pieces import Piece
from mcore_rl.errors import ConfigError
from mcore_rl.model.build import Model
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from tests.checkpoint.support import open_at, stored
from tests.model.engine import HOPPER, NEEDS_ENGINE, answers_like, built
from tests.model.support import at_layout

pytestmark = NEEDS_ENGINE

KINDS = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")


@contextmanager
def states_on_the_cpu() -> Iterator[None]:
    """On a GPU of Hopper's kind, but a recipe state is made on the CPU: its module does not say where."""
    from transformer_engine.pytorch import quantization

    made = quantization.DelayedScalingRecipeState.__init__

    def make(self, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, "device": torch.device("cpu")})

    with answers_like(HOPPER), pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization.DelayedScalingRecipeState, "__init__", make)
        yield


def pieces_of(model: Model) -> list[Piece]:
    with states_on_the_cpu():
        return fp8_pieces(model)


def linears(model: Model) -> dict[str, Any]:
    """Global name of the weight -> module, of those with FP8 state."""
    names = {id(parameter): name for name, parameter in global_parameters(model.unwrapped).items()}
    modules = [module for chunk in model.unwrapped for module in chunk.modules()]
    return {names[id(m.weight)]: m for m in modules if "scaling_fwd" in getattr(m, "fp8_meta", {})}


def numbers(shape: tuple[int, ...], key: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, key)) * 7919 % 2**31)
    return torch.rand(shape, generator=generator)


def trained(mesh: Mesh, directory: Path) -> Model:
    """State after some steps: numbers by name, alike on all ranks but for the amaxes of its own tokens."""
    model = built(mesh, directory, "delayed", seed=3)
    pieces_of(model)
    for name, module in linears(model).items():
        for way in ("fwd", "bwd"):
            state = module.fp8_meta[f"scaling_{way}"]
            state.scale.copy_(numbers(tuple(state.scale.shape), f"scale {way} {name}"))
            state.amax_history.copy_(numbers(tuple(state.amax_history.shape), f"amax {way} {name}"))
            state.amax_history[0] += mesh.rank
    return model


def saved(mesh: Mesh, directory: Path, root: Path) -> dict[str, Tensor]:
    """Key -> tensor of this rank, once it is saved; what Transformer Engine would save is the same."""
    model = trained(mesh, directory)
    pieces = pieces_of(model)
    before = {piece.key: piece.data.clone() for piece in pieces}
    checkpoints = open_at(mesh, root)
    with checkpoints.open():
        checkpoints.save(1, [*model_pieces(model), *pieces], {})
    for name, module in linears(model).items():
        theirs = engines_own(module)
        assert theirs.keys() - {"recipe", "extra_fp8_variables"} == set(KINDS)
        for kind in KINDS:
            assert torch.equal(theirs[kind], before[f"fp8.{kind}.{name}"])
    assert model_pieces(model)  # now that the modules say that they keep a state
    return before


def engines_own(module: Any) -> dict[str, Any]:
    """What its `get_extra_state` keeps, which is a pickle."""
    module.fp8_meta["fp8_checkpoint"] = True
    module.fp8_meta["recipe"] = module.fp8_meta["scaling_fwd"].recipe
    return pickle.loads(module.get_extra_state().numpy().tobytes())  # noqa: S301 made in this process


def loaded(mesh: Mesh, directory: Path, root: Path) -> tuple[dict[str, Tensor], bool]:
    """(key -> tensor of a new model, from the checkpoint; its quantizers read these very tensors)."""
    model = built(mesh, directory, "delayed", seed=3)
    pieces = pieces_of(model)
    assert all((p.data == ("scale" in p.key)).all() for p in pieces)  # 1 and 0: as a new run begins
    checkpoints = open_at(mesh, root)
    with checkpoints.open():
        checkpoints.load(find(root, "latest"), pieces)
    views = [
        torch.equal(quantizer.scale, module.fp8_meta[f"scaling_{way}"].scale[i])
        for module in linears(model).values()
        for way in ("fwd", "bwd")
        for i, quantizer in enumerate(module.quantizers[f"scaling_{way}"])
    ]
    return {p.key: p.data for p in pieces}, all(views) and len(views) == 5 * len(pieces) // 4


@pytest.mark.parametrize(
    ("kind", "first", "others"), [("dense", "tp2+sp", ("tp1", "pp2")), ("moe", "ep2", ("tp1",))]
)
def test_scales_and_histories_come_back_at_any_layout(
    models: dict[str, Path], pool1: Pool, pool2: Pool, kind: str, first: str, others, tmp_path: Path
) -> None:
    directory = models[kind]
    root = tmp_path / "checkpoints"
    ranks = at_layout(pool2, first, saved, directory, root)
    whole = {key: tensor for rank in ranks for key, tensor in rank.items()}
    layers = {key.removeprefix("fp8.scale_fwd.") for key in whole if key.startswith("fp8.scale_fwd.")}
    assert len(layers) == (4 * 4 if kind == "dense" else 4 * 2 + 2 + 3 * 4 * 2)
    for key, tensor in whole.items():  # the larger of what both ranks had, where both hold the layer
        shared = sum(key in rank for rank in ranks)
        if "amax" in key and shared == 2:
            assert (tensor[0] >= 1).all(), key
        assert all(torch.equal(rank[key], tensor) for rank in ranks if key in rank), key
    on_disk = stored(root / "step_1")
    assert {key for key in on_disk if key.startswith("fp8.")} == whole.keys()
    for layout in (first, *others):
        found: dict[str, Tensor] = {}
        for tensors, views in at_layout(pool1 if layout == "tp1" else pool2, layout, loaded, directory, root):
            assert views, "a quantizer has a scale of its own"
            found |= tensors
        assert found.keys() == whole.keys()
        assert all(torch.equal(tensor, whole[key]) for key, tensor in found.items()), layout


def test_a_checkpoint_without_them_is_refused(models: dict[str, Path], pool1: Pool, tmp_path: Path) -> None:
    assert at_layout(pool1, "tp1", from_another_recipe, models["dense"], tmp_path / "checkpoints") == [True]


def from_another_recipe(mesh: Mesh, directory: Path, root: Path) -> bool:
    model = built(mesh, directory, "blockwise", seed=3)
    assert fp8_pieces(model) == []
    asked = pieces_of(built(mesh, directory, "delayed", seed=3))
    checkpoints = open_at(mesh, root)
    with checkpoints.open():
        checkpoints.save(1, model_pieces(model), {})
        with pytest.raises(ConfigError, match=r"has no tensor fp8\.scale_fwd"):
            checkpoints.load(find(root, "latest"), asked)
    return True
