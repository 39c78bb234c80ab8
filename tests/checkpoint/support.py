"""What tests of checkpoints share: a few steps of training, and a saved directory as others read it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load

from mcore_rl.checkpoint import Checkpoints, Saved, model_pieces, optimizer_pieces
from mcore_rl.checkpoint.directory import CheckpointDirectory
from mcore_rl.checkpoint.image import FileImage
from mcore_rl.checkpoint.pieces import Piece
from mcore_rl.checkpoint.torch_dist import data_file, load_pieces, side_files
from mcore_rl.lora import Lora
from mcore_rl.model.adapters import adapter_parameters
from mcore_rl.model.build import build_policy
from mcore_rl.model.optimizer import Optimizer, build_optimizer, ddp_config
from mcore_rl.model.step import forward_backward
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.training.batch import pack_share
from mcore_rl.training.metrics import Gathered, read
from mcore_rl.training.supervised import NegativeLogLikelihood
from mcore_rl.weights.buckets import gather
from tests.model.support import sequences, shape_at


def build(
    mesh: Mesh,
    directory: Path,
    *,
    precision: str = "fp32",
    distributed: bool = True,
    lora: Lora | None = None,
) -> Optimizer:
    """A policy in training, with a warm-up, so that the schedule's place matters."""
    model = build_policy(
        directory,
        mesh,
        precision=precision,
        random_seed=3,
        ddp=ddp_config(distributed=distributed),
        lora=lora,
    )
    return build_optimizer(
        model, lr=1e-2, weight_decay=0.1, precision=precision, warmup_steps=10, distributed=distributed
    )


def train(optimizer: Optimizer, steps: range) -> list[float]:
    """Supervised steps on sequences of their own; the losses."""
    mesh, losses = optimizer.model.mesh, []
    for step in steps:
        scored = [s for s in sequences(12, seed=step) if s.scored]
        weight = [1.0 / sum(s.scored for s in scored)] * len(scored)
        batches = pack_share(scored, {"weight": weight}, shape_at(mesh), mesh)
        optimizer.zero_grad()
        sums = forward_backward(optimizer.model, batches, NegativeLogLikelihood(), temperature=1.0)
        optimizer.step()
        losses.append(read(Gathered(sums).reduce(mesh), 1)["loss/policy"])
    return losses


def open_at(mesh: Mesh, root: Path, *, keep: int = 2, background: bool = False) -> Checkpoints:
    return Checkpoints(root, mesh, keep=keep, background=background, timeout=60.0)


def pieces(optimizer: Optimizer) -> list:
    return [*model_pieces(optimizer.model), *optimizer_pieces(optimizer)]


def weights(optimizer: Optimizer) -> dict[str, Tensor]:
    """Full HF tensors of what is trained, each on one rank."""
    model = optimizer.model
    if model.adapters is not None:
        return gather(adapter_parameters(model.unwrapped), model.adapters, model.mesh)
    named = {name: p.detach() for name, p in global_parameters(model.unwrapped).items()}
    return gather(named, model.mapping, model.mesh)


def stored(directory: Path) -> dict[str, Tensor]:
    """Every global tensor of a torch_dist directory, as torch's own reader assembles it."""
    reader = FileSystemReader(directory)
    described: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {key: torch.full(d.size, torch.nan).to(d.properties.dtype) for key, d in described.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def tensors(step: int, count: int = 3) -> list[Piece]:
    """What a save of `step` on one rank may hold: the numbers tell the step."""
    made = {f"t{i}": torch.full((64, 32 + i), float(100 * step + i)) for i in range(count)}
    return [Piece(key, tuple(t.shape), (0, 0), t, True) for key, t in made.items()]


def write(directory: CheckpointDirectory, step: int) -> Path:
    """A whole checkpoint of one rank, by the library's own functions."""
    image = FileImage()
    image.fill(tensors(step))
    partial = directory.begin(step, image.size)
    data = image.write(partial / data_file(0))
    return directory.commit(partial, step, [data], side_files([image.entries]), {"note": step})


def step_in(saved: Saved) -> int:
    """Check a checkpoint, read it, and say which step its numbers are of."""
    saved.check()
    found = tensors(0)
    load_pieces(saved.path, found, saved.files)
    steps = {int(piece.data[0, 0]) // 100 for piece in found}
    assert len(steps) == 1
    expected = tensors(*steps)
    assert all(torch.equal(a.data, b.data) for a, b in zip(found, expected, strict=True))
    return steps.pop()
