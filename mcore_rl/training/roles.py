"""The running mean of each role's rewards, which self-play compares a sample with (RAE)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from mcore_rl.algo.algorithms import Algorithm
from mcore_rl.algo.baselines import running_mean
from mcore_rl.types import Sample


class RoleBaselines:
    """A mean for every role that was met, from step to step; the same on every rank (arXiv 2506.24119)."""

    def __init__(self, algorithm: Algorithm) -> None:
        """Begin with none, by the numbers of `algorithm`; it keeps nothing where that asks for no roles."""
        params = algorithm.advantage_params if algorithm.baseline == "role" else {}
        self._key, self._decay = params.get("role"), params.get("decay", 0.0)
        self._means: dict[str, float] = {}

    def of(self, samples: Sequence[Sample]) -> list[float]:
        """[N] the mean of each sample's role, before this step's rewards are in it; 0 of a new one."""
        return [self._means.get(self._role(sample), 0.0) for sample in samples]

    def observe(self, samples: Sequence[Sample]) -> None:
        """Let the rewards of a step into the means."""
        rewards: dict[str, list[float]] = defaultdict(list)
        for sample in samples if self._key is not None else ():
            rewards[self._role(sample)].append(sample.reward or 0.0)
        assert isinstance(self._decay, float)
        for role, its in rewards.items():
            given = torch.tensor(its, dtype=torch.float64)
            self._means[role] = running_mean(self._means.get(role, 0.0), given, self._decay)

    def state(self) -> dict[str, float]:
        """The means as JSON, for a checkpoint."""
        return dict(self._means)

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from `state`."""
        self._means = dict(state)

    def _role(self, sample: Sample) -> str:
        """What the prompt says that it is; prompts that say nothing share a mean."""
        return str(sample.prompt.metadata.get(str(self._key), ""))
