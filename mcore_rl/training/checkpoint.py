"""What a training checkpoint holds, when one is due, and how a run continues from it."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from mcore_rl.checkpoint import (
    Checkpoints,
    Saved,
    committed,
    count_updates,
    find,
    fp8_pieces,
    model_pieces,
    optimizer_pieces,
    set_updates,
)
from mcore_rl.checkpoint.pieces import Piece
from mcore_rl.config import Config
from mcore_rl.config.lora import LoraConfig
from mcore_rl.data.cursor import PromptCursor, knows_content
from mcore_rl.errors import ConfigError, NothingToDo, PreemptedError, requests_to_leave
from mcore_rl.log import StepLog
from mcore_rl.model.build import Model
from mcore_rl.model.optimizer import Optimizer
from mcore_rl.model.residency import Residency
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.terminal import printable
from mcore_rl.training.faults.exits import rank
from mcore_rl.training.inputs import changed_sets, knows_inputs
from mcore_rl.training.rundir import (
    OVERWRITE,
    begin,
    check_history,
    check_no_run,
    forget_run,
    is_inside,
    restarts,
    root_of,
)
from mcore_rl.training.trainer import Attempt, Trainer

_ONE_REQUEST_SECONDS = 1.0
_LEAVING = (
    b"mcore-rl: asked to leave: the running step is finished and saved first; a second signal ends it\n"
)


class Stateful(Protocol):
    """A part of the run with a position of its own, the same on every rank."""

    def state(self) -> dict[str, Any]:
        """Its position, as JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from it."""
        ...


@dataclass(frozen=True)
class Contents:
    """What a checkpoint of a run holds besides its config and the random states."""

    optimizers: Mapping[str, Optimizer]
    """prefix of its tensors -> the optimizer of each model in training"""
    frozen: Mapping[str, Model]
    """prefix -> a model that only scores"""
    stateful: Mapping[str, Stateful]
    """name -> what else continues where it was"""


@contextmanager
def open_checkpoints(config: Config, mesh: Mesh, resume: str | None) -> Iterator[Checkpoints | None]:
    """The run's checkpoints under their lock; None where it neither saves nor resumes. Collective."""
    if not config.checkpoint.saves and resume is None:
        yield None
        return
    checkpoints = Checkpoints(
        root_of(config),
        mesh,
        keep=config.checkpoint.keep,
        background=config.checkpoint.background,
        timeout=config.train.step_timeout,
    )
    with checkpoints.open():
        yield checkpoints


def find_start(config: Config, mesh: Mesh, resume: str | None) -> Saved | None:
    """What the run continues from; None for the beginning. Collective.

    An attempt that torchrun or Slurm restarted continues from its latest checkpoint unasked, also where it
    began with a checkpoint of another run. Every agent of torchrun counts the restarts that it began itself:
    one of them is enough.

    Raises:
        ConfigError: there is no such checkpoint, or the directories hold another run, which would be buried
            (with "overwrite" it is removed).
        DamagedCheckpointError: its manifest is damaged.
    """
    root = root_of(config)
    (restarted,) = _any_rank(mesh, restarts())

    def look() -> Saved | None:
        known = committed(root)
        own = resume in ("latest", "previous") or (resume is not None and is_inside(config, Path(resume)))
        which = "latest" if restarted and known and not own else resume
        if which == OVERWRITE:
            forget_run(config, known)
            return None
        if which is not None:
            saved = find(root, which)
            check_form(saved)
            check_kind(saved, config.run.kind)
            check_adapters_of(saved, config.lora)
            check_history(config, saved, known)
            return saved
        if known:
            raise ConfigError(
                f"{root} holds the checkpoints of a run up to step {known[-1][0]}: continue it with "
                "--resume latest, give this run another run.dir, or say --overwrite, and that one goes"
            )
        if not restarted:
            check_no_run(config)
        return None

    return on_main(mesh, look)


def check_kind(saved: Saved, kind: str) -> None:
    """Raises ConfigError for the checkpoint of a run that trained by another kind."""
    before = saved.document["config"]
    earlier = "sft" if before.get("algorithm", {}).get("name") == "sft" else "rl"  # before there were kinds
    known = before.get("run", {}).get("kind", earlier)
    if known != kind:
        raise ConfigError(
            f'{saved.path} was saved by a run of the kind "{known}", and run.kind is "{kind}"; begin a run '
            "with its model as model.path"
        )


