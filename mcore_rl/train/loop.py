"""The reinforcement-learning loop. Every rank runs it, under torchrun: SPMD, no driver."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mcore_rl.config import Config
from mcore_rl.train.advantage import Advantages, Scores, compute_advantages
from mcore_rl.train.ahead import token_ages
from mcore_rl.train.batch import (
    RolloutBatch,
    build_batch,
    pack_mini_batch,
    split_mini_batches,
    token_sequence,
    whole_sequence,
)
from mcore_rl.train.checkpoint import end_step
from mcore_rl.train.colocated import release_servers
from mcore_rl.train.evaluate import evaluate
from mcore_rl.train.metrics import StepMetrics, rollout_metrics
from mcore_rl.train.mismatch import screen
from mcore_rl.train.publish import publish
from mcore_rl.train.run import Run, rollout, start
from mcore_rl.train.score import log_probs, values
from mcore_rl.train.update import Update, run_update
from mcore_rl.types import PackedBatch


def train(config: Config, resume: str | None = None) -> None:
    """Train the policy of `config` for `train.steps` rollouts, from the beginning or a checkpoint.

    Raises:
        McoreRLError: the same on every rank, with the remedy in its message.
    """
    with start(config, resume) as run:
        published = publish(run, run.step, run.probe_prompts())
        if run.step == 0:
            run.log(0, published | run.counted | evaluate(run, 0))
        for step in range(run.step + 1, config.train.steps + 1):
            batch = build_batch(rollout(run, step))
            release_servers(run)
            learned = learn(run, batch, step)
            published = publish(run, step, (whole_sequence(sample) for sample in batch.samples))
            run.log(step, learned | published | evaluate(run, step))
            end_step(run, step)


def learn(run: Run, batch: RolloutBatch, step: int) -> dict[str, float]:
    """Scores -> advantages -> mini-batches -> updates. Returns metrics, the same on every rank."""
    screened = screen(run, batch, step)
    batch = screened.batch
    asked = run.config.rollout.prompts_per_step * run.config.rollout.samples_per_prompt - screened.dropped
    parts = split_mini_batches(len(batch.samples), run.shape.mini_batches, seed=(run.config.run.seed, step))
    with run.timers("score"):
        scores = score(run, batch, parts, screened.old_log_probs)
    advantages = compute_advantages(batch, run.algorithm, scores)
    policy, critic = StepMetrics(), StepMetrics()
    with run.timers("train"):
        for mini_batch in mini_batches(run, batch, parts, scores, advantages, step):
            data = (mini_batch, run.temperature, [sample.id for sample in batch.samples])
            if run.critic is not None:
                trained = run.critic.optimizer, run.critic.objective
                own = [replace(micro_batch, experts=None) for micro_batch in mini_batch]
                critic.add(*run_update(run, Update("critic", step, *trained, own, *data[1:])))
            if step > run.config.critic.warmup_rollouts:
                policy.add(*run_update(run, Update("policy", step, run.optimizer, run.objective, *data)))
    return (
        rollout_metrics(batch, advantages.fields["advantage"], asked)
        | screened.metrics
        | advantages.metrics
        | policy.reduce(run.mesh, "grad_norm")
        | critic.reduce(run.mesh, "grad_norm/critic")
    )


def score(
    run: Run, batch: RolloutBatch, parts: Sequence[np.ndarray], known: Mapping[int, np.ndarray]
) -> Scores:
    """One forward pass of each model that the algorithm asks, before the rollout's first update.

    `known`: the old log-probs of all samples, where they were taken already.
    """
    old = known or old_log_probs(run, batch, parts)
    # Other models than the policy route for themselves.
    sequences = [replace(token_sequence(sample), experts=None) for sample in batch.samples]
    with run.residency.during("reference"):
        ref = log_probs(run.reference, sequences, run.shape, run.temperature) if run.reference else []
    with run.residency.during("values"):
        value = values(run.critic.model, sequences, run.shape) if run.critic else []
    return Scores(old, ref, value)


def old_log_probs(run: Run, batch: RolloutBatch, parts: Sequence[np.ndarray]) -> Mapping[int, np.ndarray]:
    """Sample number -> [n_i] of the policy, of the samples whose mini-batches need them.

    The first mini-batch needs none on its first visit: the policy is the old one, so the ratio is 1 by
    construction. A KL in the reward needs them of all samples.
    """
    all_of_them = run.config.algorithm.epochs > 1 or run.algorithm.kl_in_reward != 0
    members = np.concatenate([np.zeros(0, np.int64), *(parts if all_of_them else parts[1:])])
    later = [token_sequence(batch.samples[i]) for i in members]
    scored = log_probs(run.policy, later, run.shape, run.temperature) if later else []
    return dict(zip(members.tolist(), scored, strict=True))


def mini_batches(
    run: Run,
    batch: RolloutBatch,
    parts: Sequence[np.ndarray],
    scores: Scores,
    advantages: Advantages,
    step: int,
) -> Iterator[list[PackedBatch]]:
    """Each optimizer step of one rollout, packed: its parts, visited `algorithm.epochs` times."""
    for epoch in range(run.config.algorithm.epochs):
        for number, part in enumerate(parts):
            old = {} if epoch == number == 0 else {"old_log_prob": scores.old_log_probs}
            ages = {} if run.ahead is None else {"age": token_ages(batch.samples, step - 1)}
            fields = {**advantages.fields, **old, **ages}
            yield pack_mini_batch(batch, part, run.algorithm, run.shape, run.mesh, fields)
