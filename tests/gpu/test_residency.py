"""Offloading on a GPU: the bytes that torch's allocator gives back, and the same bits afterwards."""

from __future__ import annotations

from pathlib import Path

import torch

from mcore_rl.model.build import build_policy
from mcore_rl.model.optimizer import build_optimizer, ddp_config
from mcore_rl.model.residency import Offloaded, Swapped, state_of, storages, weights_of
from mcore_rl.parallel.mesh import Mesh


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