def check_adapters_of(saved: Saved, lora: LoraConfig) -> None:
    """Raises ConfigError for the checkpoint of a run that trained other matrices, or at another scale.

    Equal tensors are not enough: with another alpha, or without some of the targets, they are another policy.
    """
    told = {"rank": 0, **saved.document["config"].get("lora", {})}
    if not (told["rank"] or lora.rank):
        return
    alike = ("rank", "alpha", "rslora", "targets") if told["rank"] and lora.rank else ("rank",)
    for key, value in lora.model_dump(mode="json", include=set(alike)).items():
        before = told.get(key, value)
        if before != value and not (key == "targets" and sorted(before) == sorted(value)):
            raise ConfigError(
                f"lora.{key} = {value!r}, and {saved.path} was saved with {before!r}: it is another policy. "
                f"Set lora.{key} to that, or begin a run from what it trained: `mcore-rl convert adapter`, "
                "then lora.path; or a whole model of it, then model.path"
            )


def check_form(saved: Saved) -> None:
    """Raises ConfigError for a whole directory that no run saved to continue: a converted model, a dump."""
    forms = {"config": dict, "updates": dict, "state": dict, "layout": dict, "rng": list}
    wrong = [name for name, form in forms.items() if not isinstance(saved.document.get(name), form)]
    if wrong or not isinstance(saved.document["state"].get("cursor"), dict):
        raise ConfigError(
            f"{saved.path} holds no run to continue ({', '.join(wrong) or 'state.cursor'} is not in its "
            "manifest): it may be a converted model, or a dump of numerics. Name RUN_DIR/checkpoints/step_N"
        )


def check_what_is_left(config: Config, saved: Saved | None) -> None:
    """A run that continues after its last step is complete; another than `rl` still has its model to write.

    Raises:
        NothingToDo: on every rank, before anything is built.
    """
    steps = config.train.steps
    if saved is None or saved.step < steps or config.run.kind != "rl":
        return
    raise NothingToDo(
        f"nothing to do: step {saved.step} of train.steps = {steps} is done ({saved.path}); "
        "raise train.steps to train further"
    ).on_every_rank()


def restore(trainer: Trainer, contents: Contents) -> None:
    """Continue from the attempt's checkpoint, if any: weights, Adam, schedules, cursor, random states, log.

    Then the run directory is this run's.

    Raises:
        DamagedCheckpointError, ConfigError, DataError: before anything of the run directory is changed.
    """
    saved, checkpoints = trainer.attempt.saved, trainer.attempt.checkpoints
    if saved is not None and checkpoints is not None:
        _load(saved, checkpoints, contents)
        changed = [
            *_changed(saved.document["config"], trainer.config.model_dump(mode="json")),
            *(f"what the file of {key} holds" for key in changed_sets(saved, trainer.attempt.inputs)),
        ]
        _log_resume(saved, changed, trainer.step_log, is_main=trainer.mesh.is_main)
        _say_mended(trainer.cursor, trainer.step_log, is_main=trainer.mesh.is_main)
    on_main(trainer.mesh, lambda: begin(trainer.config, trainer.attempt.identity))


def _load(saved: Saved, checkpoints: Checkpoints, contents: Contents) -> None:
    document = saved.document
    checkpoints.load(saved, pieces(contents))
    for prefix, optimizer in contents.optimizers.items():
        set_updates(optimizer, document["updates"][prefix])
    for name, part in contents.stateful.items():
        if name in document["state"]:  # the saved run may have had no such part
            part.restore(document["state"][name])


def _say_mended(cursor: PromptCursor, step_log: StepLog, *, is_main: bool) -> None:
    if cursor.mended and is_main:
        rows = ", ".join(str(row + 1) for row in sorted(cursor.mended))
        step_log.event("rows_mended", rows=rows)
        what = f"the training prompts are those of the saved run, but for rows that were malformed: {rows}"
        print(printable(what), file=sys.stderr, flush=True)


