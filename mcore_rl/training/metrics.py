"""The metrics of one step: parts from every micro-batch, reduced once, each read by its own type; its cost.

The cost is tokens per second, the share of the GPUs' peak, and memory.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mcore_rl.algo.metrics import ALERT_RATIO, GradientScale, Key, Metric, Total, gradient_scale
from mcore_rl.data.packing import TokenSequence
from mcore_rl.parallel.control import gather_ranks, reduce_maxima, reduce_sums
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.training.batch import Batching, RolloutBatch

ON_POLICY_RATIO = "head/grad_ratio_on_policy"
"""The ratio of the first mini-batch of a rollout alone, the one that algo.metrics.GradientScale bounds."""


class Gathered:
    """The parts of some calls of an objective: added up, or the largest taken."""

    def __init__(self, calls: Iterable[Mapping[Key, Tensor]] = ()) -> None:
        """Begin with the parts of `calls`."""
        self._parts: dict[Key, Tensor] = {}
        self.add(calls)

    def add(self, calls: Iterable[Mapping[Key, Tensor]]) -> None:
        """Add the parts of more calls; there are none off the last pipeline stage."""
        for parts in calls:
            for key, value in parts.items():
                merge = torch.maximum if key.kind.largest else torch.add
                self._parts[key] = merge(self._parts[key], value) if key in self._parts else value

    def reduce(self, mesh: Mesh) -> dict[Key, Tensor]:
        """Return the parts over all ranks that own metrics; collective, the same everywhere."""
        sums = {key: value for key, value in self._parts.items() if not key.kind.largest}
        maxima = {key: value for key, value in self._parts.items() if key.kind.largest}
        return reduce_sums(mesh, sums) | reduce_maxima(mesh, maxima)


class StepMetrics:
    """Collects an objective's parts over the mini-batches of a step."""

    def __init__(self) -> None:
        self._gathered = Gathered()
        self._norms: list[float] = []

    def add(self, micro_batches: Iterable[Mapping[Key, Tensor]], grad_norm: float) -> None:
        """Add one optimizer step: the parts of each micro-batch, and the gradient's norm."""
        self._norms.append(grad_norm)
        self._gathered.add(micro_batches)

    def reduce(self, mesh: Mesh, grad_norm: str) -> dict[str, float]:
        """Return the metrics of what all ranks added; collective, the same everywhere.

        The mean norm of the gradient is logged as `grad_norm`. Nothing where no optimizer step was taken.
        """
        if not self._norms:
            return {}
        found = read(self._gathered.reduce(mesh), len(self._norms))
        return {**found, grad_norm: statistics.fmean(self._norms)}


def read(totals: Mapping[Key, Tensor], updates: int) -> dict[str, float]:
    """Turn reduced parts of `updates` optimizer steps into numbers, each under its own name."""
    found: dict[str, float] = {}
    for key, total in totals.items():
        found |= key.kind.read(key.name, total, updates)
    return found


def losses_are_finite(micro_batches: Iterable[Mapping[Key, Tensor]]) -> bool:
    """Whether every sum is finite that an objective made of its own loss; a GPU is waited for once.

    What a loss measures beside it may be anything.
    """
    own = [
        value for parts in micro_batches for key, value in parts.items() if isinstance(key.kind, LossTotal)
    ]
    return not own or bool(torch.stack(own).isfinite().all())


@dataclass(frozen=True)
class LossTotal(Total):
    """The weighted loss itself, which an objective of the library makes; no loss of a user's own logs it."""


@dataclass(frozen=True)
class Scale(LossTotal):
    """The sum of magnitudes, against which an error of the sum is measured; it is not logged."""

    def read(self, name: str, total: Tensor, updates: int) -> dict[str, float]:
        """Return nothing; see Metric.read."""
        return {}


@dataclass(frozen=True)
class EffectiveSampleSize(Metric):
    """(sum w)^2 / (n sum w^2) of importance weights: 1 where all are equal."""

    def reduce_rows(self, values: Tensor, rows: Tensor) -> Tensor:
        """Return the sums of the weights and of their squares, and the count."""
        weights = torch.where(rows, values, 0.0)
        return torch.stack([weights.sum(), weights.square().sum(), rows.sum().double()])

    def value(self, total: Tensor) -> float | None:
        """Return the fraction, None where no row counted."""
        weight, squared, count = total.tolist()
        return weight**2 / max(squared * count, 1e-300) if count else None


@dataclass(frozen=True)
class HeadGradient(Metric):
    """The gradient scale of the lm_head; `values` are the sums of algo.metrics.gradient_scale_sums."""

    def part(self, usable: Tensor) -> Tensor:
        """Return the sums, which are already over rows."""
        assert self.values is not None
        return self.values

    def read(self, name: str, total: Tensor, updates: int) -> dict[str, float]:
        """Return what was measured, what was predicted, and their ratio."""
        return head_metrics(gradient_scale(total))


@dataclass(frozen=True)
class HeadRatio(HeadGradient):
    """Only the ratio of it."""

    def read(self, name: str, total: Tensor, updates: int) -> dict[str, float]:
        """Return the ratio of measured to predicted."""
        return {name: gradient_scale(total).ratio}


def head_metrics(scale: GradientScale) -> dict[str, float]:
    """Name the gradient scale of the lm_head; see algo.metrics.GradientScale."""
    return {
        "head/grad_measured": scale.measured,
        "head/grad_predicted": scale.predicted,
        "head/grad_ratio": scale.ratio,
    }


class GradientAlert:
    """Notices a gradient scale that STAYS above its bound: one step may be sampling noise."""

    PATIENCE = 5
    """rollouts in a row"""

    def __init__(self) -> None:
        self._above = 0

    def due(self, metrics: Mapping[str, float | str]) -> bool:
        """True once per streak: the on-policy ratio exceeded ALERT_RATIO in PATIENCE rollouts in a row."""
        above = float(metrics.get(ON_POLICY_RATIO, 0.0)) > ALERT_RATIO
        self._above = self._above + 1 if above else 0
        return self._above == self.PATIENCE

    def state(self) -> dict[str, int]:
        """The streak so far as JSON, for a checkpoint."""
        return {"above": self._above}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue from `state`."""
        self._above = state["above"]


def rollout_metrics(
    batch: RolloutBatch, advantages: Sequence[float | np.ndarray], asked: int
) -> dict[str, float]:
    """What the samples, of `asked`, and their advantages say by themselves, before any training."""
    no_signal = statistics.fmean(not np.any(advantage) for advantage in advantages)
    return {**sample_metrics(batch, asked), "reward/no_signal": no_signal}


def sample_metrics(batch: RolloutBatch, asked: int) -> dict[str, float]:
    """What the samples, of `asked`, say by themselves."""
    lengths = [sample.trained_tokens for sample in batch.samples]
    rewards = [float(sample.reward or 0.0) for sample in batch.samples]
    parts: dict[str, list[float]] = {}
    for part in (part for sample in batch.samples for part in sample.parts):
        parts.setdefault(f"reward/{part.name}", []).append(part.value)
    return {name: statistics.fmean(values) for name, values in parts.items()} | {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "length/mean": statistics.fmean(lengths),
        "length/max": max(lengths),
        "truncated": statistics.fmean(sample.truncated for sample in batch.samples),
        "samples": len(batch.samples),
        "aborted": asked - batch.void - len(batch.samples),
        "tokens": sum(lengths),
    }


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


def work_of(sequences: Sequence[TokenSequence], shape: Batching, passes: int = 1) -> Work:
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
    busy = train * mesh.world.size()
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
