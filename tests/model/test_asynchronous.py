"""Between the forward passes of a step nobody waits for a device: what would is counted per micro-batch."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mcore_rl.algo.algorithms import configure
from mcore_rl.data.packing import pack
from mcore_rl.model import step
from mcore_rl.model.build import build_policy
from mcore_rl.model.optimizer import ddp_config
from mcore_rl.model.step import forward, forward_backward
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.training.objective import PolicyObjective
from mcore_rl.types import PackedBatch
from tests.model.support import at_layout, sequences

READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
"""methods of a tensor by which the host reads it"""
SHAPES = ("nonzero", "masked_select", "unique", "unique_consecutive", "repeat_interleave", "histogram")
"""functions whose answer's shape the host must know first, or that have no CUDA kernel"""
MADE = ("tensor", "as_tensor", "from_numpy")
"""functions that make a tensor of what the host has"""


BETWEEN = (__file__, "/torch/", "/model/platform.py")
"""files between a call and who makes it; the last one stands in for torch in Megatron's schedules on a CPU"""
OF_MEGATRON = {
    "schedules.py": "makes a count of tokens, of the host, and leaves it there",
    "random.py": "compares two states of the host's own generator",
    "p2p_communication.py": "sends and reads the shape of what stages exchange, since lengths vary",
}
"""its files that read or make a tensor for every micro-batch -> why; a pipeline does wait for the last"""


class Waits(TorchFunctionMode):
    """Counts what would make the host wait for a GPU, or copy to it, by function and caller."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.on = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self.on and name in {*READS, *SHAPES, *MADE}:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        frame = sys._getframe(1)
        while frame.f_back is not None and any(part in frame.f_code.co_filename for part in BETWEEN):
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        if "megatron" not in path.parts or path.name not in OF_MEGATRON:
            self.found[f"{name} in {path.name}:{frame.f_lineno}"] += 1


class LocalScalars(TorchDispatchMode):
    """What reads a value without a method of a tensor: `if tensor`, an index, a scalar argument."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.waits.on and str(func) == "aten._local_scalar_dense.default":
            self.waits.note("a scalar")
        return func(*args, **(kwargs or {}))


def packed(count: int) -> list[PackedBatch]:
    some = sequences(4)
    numbers = [[-1.0] * one.scored for one in some]
    fields = {"weight": [0.1] * 4, "advantage": [1.0] * 4, "rollout_log_prob": numbers}
    align = 4
    return [pack(some, range(4), {**fields, "old_log_prob": numbers}, align=align) for _ in range(count)]


def waits_of(mesh: Mesh, directory: Path, algorithm: str, spoiled: bool) -> list[dict[str, int]]:
    """What a pass of four micro-batches does more often than one of two: forward alone, then a step."""
    model = build_policy(directory, mesh, ddp=ddp_config(distributed=False))
    objective = PolicyObjective(configure(algorithm), mesh.cp)
    if spoiled:
        objective = cast(PolicyObjective, _Reading(objective))
    with pytest.MonkeyPatch.context() as patch:
        found: list[dict[str, int]] = []
        for run in (
            lambda batches: forward(model, batches, 1.0),
            lambda batches: forward_backward(model, batches, objective, 1.0),
        ):
            counts = []
            for count in (2, 2, 4):
                batches, waits = packed(count), Waits()
                original = step.localize

                def unseen(*args: Any, waits: Waits = waits, original: Any = original) -> Any:
                    waits.on = False  # before the first forward pass
                    try:
                        return original(*args)
                    finally:
                        waits.on = True

                def asked(*args: Any, waits: Waits = waits, original: Any = step._InParts.__call__) -> Any:
                    with waits:  # autograd leaves the mode for a backward pass, in which the head asks
                        return original(*args)

                patch.setattr(step, "localize", unseen)
                patch.setattr(step._InParts, "__call__", asked)
                with waits, LocalScalars(waits):
                    run(batches)
                patch.undo()
                counts.append(waits.found)
            _warm, two, four = counts
            found.append(dict(four - two))
    return found


class _Reading:
    """An objective that reads a value of every micro-batch."""

    def __init__(self, objective: PolicyObjective) -> None:
        self.objective = objective

    def rowwise(self, batch: PackedBatch) -> bool:
        return self.objective.rowwise(batch)

    def __call__(self, batch: PackedBatch, head: Any) -> Any:
        total, measure = self.objective(batch, head)

        def read() -> Any:
            return {**measure(), "read": torch.tensor(head.entropy.sum().item())}

        return total, read


LAYOUTS = ("tp1", "cp2", "pp2", "tp2+sp")


@pytest.mark.parametrize("algorithm", ["grpo", "gspo"])
@pytest.mark.parametrize(
    "layout", [pytest.param(text, marks=[] if text == "tp1" else [pytest.mark.slow]) for text in LAYOUTS]
)
def test_no_micro_batch_waits(pool1: Pool, pool2: Pool, dense_dir: Path, layout: str, algorithm: str) -> None:
    pool = pool1 if layout == "tp1" else pool2
    for found in at_layout(pool, layout, waits_of, dense_dir, algorithm, False):
        assert found == [{}, {}]


def test_the_count_sees_a_value_that_is_read(pool1: Pool, dense_dir: Path) -> None:
    ((scored, stepped),) = at_layout(pool1, "tp1", waits_of, dense_dir, "grpo", True)
    assert scored == {}
    assert {name.split(" in ")[0] for name in stepped} >= {"a scalar", "tensor"}
    assert set(stepped.values()) == {2}
