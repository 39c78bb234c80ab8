"""Kernels that a micro-batch makes a GPU launch for the head and a policy's objective, counted on CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mcore_rl.algo.algorithms import configure
from mcore_rl.model.step import _InParts
from mcore_rl.parallel.head import Call, head_loss
from mcore_rl.parallel.head.passes import Tiling
from mcore_rl.training.objective import PolicyObjective
from mcore_rl.types import PackedBatch

ROWS, WIDTH, VOCAB = 8192, 8, 32
ON_GPU = Tiling(1024, 4096, VOCAB, apart=True)
"""what Tiling.of gives for a shard of 16032 rows in bf16"""
NO_KERNEL = (
    *(
        "view",
        "slice",
        "select",
        "expand",
        "unsqueeze",
        "squeeze",
        "detach",
        "t.default",
        "transpose",
        "alias",
    ),
    *("alias", "split", "unbind", "as_strided", "empty", "permute", "promote_types", "lift_fresh"),
)
"""operations of torch, by a part of their names, that only say how memory is read"""


class Launches(TorchDispatchMode):
    """Counts torch's operations; each that computes is about one kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return sum(n for name, n in self.names.items() if not any(part in name for part in NO_KERNEL))


def launches(algorithm: str, tiling: Tiling, *, old: bool) -> int:
    objective = PolicyObjective(configure(algorithm), None)
    fields = {
        name: torch.full((ROWS,), value)
        for name, value in {"rollout_log_prob": -1.0, "weight": 1e-4, "advantage": 1.0}.items()
    }
    if old:
        fields["old_log_prob"] = torch.full((ROWS,), -1.1)
    index = torch.arange(ROWS)
    boundaries = torch.tensor([0, ROWS], dtype=torch.int32)
    none = torch.zeros_like(index)
    batch = PackedBatch(none, index, boundaries, ROWS, index, none, none, fields)
    hidden, weight = (torch.randn(n, WIDTH, requires_grad=True) for n in (ROWS, VOCAB))
    weight.main_grad = torch.zeros_like(weight)  # pyright: ignore[reportAttributeAccessIssue]
    assert objective.rowwise(batch)
    with Launches() as counted:
        call = Call.of(weight, batch.targets, tiling=tiling)
        head_loss(hidden, weight, call, _InParts(objective, batch)).backward()
    return counted.count


@pytest.mark.parametrize(("algorithm", "old"), [("grpo", True), ("gspo", False)])
def test_a_micro_batch_launches_few_kernels_beside_its_gemms(algorithm: str, old: bool) -> None:
    assert launches(algorithm, ON_GPU, old=old) <= 350


def test_the_count_sees_small_waves() -> None:
    assert launches("grpo", ON_GPU._replace(wave=1024), old=True) > 700
