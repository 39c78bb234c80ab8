"""The servers against the trainer, token by token, and what follows where they disagree.

A server that samples from other weights, or something between that changes what it sends, gives tokens whose
log-probs are not the trainer's. Engines round differently, so there is a limit, publish.tolerance_p999, and
publish.mismatch_action says what happens above it. Only tokens of the weights in training are compared: what
older weights sampled is far from them by right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

import numpy as np

from mcore_rl.algo.metrics import quantile_rank
from mcore_rl.config import Config
from mcore_rl.errors import MismatchError
from mcore_rl.log import StepLog
from mcore_rl.precision import Tolerances, tolerances
from mcore_rl.training.batch import RolloutBatch
from mcore_rl.training.faults.exits import say
from mcore_rl.types import Sample

_FRACTION = 0.999


def tolerances_of(config: Config, layers: int) -> Tolerances:
    """The limits of [publish]; one that it leaves open is that of the precision, of servers' weights too."""
    p999, largest = config.publish.tolerance_p999, config.publish.tolerance_max
    found = tolerances("fp8" if config.publish.quantize == "fp8" else config.model.precision, layers)
    if p999 is None:
        p999 = found.p999 if largest is None else min(found.p999, largest)
    return Tolerances(p999, max(found.largest, p999) if largest is None else largest)


@dataclass(frozen=True)
class SampleSource:
    """Where the samples come from, in messages."""

    whose: str
    """log-probs they are"""
    causes: str
    """why they may differ from the trainer's"""
    look: str
    """remedy: where to look"""


SERVERS = SampleSource(
    "the servers'",
    "the servers sample from other weights, at another temperature or in another precision, or something "
    "between changes what they send",
    "See the servers' logs and what lies between",
)
DUMPS = SampleSource(
    "the dump's",
    "these weights are not those that sampled it: steps are missing, or they were trained otherwise",
    "Begin with the weights that the first dump was sampled from, and train every step",
)


@dataclass
class Notices:
    """How often a run says that its servers disagree: the 1st, 2nd, 4th, 8th time and so on."""

    count: int = 0

    def say(self, what: str) -> None:
        """One line on the terminal, when it is due."""
        self.count += 1
        if self.count & (self.count - 1) == 0:
            say(f"warning: {what} (so far in {self.count} steps of this run)")


@dataclass(frozen=True)
class CheckedBatch:
    """A rollout batch that may be trained."""

    batch: RolloutBatch
    old_log_probs: Mapping[int, np.ndarray] = field(default_factory=dict)
    """sample number in `batch` -> [n_i] of the policy; empty where nothing had to be compared yet"""
    dropped: int = 0
    """samples that are not in `batch`"""

    @property
    def metrics(self) -> dict[str, float]:
        """`mismatch/dropped`, where samples were compared."""
        return {"mismatch/dropped": float(self.dropped)} if self.old_log_probs else {}


def differences(
    samples: Sequence[Sample], old: Sequence[np.ndarray], ages: Sequence[np.ndarray] | None
) -> list[np.ndarray]:
    """[N] of |trainer - server| of each sample's tokens of the weights in training, `ages` 0; float64.

    A log-prob of the trainer that is not finite is a fault of its own, which the training step names.
    """
    found = []
    for number, (sample, own) in enumerate(zip(samples, old, strict=True)):
        gap = np.abs(np.asarray(own, np.float64) - np.asarray(sample.log_probs, np.float64))
        same = np.isfinite(gap) if ages is None else np.isfinite(gap) & (ages[number] == 0)
        found.append(gap[same])
    return found


def means(gaps: Sequence[np.ndarray]) -> np.ndarray:
    """[N] mean difference of each sample, 0 where it has no token to compare."""
    return np.array([gap.mean() if gap.size else 0.0 for gap in gaps])


def p999(gaps: Sequence[np.ndarray]) -> float:
    """What 99.9 % of all tokens are within, as `mismatch/p999` counts them; 0 for no tokens."""
    joined = np.sort(np.concatenate([np.zeros(0), *gaps]))
    return float(joined[ceil(quantile_rank(_FRACTION, float(joined.size))) - 1]) if joined.size else 0.0


