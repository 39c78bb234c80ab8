"""The reinforcement-learning loop. Every rank runs it, under torchrun: SPMD, no driver."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from mcore_rl.algo.algorithms import Algorithm
from mcore_rl.algo.baselines import gradient_energy
from mcore_rl.config import Config
from mcore_rl.directories import write_whole
from mcore_rl.log import tell
from mcore_rl.model.build import Model
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.terminal import joined
from mcore_rl.training.advantage import Scores, compute_advantages
from mcore_rl.training.assemble import start
from mcore_rl.training.batch import (
    Batching,
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
from mcore_rl.training.critic import critic_updates, split_following, values_of
from mcore_rl.training.data import data_metrics
from mcore_rl.training.evaluation_sets import held_out_metrics
from mcore_rl.training.faults.dump import keep_broken
from mcore_rl.training.generation import token_ages
from mcore_rl.training.kl_control import KLControl
from mcore_rl.training.metrics import StepMetrics, Work, rollout_metrics, work_of
from mcore_rl.training.model_passes import Update, log_probs, run_update
from mcore_rl.training.recorder import RecordedObjective, Recorder
from mcore_rl.training.roles import RoleBaselines
from mcore_rl.training.run import Learner
from mcore_rl.training.rundir import published_to
from mcore_rl.types import Group, PackedBatch, Sample, Tokens


def train(config: Config, resume: str | None = None) -> None:
    """Train the policy of `config` for `train.steps` rollouts, from the beginning or a checkpoint.

    Raises:
        NothingToDo: `resume` names the checkpoint of the last step: the run is finished, which is no fault.
        McoreRLError: the same on every rank, with the remedy in its message.
    """
    with start(config, resume) as run:
        begun, evaluator, is_main = run.trainer.attempt.step, run.evaluator, run.trainer.mesh.is_main
        tell("publishing the weights to the servers, and comparing log-probs ...", is_main=is_main)
        published = run.publisher.publish(begun, run.trainer.probe_prompts())
        if begun == 0:
            if evaluator.sets:
                tell(f"evaluating {joined(one.name for one in evaluator.sets)} ...", is_main=is_main)
            counted = data_metrics("train", run.trainer.prompts) | held_out_metrics(evaluator.sets)
            run.log(0, published | counted | evaluator.after(0))
        else:
            evaluator.resume(begun)
            run.trainer.timers.collect()  # what came before is no step
        for step in range(begun + 1, config.train.steps + 1):
            groups = run.generation.collect(step)
            save_samples(config.run.dir, run.trainer.mesh, run.trainer.decode, step, groups)
            run.dumps.write(step, groups)
            batch = build_batch(groups)
            greedy = run.greedy.of(groups) if run.algorithm.baseline == "greedy" else {}
            run.servers.release()
            learned = learn(run, batch, step, greedy)
            held_out = evaluator.finish()
            sampled = (whole_sequence(sample) for sample in batch.samples)
            published = run.publisher.publish(step, sampled, learned.work.tokens)
            held_out |= evaluator.after(step)
            run.log(step, learned.metrics | published | held_out, learned.work)
            end_step(run.trainer, run.contents, run.residency, step)
        say_where(config, is_main=is_main)


def say_where(config: Config, *, is_main: bool) -> None:
    """Say where the trained model is, and what shows the run; on the main rank."""
    where = f"{published_to(config)}/{config.train.steps}"
    if config.publish.transport == "adapter":
        where += ", an adapter in PEFT's format (`mcore-rl convert merge` makes a model of it)"
    elif config.publish.transport != "disk":
        where = "the servers; `mcore-rl convert mcore-to-hf` makes one of a checkpoint"
    tell(f"the model is in {where}; `mcore-rl report {config.run.dir}` shows the run", is_main=is_main)


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


def learn(
    run: Learner, batch: RolloutBatch, step: int, greedy: Mapping[str, float] = MappingProxyType({})
) -> Learned:
    """Scores -> advantages -> mini-batches -> updates.

    Args:
        greedy: group id -> reward of a greedy answer, where the algorithm compares with it.
    """
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
    scores = replace(scores, baselines=baselines_of(run.algorithm, run.roles, batch, greedy))
    warm_up = step <= config.critic.warmup_rollouts
    algorithm = algorithm_of(run.algorithm, run.kl, warm_up=warm_up)
    advantages = compute_advantages(batch, algorithm, scores)
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
        if run.critic is not None:
            for update in critic_updates(
                run.critic, config, shape, algorithm, batch, advantages.fields, step
            ):
                critic.add(*run_update(update, run.residency, explain))
        epochs = 0 if warm_up else config.algorithm.epochs
        for number, mini_batch in enumerate(mini_batches(parts, fields, scores, epochs, packed), start=1):
            update = Update(
                kind="policy",
                step=step,
                optimizer=run.trainer.optimizer,
                objective=objective,
                batches=mini_batch,
                temperature=run.trainer.temperature,
                ids=[sample.id for sample in batch.samples],
                followed=number < epochs * len(parts),
            )
            policy.add(*run_update(update, run.residency, explain))
    observe(run.kl, run.roles, algorithm, batch, {} if warm_up else advantages.metrics)
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


def observe(
    kl: KLControl,
    roles: RoleBaselines,
    algorithm: Algorithm,
    batch: RolloutBatch,
    metrics: Mapping[str, float],
) -> None:
    """Let a step into what goes on from step to step.

    Args:
        metrics: of its advantages; none in a warm-up, where a policy that does not learn says nothing of the
            KL's coefficient.
    """
    if algorithm.per_token:
        kl.observe(metrics, len(batch.samples))
    if algorithm.baseline == "role":
        roles.observe(batch.samples)


def baselines_of(
    algorithm: Algorithm, roles: RoleBaselines, batch: RolloutBatch, greedy: Mapping[str, float]
) -> list[float]:
    """[N] what each reward is compared with from outside of the batch; nothing where it is not."""
    match algorithm.baseline:
        case "greedy":
            return [greedy.get(group, math.nan) for group in batch.group_ids]
        case "role":
            return roles.of(batch.samples)
    return []


def algorithm_of(algorithm: Algorithm, kl: KLControl, *, warm_up: bool) -> Algorithm:
    """The algorithm with the numbers of this step: the coefficient of the KL, and lambda in a warm-up.

    The critic alone learns in a warm-up, from returns that its own first values are not part of.
    """
    if not algorithm.per_token:
        return algorithm
    if not (warm_up and algorithm.needs_critic):
        return kl.algorithm
    algorithm = kl.algorithm
    return replace(algorithm, params={**algorithm.params, "lam": 1.0})


def score(
    run: Learner, batch: RolloutBatch, parts: Sequence[np.ndarray], known: Mapping[int, np.ndarray]
) -> Scores:
    """One forward pass of each model that the algorithm asks, before the rollout's first update.

    The first mini-batch needs no old log-probs on its first visit: the policy is the old one, so the ratio is
    1 by construction. A KL in the reward, and what is chosen among all tokens, need them of all samples.

    Args:
        known: the old log-probs of all samples, where they were taken already.
    """
    shape, samples = run.trainer.shape, batch.samples
    # other models route for themselves
    sequences = [replace(sequence, experts=None) for sequence in token_sequences(samples)]
    old = known
    if not known:
        all_of_them = run.trainer.config.algorithm.epochs > 1 or run.algorithm.needs_old
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
        value = values_of(run.critic.model, run.algorithm, batch, shape) if run.critic else []
    value, following = split_following(value, samples) if run.algorithm.bootstrap else (value, [])
    energy: list[np.ndarray] = []
    if run.algorithm.by_token:
        energy = energy_of(run.trainer.policy, shape, run.trainer.temperature, samples, old)
    return Scores(old, by_sample(ref, samples) if ref else [], value, following, energy)


def energy_of(
    policy: Model,
    shape: Batching,
    temperature: float,
    samples: Sequence[Sample],
    old: Mapping[int, np.ndarray],
) -> list[np.ndarray]:
    """[N] of [m_i] of baselines.gradient_energy, by one more forward pass, at half the temperature."""
    halves = log_probs(policy, token_sequences(samples), shape, temperature / 2)
    pairs = zip((old[i] for i in range(len(samples))), by_sample(halves, samples), strict=True)
    both = [[torch.from_numpy(np.asarray(x, np.float64)) for x in pair] for pair in pairs]
    return [gradient_energy(*its).numpy() for its in both]


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
