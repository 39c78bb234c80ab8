"""Held-out accuracy or reward: one sample per prompt at the training temperature, scored as in training."""

from __future__ import annotations

import math
from pathlib import Path

from mcore_rl.train.run import Run, sample


def due(step: int, steps: int, every: int) -> bool:
    """Evaluate at the start, at the end, and every `every` steps between (0: not between)."""
    return step in (0, steps) or (every > 0 and step % every == 0)


def evaluate(run: Run, step: int) -> dict[str, float]:
    """{"eval/<set>/accuracy": mean reward} when an evaluation is due at `step`, else nothing; collective.

    A reward model's scores are no accuracy: their mean is `eval/<set>/reward`. `samples` is of how many, and
    `prompts` how many the file has: over-long ones are left out, and so is what exceeds train.eval_samples.
    """
    config = run.config
    if not run.eval_prompts or not due(step, config.train.steps, config.train.eval_every):
        return {}
    with run.timers("eval"):
        groups = sample(run, run.eval_prompts, f"eval{step}", samples_per_prompt=1)
        rewards = [s.reward for group in groups for s in group.samples if s.reward is not None]
    if not rewards:  # the servers aborted every sample: no accuracy is not an accuracy of 0
        return {}
    name = Path(str(config.data.eval)).stem
    what = "accuracy" if config.reward.model is None else "reward"
    return {
        f"eval/{name}/{what}": math.fsum(rewards) / len(rewards),
        f"eval/{name}/samples": len(rewards),
        f"eval/{name}/prompts": run.counted["data/eval/prompts"],
    }
