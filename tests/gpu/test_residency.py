"""Offloading on a GPU: the bytes that torch's allocator gives back, and the same bits afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcore_rl.data.packing import TokenSequence, pack
from mcore_rl.model.build import build_policy
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.optimizer import build_optimizer, ddp_config
from mcore_rl.model.residency import Offloaded, Swapped, state_of, storages, weights_of
from mcore_rl.model.step import forward_backward
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.plan.memory import stage_memory
from tests.plan.measure import SumOfLogProbs
from tests.plan.test_memory import work


def test_offloaded_memory_is_free_and_comes_back(directory: Path, mesh: Mesh) -> None:
    model = build_policy(directory, mesh, precision="bf16", ddp=ddp_config())
    optimizer = build_optimizer(model, lr=1e-3, precision="bf16")
    for chunk in model.unwrapped:
        for parameter in chunk.parameters():
            parameter.main_grad.normal_()
    optimizer.step()
    before = [tensor.clone().cpu() for tensor in state_of(optimizer)]
    size = sum(storage.nbytes() for storage in storages(state_of(optimizer)))
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    part = Offloaded(lambda: state_of(optimizer))
    assert allocated - torch.cuda.memory_allocated() >= size > 0
    assert torch.cuda.max_memory_allocated() <= allocated
    with part.resident():
        assert torch.cuda.memory_allocated() <= allocated
        assert all(torch.equal(a, b.cpu()) for a, b in zip(before, state_of(optimizer), strict=True))
    assert allocated - torch.cuda.memory_allocated() >= size


def test_a_swap_takes_no_memory_of_the_gpu(directory: Path, mesh: Mesh) -> None:
    model = build_policy(directory, mesh, precision="bf16")
    start = [tensor.clone() for tensor in weights_of(model)]
    part = Swapped(model)
    for tensor in weights_of(model):
        tensor.add_(1)
    later = [tensor.clone() for tensor in weights_of(model)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    with part.resident():
        assert all(torch.equal(a, b) for a, b in zip(start, weights_of(model), strict=True))
        assert torch.cuda.memory_allocated() == allocated
    assert all(torch.equal(a, b) for a, b in zip(later, weights_of(model), strict=True))
    assert torch.cuda.max_memory_allocated() <= allocated + max(t.numel() for t in later)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_does_not_rise_above_the_plans_figure(directory: Path, mesh: Mesh, precision: str) -> None:
    """Twice, as a first step fills workspaces; the plan counts the portable layers, which keep the most."""
    length, count = 256, 16
    model = build_policy(directory, mesh, precision=precision, ddp=ddp_config())
    sequences = [TokenSequence((1,), tuple(range(2, length + 1))) for _ in range(count)]
    batch = pack(sequences, list(range(count)), {}, align=1)
    for _ in range(2):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        forward_backward(model, [batch], SumOfLogProbs(), 1.0)
        torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - before
    (planned,) = stage_memory(read_architecture(directory), Layout(), work(precision, "none", length, count))
    print(f"{precision}: {measured / planned.step:.2f} of the plan's figure")
    assert 0.3 * planned.step <= measured <= 1.1 * planned.step