def _log_resume(saved: Saved, changed: Sequence[str], step_log: StepLog, *, is_main: bool) -> None:
    """Cut the log after the saved step; say from where the run goes on, and what has changed since."""
    step_log.cut(saved.step)
    step_log.event("resume", step=saved.step, path=str(saved.path), changed=", ".join(changed))
    if is_main:
        since = f"; changed since: {', '.join(changed)}" if changed else ""
        if not knows_content(saved.document["state"]["cursor"]):
            since += "; saved by an earlier version: only the ids of the training prompts could be compared"
        if not knows_inputs(saved):
            since += "; saved by an earlier version: whether the models changed could not be compared"
        line = f"resumed after step {saved.step} from {saved.path}{since}"
        print(printable(line), file=sys.stderr, flush=True)


def end_step(
    trainer: Trainer, contents: Contents, residency: Residency, step: int, *, last: bool = False
) -> None:
    """Save when it is due, or when a rank was asked to leave (SIGTERM, SIGINT); collective.

    Args:
        last: no step follows, whatever train.steps says.

    Raises:
        CheckpointError: on every rank, when this or an earlier save failed.
        PreemptedError: on every rank, once `step` is saved, when one was asked to leave.
    """
    config, checkpoints = trainer.config, trainer.attempt.checkpoints
    if checkpoints is None:
        return
    with trainer.timers("save"):
        checkpoints.poll()
        saving = config.checkpoint
        late = trainer.mesh.is_main and saving.every is None and checkpoints.minutes >= saving.minutes
        leaving, late = _any_rank(trainer.mesh, trainer.attempt.leave.is_set(), late)
        last = last or step == config.train.steps
        if leaving or (saving.saves and (late or last or (saving.every and step % saving.every == 0))):
            with residency.during("save"):
                checkpoints.save(step, pieces(contents), run_document(config, contents, trainer.attempt))
        if leaving:
            checkpoints.wait()
            again = f"mcore-rl train {shlex.quote(str(config.run.dir))}/resolved.toml --resume latest"
            raise PreemptedError(
                f"asked to leave: step {step} is saved; --resume latest continues after it, as in `{again}`"
            ).on_every_rank()


def pieces(contents: Contents) -> list[Piece]:
    """Every tensor of the run's models and optimizers on this rank; collective.

    A model that only scores is read from its directory, but what its FP8 recipe remembers is of this run.
    """
    trained = {prefix: optimizer.model for prefix, optimizer in contents.optimizers.items()}
    remembered = [fp8_pieces(model, prefix) for prefix, model in (trained | dict(contents.frozen)).items()]
    return [
        *(piece for prefix, model in trained.items() for piece in model_pieces(model, prefix)),
        *(piece for prefix, one in contents.optimizers.items() for piece in optimizer_pieces(one, prefix)),
        *(piece for found in remembered for piece in found),
    ]


def run_document(config: Config, contents: Contents, attempt: Attempt) -> dict[str, Any]:
    """All else, as JSON; the random states are added by Checkpoints."""
    return {
        "run_id": attempt.identity.run,
        "inputs": attempt.inputs,
        "config": config.model_dump(mode="json"),
        "updates": {prefix: count_updates(optimizer) for prefix, optimizer in contents.optimizers.items()},
        "state": {name: part.state() for name, part in contents.stateful.items()},
    }


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for section, keys in now.items():
        saved = before.get(section, {})
        yield from (f"{section}.{key}" for key, value in keys.items() if saved.get(key) != value)


def _any_rank(mesh: Mesh, *flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set on any rank; collective."""
    of_ranks: list[Any] = [None] * mesh.world.size()
    dist.all_gather_object(of_ranks, flags, group=mesh.world)
    return tuple(any(one) for one in zip(*of_ranks, strict=True))


@contextmanager
def leave_when_asked(asked: threading.Event, *, active: bool) -> Iterator[None]:
    """The first request to leave sets `asked`, where `active`; another has the effect that any had before.

    Not one within a second: a launcher's and that of a process group are one request.
    """
    before = {number: signal.getsignal(number) for number in requests_to_leave()}
    first = [0.0]

    def ask(number: int, frame: Any) -> None:
        if not asked.is_set():
            first[0] = time.monotonic()
            asked.set()
            if rank() == 0:
                os.write(2, _LEAVING)  # print is not for handlers of signals
        elif time.monotonic() - first[0] > _ONE_REQUEST_SECONDS:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    if active:
        for number in before:
            signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
