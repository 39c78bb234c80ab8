"""Distillation: a student learns to answer as its teachers do, on rows as they are or on what it samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mcore_rl.algo.distillation import ForwardKL, JensenShannon, ReverseKL, sampled_reverse_kl
from mcore_rl.algo.losses import weighted_sum
from mcore_rl.algo.metrics import Key, Mean, Metric, parts_of
from mcore_rl.config import Config
from mcore_rl.config.rows import DistillConfig
from mcore_rl.data.examples import Example
from mcore_rl.model.build import Model
from mcore_rl.model.optimizer import Optimizer
from mcore_rl.model.residency import Residency
from mcore_rl.model.step import Loss, forward
from mcore_rl.parallel.head import HeadOutput
from mcore_rl.parallel.head.divergence import Against, Divergence
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.training.batch import Batching, build_batch, pack_share, token_sequences
from mcore_rl.training.layout import layout_of
from mcore_rl.training.metrics import Gathered, LossTotal, read, sample_metrics
from mcore_rl.training.model_passes import Update
from mcore_rl.training.objective import Parts
from mcore_rl.training.session import Metrics, Session, sequences_of, start_model, start_session
from mcore_rl.training.setup import world_size
from mcore_rl.training.teachers import Teachers, check_teachers, start_teachers
from mcore_rl.types import PackedBatch, Sample

VALIDATION = Key("validation/loss", Mean(None))


def train_distillation(config: Config, resume: str | None = None) -> None:
    """Train for `train.steps` batches of rows, or of what is sampled; the model goes to RUN_DIR/model.

    Raises:
        ConfigError: as `check_teachers`, before anything is built.
    """
    check_teachers(config, layout_of(config, world_size()))
    with start_model(config, resume) as trainer:
        teachers = start_teachers(config, trainer.mesh)
        with start_session(trainer, teachers.frozen, teachers.waiting) as session:
            comparison = Comparison(
                teachers,
                divergence_of(config.distill),
                trainer.shape,
                temperature_of(config),
                session.residency,
            )
            validate = partial(
                validate_distillation, trainer.policy, comparison, config.supervised.batch_size
            )
            for step in session.steps(validate):
                rows, sampled = next_rows(session, step)
                with trainer.timers("score"):
                    compared = comparison.of(rows, trainer.mesh)
                with trainer.timers("train"):
                    update = distill_update(trainer.optimizer, comparison, compared, rows, step)
                    totals, optimized = session.optimize(update)
                metrics = {"tokens": sum(row.tokens for row in rows), **sampled, **optimized}
                session.log(step, rows, read(totals, updates=1) | metrics, validate)
            session.export()


def divergence_of(config: DistillConfig) -> Divergence | None:
    """What [distill] compares over the whole vocabulary; None where sampled tokens alone are compared."""
    match config.divergence:
        case "forward":
            return ForwardKL()
        case "reverse":
            return ReverseKL()
        case "jsd":
            return JensenShannon(config.beta)
        case "sampled":
            return None


def objective_of(divergence: Divergence | None) -> Loss:
    """The loss of a row; of sampled tokens alone where there is no divergence of whole vocabularies."""
    return SampledObjective() if divergence is None else DivergenceObjective()


def temperature_of(config: Config) -> float:
    """That of both models: what is sampled has the temperature of sampling."""
    return config.rollout.temperature if config.distill.on_policy else 1.0


def next_rows(session: Session, step: int) -> tuple[list[Example], Metrics]:
    """The rows of a step over all replicas, and what is to be said of them where they were sampled."""
    config = session.trainer.config
    if not config.distill.on_policy:
        return session.next_batch(), {}
    batch = build_batch(session.served.collect(step))
    asked = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    return [as_example(sample) for sample in batch.samples], sample_metrics(batch, asked)


def as_example(sample: Sample) -> Example:
    """A sample as a row whose answer is what the student said."""
    prompt = sample.prompt
    sequences = tuple(token_sequences([sample]))
    return Example(sample.id, prompt.text, prompt.token_ids, "", prompt.metadata, sequences=sequences)


@dataclass(frozen=True)
class Compared:
    """The micro-batches of one step on this rank, and what the teachers say of them."""

    batches: Sequence[PackedBatch]
    against: Sequence[Against | None] = ()
    """one for each micro-batch; none at all where the teacher's log-probs are a field"""


