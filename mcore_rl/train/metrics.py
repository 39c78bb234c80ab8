"""The metrics of one step: sums from every micro-batch, reduced once, named as users read them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mcore_rl.algo.diagnostics import ALERT_RATIO, GradientScale, gradient_scale
from mcore_rl.parallel.control import reduce_maxima, reduce_sums
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.train.batch import RolloutBatch
from mcore_rl.train.objective import MISMATCH_EDGES

ON_POLICY_RATIO = "head/grad_ratio_on_policy"
"""Of the first mini-batch of a rollout alone: the one that algo.diagnostics bounds."""


class StepMetrics:
    """Collects an objective's sums over the mini-batches of a step."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}
        self._norms: list[float] = []

    def add(self, micro_batches: Iterable[Mapping[str, Tensor]], grad_norm: float) -> None:
        """One optimizer step's sums (`max/...`: maxima) per micro-batch; none off the last pipeline stage."""
        self._norms.append(grad_norm)
        for sums in micro_batches:
            for name, value in sums.items():
                kept, merge = (
                    (self._maxima, torch.maximum) if name.startswith("max/") else (self._sums, torch.add)
                )
                kept[name] = merge(kept[name], value) if name in kept else value

    def reduce(self, mesh: Mesh, metrics: Callable[[Totals], dict[str, float]]) -> dict[str, float]:
        """`policy_metrics` or `critic_metrics` of what all ranks added; collective, the same everywhere.

        Nothing where no optimizer step was taken.
        """
        if not self._norms:
            return {}
        sums, maxima = reduce_sums(mesh, self._sums), reduce_maxima(mesh, self._maxima)
        return metrics(Totals(sums | maxima, len(self._norms), statistics.fmean(self._norms)))


@dataclass(frozen=True)
class Totals:
    """Sums and maxima over all ranks of one training step."""

    values: Mapping[str, Tensor]
    updates: int
    """optimizer steps"""
    grad_norm: float
    """their mean"""

    def __getitem__(self, name: str) -> float:
        return self.values[name].item()

    def mean(self, name: str) -> float:
        """Per scored token."""
        return self[name] / max(self["tokens"], 1.0)


def policy_metrics(totals: Totals) -> dict[str, float]:
    """Of PolicyObjective's sums."""
    known = {
        "loss/policy": totals["loss"] / totals.updates,
        "ratio/mean": totals.mean("ratio"),
        "ratio/max": totals["max/ratio"],
        "ratio/min": -totals["max/-ratio"],
        "clip/fraction": totals.mean("clipped"),
        "entropy": totals.mean("entropy"),
        "kl/rollout": totals.mean("kl_rollout"),
        **mismatch_metrics(totals),
        "grad_norm": totals.grad_norm,
        **head_metrics(gradient_scale(totals.values["head"])),
    }
    if "kl_reference" in totals.values:
        known["kl/reference"] = totals.mean("kl_reference")
    if "head/on_policy" in totals.values:
        known[ON_POLICY_RATIO] = gradient_scale(totals.values["head/on_policy"]).ratio
    return known


def mismatch_metrics(totals: Totals) -> dict[str, float]:
    """`mismatch/*`: the servers against the trainer, on tokens of the weights in training, if there are any.

    `behaviour/*`: the policy that sampled (stale, or another engine) against the one in training, on all
    tokens: KL estimates k1 and k3, the effective sample size over the number of tokens (1: no difference),
    and the largest difference of a log-prob.
    """
    known = {
        "behaviour/k1": totals.mean("behaviour_k1"),
        "behaviour/k3": totals.mean("behaviour_k3"),
        "behaviour/ess": totals["behaviour_weight"] ** 2
        / max(totals["behaviour_weight_squared"] * totals["tokens"], 1e-300),
        "behaviour/max_abs": totals["max/behaviour"],
    }
    if totals.values["mismatch"].sum() > 0:
        known["mismatch/max_abs"] = totals["max/mismatch"]
        known["mismatch/p999"] = quantile(totals.values["mismatch"], 0.999)
    if "correction" in totals.values:
        known["correction/mean"] = totals.mean("correction")
    return known


def critic_metrics(totals: Totals) -> dict[str, float]:
    """Of ValueObjective's sums."""
    return {
        "loss/value": totals["loss"] / totals.updates,
        "value/clip_fraction": totals.mean("clipped"),
        "grad_norm/critic": totals.grad_norm,
    }


def head_metrics(scale: GradientScale) -> dict[str, float]:
    """The gradient scale of the lm_head: algo.diagnostics."""
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
        """As JSON, for a checkpoint."""
        return {"above": self._above}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue from `state`."""
        self._above = state["above"]


def quantile(histogram: Tensor, fraction: float) -> float:
    """Upper edge of the MISMATCH_EDGES bin in which `fraction` of the counts is reached; 0 for no counts."""
    total = histogram.sum()
    if total == 0:
        return 0.0
    bin_index = int(torch.searchsorted(histogram.cumsum(0), fraction * total))
    return float(MISMATCH_EDGES[bin_index + 1])


def rollout_metrics(
    batch: RolloutBatch, advantages: Sequence[float | np.ndarray], asked: int
) -> dict[str, float]:
    """What the samples, of `asked`, and their advantages say by themselves, before any training."""
    lengths = [len(sample.token_ids) for sample in batch.samples]
    rewards = [float(sample.reward or 0.0) for sample in batch.samples]
    return {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "reward/no_signal": statistics.fmean(not np.any(advantage) for advantage in advantages),
        "length/mean": statistics.fmean(lengths),
        "length/max": max(lengths),
        "truncated": statistics.fmean(sample.truncated for sample in batch.samples),
        "samples": len(batch.samples),
        "aborted": asked - len(batch.samples),
        "tokens": sum(lengths),
    }
