"""A training checkpoint's model through Megatron's own loader, at another layout than it was written at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch import Tensor

from mcore_rl.checkpoint import count_updates
from mcore_rl.parallel.mesh import Mesh
from tests.checkpoint.support import build, open_at, pieces, train, weights
from tests.model.support import at_layout


def save(mesh: Mesh, model: Path, root: Path) -> dict[str, Tensor]:
    optimizer = build(mesh, model)
    train(optimizer, range(2))  # the first update of the warm-up has no learning rate
    checkpoints = open_at(mesh, root)
    with checkpoints.open():
        checkpoints.save(1, pieces(optimizer), {"updates": count_updates(optimizer)})
    return weights(optimizer)


def load(mesh: Mesh, model: Path, step: Path, strict: StrictHandling) -> tuple[dict, dict]:
    """The weights before and after Megatron has loaded `step`."""
    optimizer = build(mesh, model)
    before = {name: tensor.clone() for name, tensor in weights(optimizer).items()}
    (chunk,) = optimizer.model.unwrapped
    wanted = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    chunk.load_state_dict(dist_checkpointing.load(wanted, str(step), strict=strict), strict=False)
    return before, weights(optimizer)


@pytest.mark.slow
def test_megatron_loads_it(pool1, pool2, models, tmp_path) -> None:
    """`log_all` is what Megatron-LM calls --dist-ckpt-strictness log_all."""
    root = tmp_path / "checkpoints"
    saved = at_layout(pool2, "tp2", save, models["dense"], root)
    held = {name: tensor for rank in saved for name, tensor in rank.items()}
    ((before, after),) = at_layout(
        pool1, "tp1", load, models["dense"], root / "step_1", StrictHandling.LOG_ALL
    )
    assert after.keys() == held.keys()
    assert all(torch.equal(after[name], held[name]) for name in held)
    assert not all(torch.equal(before[name], held[name]) for name in held), "another model before"