@dataclass(frozen=True)
class Mismatch:
    """What a run does where its servers and its trainer disagree."""

    action: str
    """publish.mismatch_action"""
    limit: float
    """publish.tolerance_p999"""
    step_log: StepLog
    says: bool
    """this rank tells the terminal"""
    sampler: SampleSource = SERVERS
    notices: Notices = field(default_factory=Notices)

    def screen(
        self,
        batch: RolloutBatch,
        step: int,
        score: Callable[[Sequence[Sample]], list[np.ndarray]],
        ages: Sequence[np.ndarray] | None,
    ) -> CheckedBatch:
        """What of `batch` is trained in `step`; collective, the same on every rank.

        With "stop" and "drop" the policy scores all samples first, so that nothing of a wrong one is trained.

        Args:
            score: the policy's log-probs of samples.
            ages: [N] of [n_i] versions since each token was sampled; None where none is older.

        Raises:
            MismatchError: on every rank, with "stop" where 99.9 % of the log-probs are not within the limit,
                with "drop" where no sample is left.
        """
        if self.action == "warn":
            return CheckedBatch(batch)
        old = score(batch.samples)
        gaps = differences(batch.samples, old, ages)
        if self.action == "stop":
            self._stop(batch, gaps, step)
            return CheckedBatch(batch, dict(enumerate(old)))
        return self._drop(batch, gaps, old, step)

    def _stop(self, batch: RolloutBatch, gaps: Sequence[np.ndarray], step: int) -> None:
        limit, found = self.limit, p999(gaps)
        if found <= limit:
            return
        self.step_log.event("mismatch", step=step, p999=found, limit=limit)
        worst = batch.samples[int(means(gaps).argmax())].id
        raise MismatchError(
            f"step {step}: {self._differ(found)}, most in sample {worst}: {self.sampler.causes}. Nothing of "
            f"the step was trained. {self.sampler.look}; raise the tolerance only where two sound engines "
            "differ by so much"
        ).on_every_rank()

    def _drop(
        self, batch: RolloutBatch, gaps: Sequence[np.ndarray], old: Sequence[np.ndarray], step: int
    ) -> CheckedBatch:
        """Without the samples whose log-probs differ by more than the limit in their mean.

        In the mean, since one token of a thousand may differ by more in a sound sample.
        """
        limit, mean = self.limit, means(gaps)
        kept = np.flatnonzero(mean <= limit).tolist()
        dropped = len(batch.samples) - len(kept)
        if not kept:
            raise MismatchError(
                f"step {step}: the log-probs of all {dropped} samples differ from the trainer's by "
                f"{mean.min():.2e} or more in the mean (publish.tolerance_p999 = {limit:g}), and none is "
                f"left to train: {self.sampler.causes}. {self.sampler.look}"
            ).on_every_rank()
        if dropped:
            worst = int(mean.argmax())
            self.step_log.event("mismatch", step=step, dropped=dropped, largest=mean[worst], limit=limit)
            if self.says:
                self.notices.say(
                    f"step {step}: {dropped} of {len(batch.samples)} samples dropped, whose log-probs differ "
                    f"from the trainer's by more than {limit:g} in the mean, by {mean[worst]:.2e} in "
                    f"{batch.samples[worst].id}: {self.sampler.causes}"
                )
        left = replace(
            batch,
            samples=tuple(batch.samples[i] for i in kept),
            group_ids=tuple(batch.group_ids[i] for i in kept),
        )
        return CheckedBatch(left, {number: old[i] for number, i in enumerate(kept)}, dropped)

    def notice(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Say it, and write an event, where what `step` trained was above the limit."""
        found, limit = float(metrics.get("mismatch/p999", 0.0)), self.limit
        if found <= limit:
            return
        self.step_log.event("mismatch", step=step, p999=found, limit=limit)
        if self.says:
            self.notices.say(
                f"step {step}: {self._differ(found)}: {self.sampler.causes}; it was trained: "
                'publish.mismatch_action = "stop" ends the run before, "drop" leaves such samples out'
            )

    def _differ(self, found: float) -> str:
        return (
            f"{self.sampler.whose} log-probs differ from the trainer's by {found:.2e} at the 99.9 % quantile "
            f"(publish.tolerance_p999 = {self.limit:g})"
        )
