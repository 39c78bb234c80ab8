"""One layout's checkpoint is the same state at another: parameters, moments, schedule, and what follows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mcore_rl.checkpoint import count_updates, find, set_updates
from mcore_rl.lora import Lora
from mcore_rl.model.hf.adapters import PLACE
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh
from tests.checkpoint.support import build, open_at, pieces, stored, train, weights
from tests.model.support import at_layout

FIRST, THEN = range(3), range(3, 6)


def save(mesh: Mesh, model: Path, root: Path, options: dict) -> tuple[dict[str, Tensor], list[float]]:
    """Train, save, train on: the weights at the save, and the losses after it."""
    optimizer = build(mesh, model, **options)
    train(optimizer, FIRST)
    checkpoints = open_at(mesh, root)
    with checkpoints.open():
        checkpoints.save(3, pieces(optimizer), {"updates": count_updates(optimizer)})
    held = weights(optimizer)
    return held, train(optimizer, THEN)


def resume(mesh: Mesh, model: Path, root: Path, again: Path, options: dict) -> tuple[dict, list[float]]:
    """Load, save as loaded, train on."""
    optimizer = build(mesh, model, **options)
    saved = find(root, "latest")
    checkpoints = open_at(mesh, again)
    with checkpoints.open():
        checkpoints.load(saved, pieces(optimizer))
        set_updates(optimizer, saved.document["updates"])
        checkpoints.save(3, pieces(optimizer), dict(saved.document))
    held = weights(optimizer)
    return held, train(optimizer, THEN)


def merged(answers: list) -> dict[str, Tensor]:
    return {name: tensor for held, _ in answers for name, tensor in held.items()}


ADAPTERS = {"lora": Lora(4, 8.0)}
OF_EXPERTS = {"lora": Lora(4, 8.0, targets=("qkv", "proj", "experts"))}
MATRIX = [
    ("tp2", "tp1", "dense", {}),
    ("tp2", "dp2", "dense", ADAPTERS),
    ("tp1", "pp2", "dense", {}),
    ("tp2pp2", "dp2", "dense", {}),
    ("cp2", "tp2+sp", "dense", {}),
    ("ep2", "tp1", "moe", {}),
    ("dp2", "dp4", "dense", {"precision": "bf16"}),
]
MORE = [
    ("tp1", "ep2", "moe", {}),
    ("tp2", "dp2", "dense", {"precision": "bf16", "distributed": False}),
    ("pp2+vpp2", "tp2", "dense", {}),
    ("pp2", "dp2", "tied", {"distributed": False}),
    ("pp2", "tp2", "tied", ADAPTERS),
    ("ep2", "tp1", "moe", OF_EXPERTS),
    ("tp1", "tp2ep2+sp", "moe", OF_EXPERTS | {"precision": "bf16"}),
]


@pytest.mark.parametrize(
    ("before", "after", "kind", "options"),
    [*MATRIX[:3], *(pytest.param(*row, marks=pytest.mark.slow) for row in (*MATRIX[3:], *MORE))],
)
@pytest.mark.slow
def test_state_and_continuation_are_those_of_the_saved_run(
    request, models, before, after, kind, options, tmp_path
) -> None:
    model = models[kind]
    pool = {n: request.getfixturevalue(f"pool{n}") for n in {ranks(before), ranks(after)}}
    first = at_layout(pool[ranks(before)], before, save, model, tmp_path / "a", options)
    second = at_layout(pool[ranks(after)], after, resume, model, tmp_path / "a", tmp_path / "b", options)
    one, other = merged(first), merged(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one), (
        "weights are bitwise those that were saved"
    )
    one, other = stored(tmp_path / "a" / "step_3"), stored(tmp_path / "b" / "step_3")
    assert one.keys() == other.keys()
    moments = [key for key in one if key.startswith("optimizer.state.exp_avg")]
    assert moments
    assert all(one[key].any() for key in moments), "a moment that is 0 everywhere proves nothing"
    assert all(torch.equal(one[key], other[key]) for key in one), "and so is the optimizer's state"
    if "lora" in options:
        assert all(PLACE in key for key in one), "a checkpoint holds adapters alone"
    tolerance = 1e-5 if options.get("precision") != "bf16" else 2e-2
    assert second[-1][1] == pytest.approx(first[-1][1], rel=tolerance)


def ranks(layout: str) -> int:
    return Layout.parse(layout).world_size
