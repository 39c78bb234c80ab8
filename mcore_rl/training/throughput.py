"""What a step cost: tokens per second, the share of the GPUs' peak, memory, and the learning rate."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mcore_rl.data.packing import TokenSequence
from mcore_rl.parallel.control import gather_ranks
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.training.batch import Shape

PEAK_FLOPS: Mapping[str, float] = {
    **dict.fromkeys(("H100", "H200", "H800"), 989e12),
    "B200": 2250e12,
    "A100": 312e12,
}
"""part of a GPU's name -> dense bf16 FLOP/s of its data sheet; FP8 is measured against it too"""
_FORWARD_AND_BACKWARD = 3
"""in units of the forward pass; what recomputation repeats is not counted, as the term model FLOPs says"""


@dataclass(frozen=True)
class Work:
    """What one step trains on, over all replicas."""

    tokens: int
    """prompt and response tokens, each counted once"""
    passes: int
    """how often each is trained in the step"""
    flops: float
    """FLOPs of the policy, forward and backward, in all passes"""


def work_of(sequences: Sequence[TokenSequence], shape: Shape, passes: int = 1) -> Work:
    """Return the work of training on `sequences` as often as `passes` says."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    flops = _FORWARD_AND_BACKWARD * passes * float(np.sum(shape.cost(lengths)))
    return Work(int(lengths.sum()), passes, flops)


def throughput(work: Work, times: Mapping[str, float], mesh: Mesh) -> dict[str, float | None]:
    """Tokens per second, model FLOPs utilisation (None on a CPU) and peak memory; collective.

    Args:
        times: seconds by phase; `time/step` is the whole step, `time/train` its updates.
    """
    peaks = gather_ranks(mesh, peak_memory_gib())
    peak_flops, train = peak_flops_of_device(), times["time/train"]
    busy = train * mesh.layout.world_size
    return {
        "throughput/tokens_per_second": work.tokens / times["time/step"],
        "throughput/train_tokens_per_second": work.tokens * work.passes / train,
        "throughput/mfu": None if peak_flops is None else work.flops / (busy * peak_flops),
        "memory/peak_gib": max(peaks),
    }


def peak_memory_gib() -> float:
    """The most memory that this rank has held: torch's on its GPU, or of the whole process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_flops_of_device() -> float | None:
    """Dense bf16 FLOP/s of this rank's GPU; None on a CPU, or on a GPU that PEAK_FLOPS does not list."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
