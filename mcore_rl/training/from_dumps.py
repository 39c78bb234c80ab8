"""`mcore-rl train CONFIG.toml --rollouts DIR`: training on rollouts that were kept, without any server.

Each dump is trained under the number of its step, from which shuffling follows: a dumped step trains to the
same bits as it did when it was sampled, from the same weights at the same layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from mcore_rl.algo.algorithms import configure
from mcore_rl.config import Config
from mcore_rl.dumps.directory import dumped_steps, find_dumps, groups_file, read_step
from mcore_rl.dumps.rollouts import RolloutDump
from mcore_rl.errors import ConfigError, NothingToDo
from mcore_rl.model.residency import Residency
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rollout.columns import Columns, pack_groups, unpack_groups
from mcore_rl.training.assemble import (
    build_models,
    learner_parts,
    open_kept,
    policy_updates,
    waiting_parts,
)
from mcore_rl.training.assemble_rollouts import replayed_experts
from mcore_rl.training.batch import build_batch
from mcore_rl.training.check_dump import Trainable, check_dump
from mcore_rl.training.checkpoint import end_step, restore
from mcore_rl.training.dump_directories import check_source
from mcore_rl.training.faults.exits import recorded, say
from mcore_rl.training.loop import learn, save_samples
from mcore_rl.training.mismatch import DUMPS
from mcore_rl.training.run import Learner
from mcore_rl.training.setup import start_trainer
from mcore_rl.types import Group, Prompt


def train_from_dumps(config: Config, source: Path, resume: str | None = None) -> None:
    """Train on the dumps in `source`, in the order of their steps, up to `train.steps`.

    Nothing is published and nothing evaluated: both need servers.

    Raises:
        NothingToDo: `resume` names the checkpoint of the last of these steps.
        DataError: a dump is damaged, or of another model.
        McoreRLError: the same on every rank, with the remedy in its message.
    """
    with start(config, source, resume) as (learner, steps):
        trainer, directory = learner.trainer, find_dumps(source)
        fit = Trainable.of(config, trainer.tokenizer, trainer.shape, replayed_experts(config))
        examine(trainer.mesh, directory, steps, fit, trainer.attempt.reached)
        for step in steps:
            with trainer.timers("rollout"):
                groups = load_groups(trainer.mesh, directory, step, fit)
            save_samples(config.run.dir, trainer.mesh, trainer.decode, step, groups)
            learner.dumps.write(step, groups)
            batch = build_batch(groups)
            learned = learn(learner, batch, step)
            learner.log(step, {**learned.metrics, "void": float(batch.void)}, learned.work)
            end_step(trainer, learner.contents, learner.residency, step, last=step == steps[-1])


@contextmanager
def start(config: Config, source: Path, resume: str | None) -> Iterator[tuple[Learner, Sequence[int]]]:
    """What trains, and the steps that are to be trained; undone on exit."""
    check_source(config, source)
    algorithm = configure(config.algorithm.name, config.algorithm.params, config.algorithm.loss)
    if algorithm.baseline == "greedy":
        raise ConfigError(
            f"algorithm.name: {config.algorithm.name} compares with greedy answers, which no dump has; train "
            "with servers, or by another algorithm"
        )
    replayed_experts(config)
    with (
        start_trainer(config, optimizer_steps=policy_updates(config), resume=resume) as trainer,
        recorded(config.run.dir),
    ):
        steps = on_main(trainer.mesh, lambda: steps_of(config, source, trainer.attempt.step))
        models = build_models(trainer, algorithm, rewards=False)
        restore(trainer, models.contents)
        residency = Residency(waiting_parts(config, models))
        on_main(trainer.mesh, lambda: open_kept(config, trainer.attempt))
        if trainer.mesh.is_main:
            say(f"trains on the rollouts of {len(steps)} steps in {source}: no server, no evaluation")
        trainer.attempt.reached("the models were built")
        learner = Learner(**learner_parts(trainer, models, residency))
        yield replace(learner, mismatch=replace(learner.mismatch, sampler=DUMPS)), steps


def steps_of(config: Config, source: Path, after: int) -> list[int]:
    """The dumped steps beyond `after`, up to train.steps.

    Raises:
        NothingToDo: those that there are have been trained.
        ConfigError: there never were any.
    """
    dumped, last = dumped_steps(find_dumps(source)), config.train.steps
    found = [step for step in dumped if after < step <= last]
    if found:
        return found
    if any(step <= last for step in dumped):
        raise NothingToDo(f"nothing to do: step {after} is done, and {source} has no later one up to {last}")
    raise ConfigError(
        f"--rollouts: {source} has steps {dumped[0]} to {dumped[-1]}, beyond train.steps = {last}; raise it"
    )


def examine(
    mesh: Mesh, directory: Path, steps: Sequence[int], fit: Trainable, reached: Callable[[str], None]
) -> None:
    """Meet what is wrong with any of the dumps before the first of them is trained; collective.

    Args:
        reached: says that the run goes on, after each of them.

    Raises:
        DataError, ConfigError: as load_groups.
    """
    for step in reversed(steps):  # of those that the same weights sampled, the last is the stalest

        def work(step: int = step) -> None:
            _read(directory, step, fit)

        on_main(mesh, work)
        reached(f"the dump of step {step} was examined")


def _read(directory: Path, step: int, fit: Trainable) -> RolloutDump:
    dump = read_step(directory, step)
    check_dump(dump, fit, groups_file(directory, step))
    return dump


def load_groups(mesh: Mesh, directory: Path, step: int, fit: Trainable) -> list[Group]:
    """The groups of a dump on every rank, read by the main rank; collective.

    Raises:
        DataError, ConfigError: on every rank: it is damaged, or this run cannot train on it.
    """

    def work() -> tuple[Columns, dict[str, Prompt]]:
        dump = _read(directory, step, fit)
        groups = dump.groups if fit.experts is not None else [_unrouted(group) for group in dump.groups]
        return pack_groups(groups), {s.prompt.id: s.prompt for group in groups for s in group.samples}

    columns, prompts = on_main(mesh, work)
    return unpack_groups(columns, prompts)


def _unrouted(group: Group) -> Group:
    """Without experts: this run's routers choose for themselves."""
    return replace(
        group,
        samples=tuple(
            replace(s, segments=tuple(replace(x, experts=None) for x in s.segments)) for s in group.samples
        ),
    )
