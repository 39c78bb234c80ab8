"""PPO whole: what it trains on follows from the layout's own actor, critic, reference and reward model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from mcore_rl.algo.algorithms import configure
from mcore_rl.model.build import Model
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.training.advantage import Scores, compute_advantages
from mcore_rl.training.batch import Batching, build_batch, by_sample, sampled_with, token_sequences
from mcore_rl.training.critic import split_following, values_of
from mcore_rl.training.model_passes import log_probs
from mcore_rl.training.rewards import scores_of
from mcore_rl.verify.layouts import problem

WHOLE = "ppo-whole"
"""name of it among the algorithms"""
KL_IN_REWARD = 0.2


def record_whole(
    policy: Callable[..., Model], critic: Callable[..., Model], mesh: Mesh, shape: Batching
) -> problem.Recorded:
    """One rollout, scored by four models: rewards, KL in the reward, values, whitened advantages. Collective.

    Every third sample is truncated, and its return goes on with the value behind it.

    Reference and reward model have random weights of other seeds. It begins on policy: a ratio that is taken
    of two forward passes would decide at the edge of a clip by rounding.

    Args:
        policy, critic: build_policy and build_critic, all but `ddp` given, and `random_seed` to be changed.
    """
    algorithm = configure("ppo", {"kl_in_reward": KL_IN_REWARD, "bootstrap": True})
    batch = build_batch(problem.recorded_groups())
    plain = tuple(
        replace(sample, parts=(), turn_rewards=(), finish_reason="stop" if number % 3 else "length")
        for number, sample in enumerate(batch.samples)
    )
    rewards = scores_of(critic(ddp=None, random_seed=problem.SEED + 2), plain, shape)
    judged = [replace(sample, reward=reward) for sample, reward in zip(plain, rewards, strict=True)]

    def scored(model: Model) -> list[np.ndarray]:
        return by_sample(log_probs(model, token_sequences(judged), shape, problem.TEMPERATURE), judged)

    old = scored(policy(ddp=None))
    batch = replace(batch, samples=tuple(map(sampled_with, judged, old)))
    values, following = split_following(values_of(critic(ddp=None), algorithm, batch, shape), batch.samples)
    reference = scored(policy(ddp=None, random_seed=problem.SEED + 1))
    scores = Scores(dict(enumerate(old)), reference, values, following)
    advantages = compute_advantages(batch, algorithm, scores)
    return problem.Recorded(algorithm, batch, {"old_log_prob": old, **advantages.fields})
