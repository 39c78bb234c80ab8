"""Memory that a real step takes: state in exact bytes, the peak by every allocation and release of torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_rl.data.packing import TokenSequence, pack
from mcore_rl.lora import Lora
from mcore_rl.model import again, platform
from mcore_rl.model.build import build_policy
from mcore_rl.model.optimizer import build_optimizer, ddp_config
from mcore_rl.model.step import forward_backward
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import build_mesh, destroy_mesh
from mcore_rl.tuning import Tuning
from mcore_rl.types import PackedBatch


def measure(
    directory: Path, precision: str, recompute: Any, length: int, count: int, lora: Lora | None = None
) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer state, and of a step on `count` sequences of `length` tokens.

    In bf16 linear layers keep their inputs, as Transformer Engine's do, for which the plan is then.
    """
    platform.install()
    mesh = build_mesh(Layout(), timeout=60.0)
    try:
        model = build_policy(
            directory,
            mesh,
            precision=precision,
            tuning=Tuning(recompute=recompute),
            random_seed=0,
            ddp=ddp_config(),
            lora=lora,
        )
        optimizer = build_optimizer(model, lr=1e-3, precision=precision)
        sequences = [TokenSequence((1,), tuple(range(2, length + 1))) for _ in range(count)]
        batch = pack(sequences, list(range(count)), {}, align=1)
        optimizer.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            if precision == "bf16":
                patch.setattr(again, "kept_as_noted", nullcontext)
            rise = _rise(lambda: forward_backward(model, [batch], SumOfLogProbs(), 1.0))
        optimizer.step()
        parameters = list(model.unwrapped[0].parameters())
        return {
            "weights": sum(_bytes(p) for p in parameters),
            "gradients": sum(_bytes(p.main_grad) for p in parameters if hasattr(p, "main_grad")),
            "optimizer": _state_bytes(optimizer, {p.data_ptr() for p in parameters}),
            "step": rise,
        }
    finally:
        destroy_mesh()


class SumOfLogProbs:
    """An objective that the head cannot be asked in parts: recompute mode holds the most."""

    def rowwise(self, batch: PackedBatch) -> bool:
        return False

    def __call__(self, batch: PackedBatch, output) -> tuple[Tensor, Callable[[], dict[str, Tensor]]]:
        return output.log_prob.sum(), dict


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _state_bytes(optimizer, weights: set[int]) -> int:
    """Adam's moments, and fp32 copies of weights where they are not the weights themselves."""
    total = 0
    for part in getattr(optimizer.megatron, "chained_optimizers", [optimizer.megatron]):
        for parameter, state in part.optimizer.state.items():
            total += sum(_bytes(x) for x in state.values() if torch.is_tensor(x) and x.numel() > 1)
            if parameter.dtype == torch.float32 and part.config.params_dtype != torch.float32:
                total += _bytes(parameter)
    return total


def _rise(step: Callable[[], object]) -> int:
    """Most bytes that torch's allocator held at once during the second of two steps, above the start."""
    step()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))
