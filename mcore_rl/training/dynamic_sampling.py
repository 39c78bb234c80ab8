"""Dynamic sampling: groups without a signal are replaced (DAPO, arXiv 2503.14476 section 3.2).

Pure, from the gathered groups with the rewards as they were given: every rank decides the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from mcore_rl.algo.advantages import group_statistics, informative
from mcore_rl.errors import NoSignalError
from mcore_rl.training.advantage import reward_parts
from mcore_rl.types import Group, Sample


def has_signal(group: Group, *, by_parts: bool) -> bool:
    """Whether two rewards of its live samples differ, so that an advantage over the group is not 0.

    Void samples have no reward that counts, and a sample alone has nothing to be compared with. A response
    that `algorithm.overlong_filter` leaves out of the loss counts here, as it does in the statistics.

    Args:
        by_parts: the algorithm compares each part of the reward by itself (GDPO): one part that differs is a
            signal, though the sums are equal. A part that a sample does not have is 0 there.
    """
    live = _live(group.samples)
    compared = [[sample.reward for sample in live]]
    if by_parts:
        parts = [{part.name: part.value for part in reward_parts(one) if part.weight} for one in live]
        names = {name for its in parts for name in its}
        compared = [[its.get(name, 0.0) for its in parts] for name in names]
    ids = [group.id] * len(live)
    return any(informative(group_statistics(ids, rewards)).any() for rewards in compared)


@dataclass
class FilteredGroups:
    """The groups that one step has sampled so far: those that it trains, and those that were replaced."""

    wanted: int
    """groups that are trained"""
    most: int
    """groups that may be sampled to find them; 0: any group is trained"""
    by_parts: bool = False
    """as in `has_signal`"""
    kept: list[Group] = field(default_factory=list)
    dropped: list[Group] = field(default_factory=list)

    @property
    def groups(self) -> list[Group]:
        """All that were sampled."""
        return [*self.kept, *self.dropped]

    @property
    def missing(self) -> int:
        """Groups that the step still lacks."""
        return self.wanted - len(self.kept)

    def add(self, groups: Sequence[Group]) -> None:
        """These were sampled."""
        for group in groups:
            signal = not self.most or has_signal(group, by_parts=self.by_parts)
            (self.kept if signal else self.dropped).append(group)

    def check(self, step: int) -> None:
        """Raise NoSignalError, on every rank, where what is missing is more than may still be sampled."""
        sampled = len(self.groups)
        if not self.missing or sampled + self.missing <= self.most:
            return
        raise NoSignalError(
            f"step {step}: {len(self.dropped)} of {sampled} groups had no signal "
            f"({len(self.dropped) / sampled:.1%}): {self._why()}. rollout.dynamic_sampling allows "
            f"{self.most} groups for the {self.wanted} of a step. Give prompts that the policy solves "
            "sometimes (data.curriculum can choose them), raise rollout.samples_per_prompt or the limit, or "
            "look at the reward"
        ).on_every_rank()

    def _why(self) -> str:
        rewards = [[sample.reward for sample in _live(group.samples)] for group in self.dropped]
        alone = sum(len(its) < 2 for its in rewards)
        equal = [its[0] for its in rewards if len(its) > 1]
        said = [f"{alone} had fewer than two live samples"] if alone else []
        if equal:
            often = statistics.mode(equal)
            said.insert(
                0, f"the rewards of {len(equal)} were all equal, of {equal.count(often)} all {often:g}"
            )
        return ", and ".join(said)

    def metrics(self) -> dict[str, float]:
        """What was sampled and what of it was replaced; `void` alone where any group is trained."""
        samples = [sample for group in self.groups for sample in group.samples]
        found = {"void": float(sum(sample.void for sample in samples))}
        if not self.most:
            return found
        rewards = [float(sample.reward or 0.0) for sample in _live(samples)]
        return found | {
            "sampling/groups": float(len(self.groups)),
            "sampling/dropped": float(len(self.dropped)),
            "sampling/refill_rate": len(self.dropped) / len(self.groups),
            "sampling/reward": statistics.fmean(rewards),
        }


def live_samples(groups: Sequence[Group]) -> int:
    """How many samples of these are not void."""
    return sum(len(_live(group.samples)) for group in groups)


def _live(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if not sample.void]
