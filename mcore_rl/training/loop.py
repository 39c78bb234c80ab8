"""The reinforcement-learning loop. Every rank runs it, under torchrun: SPMD, no driver."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from mcore_rl.config import Config
from mcore_rl.directories import write_whole
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.training.advantage import Scores, compute_advantages
from mcore_rl.training.assemble import start
from mcore_rl.training.batch import (
    PerSample,
    RolloutBatch,
    build_batch,
    by_sample,
    has_loss,
    pack_mini_batch,
    split_mini_batches,
    token_sequences,
    whole_sequence,
)
from mcore_rl.training.checkpoint import end_step
from mcore_rl.training.data import data_metrics
from mcore_rl.training.evaluation_sets import held_out_metrics
from mcore_rl.training.faults.dump import keep_broken
from mcore_rl.training.generation import token_ages
from mcore_rl.training.metrics import StepMetrics, Work, rollout_metrics, work_of
from mcore_rl.training.model_passes import Update, log_probs, run_update, values
from mcore_rl.training.recorder import RecordedObjective, Recorder
from mcore_rl.training.run import Critic, Learner
from mcore_rl.types import Group, PackedBatch, Sample, Tokens


def train(config: Config, resume: str | None = None) -> None:
    """Train the policy of `config` for `train.steps` rollouts, from the beginning or a checkpoint.

    Raises:
        NothingToDo: `resume` names the checkpoint of the last step: the run is finished, which is no fault.
        McoreRLError: the same on every rank, with the remedy in its message.
    """
    with start(config, resume) as run:
        begun, evaluator = run.trainer.attempt.step, run.evaluator
        published = run.publisher.publish(begun, run.trainer.probe_prompts())
        if begun == 0:
            counted = data_metrics("train", run.trainer.prompts) | held_out_metrics(evaluator.sets)
            run.log(0, published | counted | evaluator.after(0))
        else:
            evaluator.resume(begun)
        for step in range(begun + 1, config.train.steps + 1):
            groups = run.generation.collect(step)
            save_samples(config.run.dir, run.trainer.mesh, run.trainer.decode, step, groups)
            run.dumps.write(step, groups)
            batch = build_batch(groups)
            run.servers.release()
            learned = learn(run, batch, step)
            held_out = evaluator.finish()
            published = run.publisher.publish(step, (whole_sequence(sample) for sample in batch.samples))
            held_out |= evaluator.after(step)
            run.log(step, learned.metrics | published | held_out, learned.work)
            end_step(run.trainer, run.contents, run.residency, step)


def save_samples(
    run_dir: Path,
    mesh: Mesh,
    decode: Callable[[Sequence[int] | Tokens], str],
    step: int,
    groups: Sequence[Group],
    count: int = 8,
) -> None:
    """Write the first sample of a few groups to RUN_DIR/samples/step_N.jsonl, for people; collective."""
    shown = [group.samples[0] for group in groups if group.samples][:count]
    records = (
        {
            "step": step,
            "prompt": s.prompt.text,
            "response": decode(s.token_ids),
            "label": s.prompt.label,
            "reward": s.reward,
        }
        for s in shown
    )
    path = run_dir / "samples" / f"step_{step}.jsonl"
    on_main(mesh, lambda: write_whole(path, "".join(json.dumps(record) + "\n" for record in records)))


@dataclass(frozen=True)
class Learned:
    """What the updates of one step were; the same on every rank."""

    metrics: dict[str, float]
    work: Work
    """that of the samples that were trained, without those that a mismatch left out"""


def learn(run: Learner, batch: RolloutBatch, step: int) -> Learned:
    """Scores -> advantages -> mini-batches -> updates."""
    config, timers, mesh = run.trainer.config, run.trainer.timers, run.trainer.mesh
    stale = config.rollout.max_staleness > 0
    ages = token_ages(batch.samples, step - 1) if stale else None

    def policy_scores(samples: Sequence[Sample]) -> list[np.ndarray]:
        sequences = token_sequences(samples)
        with timers("score"):
            scored = log_probs(run.trainer.policy, sequences, run.trainer.shape, run.trainer.temperature)
        return by_sample(scored, samples)

    screened = run.mismatch.screen(batch, step, policy_scores, ages)
    batch = screened.batch
    asked = config.rollout.prompts_per_step * config.rollout.samples_per_prompt - screened.dropped
    parts = split_mini_batches(
        len(batch.samples), run.trainer.shape.mini_batches, seed=(config.run.seed, step)
    )
    with timers("score"):
        scores = score(run, batch, parts, screened.old_log_probs)
    advantages = compute_advantages(batch, run.algorithm, scores)
    rates = {"lr/policy": run.trainer.optimizer.learning_rate}
    if run.critic is not None:
        rates["lr/critic"] = run.critic.optimizer.learning_rate
    policy, critic = StepMetrics(), StepMetrics()
    explain = partial(keep_broken, config, run.trainer.shape.align)
    shape = run.trainer.shape
    ages = {} if ages is None else {"age": token_ages(batch.samples, step - 1)}
    fields, objective = {**advantages.fields, **ages}, run.objective
    recorder = Recorder(batch.samples) if run.dumps.due(step) else None
    if recorder is not None:
        fields, objective = {**fields, **recorder.fields}, RecordedObjective(objective, recorder)

    def packed(part: np.ndarray, its: Mapping[str, PerSample]) -> list[PackedBatch]:
        return pack_mini_batch(batch, part, run.algorithm, shape, mesh, its)

    with timers("train"):
        for mini_batch in mini_batches(parts, fields, scores, config.algorithm.epochs, packed):
            update = Update(
                kind="policy",
                step=step,
                optimizer=run.trainer.optimizer,
                objective=objective,
                batches=mini_batch,
                temperature=run.trainer.temperature,
                ids=[sample.id for sample in batch.samples],
            )
            if run.critic is not None:
                critic.add(*run_update(critic_update(run.critic, update), run.residency, explain))
            if step > config.critic.warmup_rollouts:
                policy.add(*run_update(update, run.residency, explain))
    if recorder is not None:
        run.dumps.write_trained(step, recorder, recorder.tokens(mesh, advantages.fields["advantage"]))
    metrics = (
        rollout_metrics(batch, advantages.fields["advantage"], asked)
        | screened.metrics
        | advantages.metrics
        | rates
        | policy.reduce(mesh, "grad_norm")
        | critic.reduce(mesh, "grad_norm/critic")
    )
    trained = token_sequences([sample for sample in batch.samples if has_loss(sample, shape)])
    return Learned(metrics, work_of(trained, shape, config.algorithm.epochs))


def critic_update(critic: Critic, update: Update) -> Update:
    """The critic's step on the policy's mini-batch; its routers choose for themselves."""
    batches = [replace(micro_batch, experts=None) for micro_batch in update.batches]
    return replace(
        update, kind="critic", optimizer=critic.optimizer, objective=critic.objective, batches=batches
    )


def score(
    run: Learner, batch: RolloutBatch, parts: Sequence[np.ndarray], known: Mapping[int, np.ndarray]
) -> Scores:
    """One forward pass of each model that the algorithm asks, before the rollout's first update.

    The first mini-batch needs no old log-probs on its first visit: the policy is the old one, so the ratio is
    1 by construction. A KL in the reward needs them of all samples.

    Args:
        known: the old log-probs of all samples, where they were taken already.
    """
    shape, samples = run.trainer.shape, batch.samples
    # other models route for themselves
    sequences = [replace(sequence, experts=None) for sequence in token_sequences(samples)]
    old = known
    if not known:
        all_of_them = run.trainer.config.algorithm.epochs > 1 or run.algorithm.kl_in_reward != 0
        members = np.concatenate([np.zeros(0, np.int64), *(parts if all_of_them else parts[1:])]).tolist()
        later = [samples[i] for i in members]
        sequences_of_later = token_sequences(later)
        scored = (
            log_probs(run.trainer.policy, sequences_of_later, shape, run.trainer.temperature) if later else []
        )
        old = dict(zip(members, by_sample(scored, later), strict=True))
    with run.residency.during("reference"):
        ref = log_probs(run.reference, sequences, shape, run.trainer.temperature) if run.reference else []
    with run.residency.during("values"):
        value = values(run.critic.model, sequences, shape) if run.critic else []
    return Scores(old, by_sample(ref, samples) if ref else [], by_sample(value, samples) if value else [])


def mini_batches(
    parts: Sequence[np.ndarray],
    fields: Mapping[str, PerSample],
    scores: Scores,
    epochs: int,
    pack: Callable[[np.ndarray, Mapping[str, PerSample]], list[PackedBatch]],
) -> Iterator[list[PackedBatch]]:
    """Yield each optimizer step of one rollout, packed: its parts, visited `epochs` times."""
    for epoch in range(epochs):
        for number, part in enumerate(parts):
            old = {} if epoch == number == 0 else {"old_log_prob": scores.old_log_probs}
            yield pack(part, {**fields, **old})
