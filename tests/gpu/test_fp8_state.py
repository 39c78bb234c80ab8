"""What the `delayed` recipe remembers, put into another model: the next pass is the same, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mcore_rl.checkpoint import fp8_pieces
from mcore_rl.model.build import Model, build_policy
from mcore_rl.model.optimizer import ddp_config
from mcore_rl.model.step import forward, forward_backward
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.precision import Fp8
from mcore_rl.training.supervised import NegativeLogLikelihood
from tests.gpu.test_step import TEMPERATURE, batches_of

pytestmark = pytest.mark.usefixtures("engine")


def build(directory: Path, mesh: Mesh) -> Model:
    return build_policy(directory, mesh, precision="fp8", fp8=Fp8("delayed"), ddp=ddp_config())


def train(model: Model) -> None:
    """A pass; the weights stay."""
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    forward_backward(model, batches_of(model.mesh, "fp8", "delayed"), NegativeLogLikelihood(), TEMPERATURE)


def results(model: Model) -> list[Tensor]:
    """Log-probs, then the gradients of a pass."""
    batches = batches_of(model.mesh, "fp8", "delayed")
    scored = [head.log_prob.clone() for _, head in forward(model, batches, TEMPERATURE)]
    train(model)
    return [*scored, *(p.main_grad.clone() for chunk in model.unwrapped for p in chunk.parameters())]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_model_with_its_state_goes_on_alike(directory: Path, mesh: Mesh) -> None:
    model = build(directory, mesh)
    for _ in range(3):
        train(model)
    kept = {piece.key: piece.data.clone() for piece in fp8_pieces(model)}
    assert len(kept) == 4 * 4 * 4  # four tensors, four linear layers, four layers
    assert all((tensor != 1).all() for key, tensor in kept.items() if "scale_fwd" in key)
    expected = results(model)
    resumed, fresh = build(directory, mesh), build(directory, mesh)
    for piece in fp8_pieces(resumed):
        piece.data.copy_(kept[piece.key])
    assert same(results(resumed), expected)
    assert not same(results(fresh), expected)
