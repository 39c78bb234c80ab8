"""Held-out accuracy or reward: one sample per prompt at the training temperature, scored as in training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mcore_rl.log import Timers
from mcore_rl.training.generation import Generation
from mcore_rl.types import Prompt


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and when."""

    prompts: Sequence[Prompt]
    """held out; none, where nothing is evaluated"""
    name: str
    """of the set, as metrics carry it"""
    what: str
    """`accuracy`, or `reward` where a reward model gives scores, which are no accuracy"""
    steps: int
    """of the whole run"""
    every: int
    """steps between two evaluations; 0 evaluates at the start and at the end alone"""
    counted: Mapping[str, float]
    """`data/eval/prompts` and `data/eval/dropped`: what the file has"""

    def due(self, step: int) -> bool:
        """Whether the policy is evaluated after `step`: at the start, at the end, and every `every` steps."""
        regular = self.every > 0 and step % self.every == 0
        return bool(self.prompts) and (step in (0, self.steps) or regular)


def evaluate(generation: Generation, evaluation: Evaluation, step: int, timers: Timers) -> dict[str, float]:
    """{"eval/<set>/accuracy": mean reward} where an evaluation is due after `step`, else nothing; collective.

    Nothing either where the servers aborted every sample: no accuracy is not an accuracy of 0. `samples` says
    of how many samples the mean is, `prompts` how many prompts the file has: over-long ones are left out, and
    so is what exceeds train.eval_samples.
    """
    if not evaluation.due(step):
        return {}
    with timers("eval"):
        groups = generation.evaluate(evaluation.prompts, f"eval{step}")
        rewards = [s.reward for group in groups for s in group.samples if s.reward is not None]
    if not rewards:
        return {}
    return {
        f"eval/{evaluation.name}/{evaluation.what}": math.fsum(rewards) / len(rewards),
        f"eval/{evaluation.name}/samples": len(rewards),
        f"eval/{evaluation.name}/prompts": evaluation.counted["data/eval/prompts"],
    }
