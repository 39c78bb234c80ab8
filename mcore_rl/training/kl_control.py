"""The coefficient of the KL in the reward over a run: fixed, or adapted to a target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mcore_rl.algo.algorithms import Algorithm
from mcore_rl.algo.losses import adaptive_kl_coefficient

OBSERVED = "kl/response"
"""the metric that a target is compared with"""


class KLControl:
    """Adapts the coefficient after every rollout (arXiv 1909.08593 section 2.2); the same on every rank."""

    def __init__(self, algorithm: Algorithm) -> None:
        """Begin with `kl_in_reward` of `algorithm`, which it keeps where there is no `kl_target`."""
        self._algorithm = algorithm
        self._coefficient = algorithm.kl_in_reward

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm with the coefficient of the present rollout."""
        return replace(self._algorithm, kl_in_reward=self._coefficient)

    def observe(self, metrics: Mapping[str, float], samples: int) -> None:
        """Adapt the coefficient for the next rollout to what was measured of this one, of `samples`."""
        target = self._algorithm.kl_target
        if target is not None and OBSERVED in metrics:
            self._coefficient = adaptive_kl_coefficient(
                self._coefficient,
                metrics[OBSERVED],
                samples,
                target=target,
                horizon=self._algorithm.kl_horizon,
            )

    def state(self) -> dict[str, float]:
        """The adapted coefficient as JSON, for a checkpoint; nothing where it is fixed."""
        return {} if self._algorithm.kl_target is None else {"coefficient": self._coefficient}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from `state`, unless the coefficient is fixed now."""
        if self._algorithm.kl_target is not None:
            self._coefficient = state.get("coefficient", self._coefficient)