@dataclass(frozen=True)
class Comparison:
    """How a student is compared with its teachers."""

    teachers: Teachers
    divergence: Divergence | None
    """None: at the sampled tokens"""
    shape: Batching
    temperature: float
    residency: Residency

    @property
    def objective(self) -> Loss:
        """The loss of a row."""
        return objective_of(self.divergence)

    def of(self, rows: Sequence[Example], mesh: Mesh) -> Compared:
        """The rows, packed, with what their teachers say of them; collective.

        A micro-batch has rows of one teacher where whole vocabularies are compared: its head has one weight
        to compare with.
        """
        if self.divergence is None:
            said = self.teachers.log_probs(rows, self.shape, self.temperature, self.residency)
            fields = {**fields_of(rows), "teacher_log_prob": said}
            return Compared(pack_share(sequences_of(rows), fields, self.shape, mesh))
        batches = by_teacher(self.teachers, rows, self.shape, mesh)
        states = self.teachers.states(batches, self.divergence, self.residency)
        return Compared([batch for its in batches.values() for batch in its], states)


def fields_of(rows: Sequence[Example]) -> dict[str, Sequence]:
    """The fields of every sequence: the weight with all replicas' trained tokens, and its row's number."""
    tokens = sum(row.tokens for row in rows)
    return {"weight": [1.0 / max(tokens, 1)] * len(rows), "sample": range(len(rows))}


def by_teacher(
    teachers: Teachers, rows: Sequence[Example], shape: Batching, mesh: Mesh
) -> dict[str, list[PackedBatch]]:
    """Name of a teacher -> this replica's micro-batches of its rows, equally many on every replica."""
    sequences, fields, found = sequences_of(rows), fields_of(rows), {}
    for number, name in enumerate(teachers.models):
        its = teachers.split(rows).get(name, [])
        own = {key: [values[i] for i in its] for key, values in fields.items()}
        own["teacher"] = [number] * len(its)
        if its:
            found[name] = pack_share([sequences[i] for i in its], own, shape, mesh)
    return found


def distill_update(
    optimizer: Optimizer, comparison: Comparison, compared: Compared, rows: Sequence[Example], step: int
) -> Update:
    """One optimizer step on `rows`, with the mean over all replicas' trained tokens."""
    return Update(
        kind="distill",
        step=step,
        optimizer=optimizer,
        objective=comparison.objective,
        batches=compared.batches,
        temperature=comparison.temperature,
        ids=[row.id for row in rows],
        against=compared.against,
    )


def validate_distillation(
    policy: Model, comparison: Comparison, rows_at_once: int, rows: Sequence[Example]
) -> Metrics:
    """The mean divergence over the trained tokens of held-out rows; collective.

    Args:
        rows_at_once: rows whose teacher's hidden states are held together.
    """
    gathered = Gathered()
    for begin in range(0, len(rows), rows_at_once):
        compared = comparison.of(rows[begin : begin + rows_at_once], policy.mesh)
        scored = forward(policy, compared.batches, comparison.temperature, against=compared.against)
        gathered.add(
            {VALIDATION: Mean(found).part(torch.ones_like(found, dtype=torch.bool))} for _, found in scored
        )
    return read(gathered.reduce(policy.mesh), updates=1)


class DivergenceObjective:
    """Called by model.step for every micro-batch; see `Loss` there. The head tells it divergences."""

    def rowwise(self, batch: PackedBatch) -> bool:
        """Always."""
        return True

    def __call__(self, batch: PackedBatch, divergence: Tensor) -> tuple[Tensor, Callable[[], Parts]]:
        """Return the sum of weight * divergence over this rank's rows; weight = 1 / tokens of the step."""
        return weighted_sum(divergence, batch.fields["weight"]), partial(_parts, batch, divergence, {})


class SampledObjective:
    """The same of the reverse KL at tokens that the student sampled."""

    def rowwise(self, batch: PackedBatch) -> bool:
        """Always."""
        return True

    def __call__(self, batch: PackedBatch, head: HeadOutput) -> tuple[Tensor, Callable[[], Parts]]:
        """Return the sum of weight * (log p - log q) over this rank's rows, as a loss."""
        loss = sampled_reverse_kl(head.log_prob, batch.fields["teacher_log_prob"])
        measured = partial(_parts, batch, loss, {"entropy": Mean(head.entropy)})
        return weighted_sum(loss, batch.fields["weight"]), measured


def _parts(batch: PackedBatch, loss: Tensor, more: Mapping[str, Metric]) -> Parts:
    metrics = {"loss/policy": LossTotal(batch.fields["weight"] * loss.detach()), **more}
    everything = torch.ones_like(loss, dtype=torch.bool)
    return parts_of(metrics, everything, everything)
