"""Kinds of training beside reinforcement learning: what their loops share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mcore_rl.algo.metrics import Key
from mcore_rl.config import Config
from mcore_rl.data.examples import Example
from mcore_rl.data.packing import TokenSequence
from mcore_rl.log import tell
from mcore_rl.model.build import Model
from mcore_rl.model.residency import Residency, ResidentPart
from mcore_rl.training.assemble_rollouts import Served, served
from mcore_rl.training.checkpoint import Contents, end_step, restore
from mcore_rl.training.data import data_metrics
from mcore_rl.training.environment import check_environment
from mcore_rl.training.evaluation_sets import load_set_functions
from mcore_rl.training.faults.dump import keep_broken
from mcore_rl.training.metrics import Gathered, work_of
from mcore_rl.training.model_passes import Update, run_update
from mcore_rl.training.setup import offloaded_optimizers, read_prompts, start_trainer
from mcore_rl.training.trainer import Trainer
from mcore_rl.types import Prompt
from mcore_rl.weights.disk import export

_NONE: Mapping[str, Any] = MappingProxyType({})

Metrics = dict[str, float]
Validate = Callable[[Sequence[Example]], Metrics]
"""held-out rows -> metrics, without a gradient; collective"""


@dataclass(frozen=True)
class Session:
    """A run without rollouts, between its start and its export."""

    trainer: Trainer
    contents: Contents
    residency: Residency
    served: Served
    """samples the held-out sets after a step that asks for it, and what is trained where that is sampled"""
    held_out: Sequence[Example]
    """rows of data.validation"""

    def steps(self, validate: Validate) -> Iterator[int]:
        """The steps that are left, each saved when its turn is over; at the beginning step 0 is logged."""
        config, begun = self.trainer.config, self.trainer.attempt.step
        if begun == 0 and (config.samples_responses or self.held_out):
            self.trainer.log(0, self._counted | self._validated(0, validate) | self.served.after(0))
        elif begun and config.distills_samples:
            self.served.publish(begun)
        self.trainer.timers.collect()  # what came before is no step
        for step in range(begun + 1, config.train.steps + 1):
            yield step
            end_step(self.trainer, self.contents, self.residency, step)

    def next_batch(self) -> list[Example]:
        """The rows of a step over all replicas."""
        cursor = self.trainer.cursor
        rows = examples(cursor.next(self.trainer.config.supervised.batch_size))
        cursor.keep(())
        return rows

    def optimize(self, update: Update) -> tuple[dict[Key, Tensor], Metrics]:
        """See `optimize`."""
        trainer = self.trainer
        return optimize(update, self.residency, partial(keep_broken, trainer.config, trainer.shape.align))

    def log(self, step: int, rows: Sequence[Example], metrics: Metrics, validate: Validate) -> None:
        """Log a step that trained `rows`, and what the held-out data says after it."""
        counted = self._counted if step == 1 else {}
        more = self._validated(step, validate) | self.served.after(step)
        epoch = {"data/epoch": float(self.trainer.cursor.epoch)}
        self.trainer.log(
            step, metrics | epoch | counted | more, work_of(sequences_of(rows), self.trainer.shape)
        )

    def export(self) -> None:
        """Write the trained model to RUN_DIR/model."""
        config, is_main = self.trainer.config, self.trainer.mesh.is_main
        export(self.trainer.policy, config.run.dir / "model", kind="model")
        where = f"the model is in {config.run.dir}/model; `mcore-rl report {config.run.dir}` shows the run"
        tell(where, is_main=is_main)

    @property
    def _counted(self) -> Metrics:
        return data_metrics("train", self.trainer.prompts)

    def _validated(self, step: int, validate: Validate) -> Metrics:
        train = self.trainer.config.train
        due = step in (0, train.steps) or (train.eval_every and step % train.eval_every == 0)
        if not self.held_out or not due:
            return {}
        with self.trainer.timers("eval"):
            return validate(self.held_out)


def start_model(config: Config, resume: str | None) -> AbstractContextManager[Trainer]:
    """The model of a run without rollouts with its starting weights; `start_session` continues `resume`."""
    load_set_functions(config)
    check_environment(config)
    return start_trainer(config, optimizer_steps=config.train.steps, resume=resume)


@contextmanager
def start_session(
    trainer: Trainer,
    frozen: Mapping[str, Model] = _NONE,
    waiting: Mapping[str, ResidentPart] = _NONE,
    held_out: Sequence[Example] | None = None,
) -> Iterator[Session]:
    """The run of a model that was started, undone on exit, with the state of the checkpoint it continues.

    Args:
        frozen: prefix in checkpoints -> a model that only scores.
        waiting: name in phases.NEEDED -> what waits in host memory.
        held_out: the rows of data.validation, where they are read already.
    """
    config = trainer.config
    rows = validation_rows(config, trainer.tokenizer) if held_out is None else held_out
    contents = Contents({"": trainer.optimizer}, frozen, {"cursor": trainer.cursor})
    restore(trainer, contents)
    residency = Residency({**waiting, **offloaded_optimizers(config, contents.optimizers)})
    with served(trainer) as servers:
        yield Session(trainer, contents, residency, servers, rows)


def validation_rows(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The first rows of data.validation, train.eval_samples of them at most; none where it is not set."""
    if config.data.validation is None:
        return []
    found = read_prompts(config, config.data.validation, tokenizer)
    return examples(islice(found.prompts, config.train.eval_samples))


def examples(prompts: Iterable[Prompt]) -> list[Example]:
    """The prompts of a set whose rows are trained as they are, by the type that they have."""
    return [prompt for prompt in prompts if isinstance(prompt, Example)]


def sequences_of(rows: Sequence[Example]) -> list[TokenSequence]:
    """What is trained of rows, in order."""
    return [sequence for row in rows for sequence in row.sequences]


def optimize(
    update: Update, residency: Residency, explain: Callable[[Update], str]
) -> tuple[dict[Key, Tensor], Metrics]:
    """One optimizer step: the objective's sums over all ranks, and the metrics of any such step; collective.

    Raises:
        NumericsError: a loss or the gradient is not finite; see run_update.
    """
    rate = update.optimizer.learning_rate
    sums, norm = run_update(update, residency, explain)
    totals = Gathered(sums).reduce(update.optimizer.model.mesh)
    return totals, {"grad_norm": norm, "lr/policy": rate}
