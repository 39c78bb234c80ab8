"""What a training checkpoint holds, when one is due, and how a run continues from it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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
from mcore_rl.data.cursor import knows_content
from mcore_rl.errors import ConfigError, NothingToDo, PreemptedError
from mcore_rl.metrics import StepLog
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.terminal import printable
from mcore_rl.train.rundir import begin, check_history, is_inside, root_of

if TYPE_CHECKING:
    from mcore_rl.train.setup import Trainer


_ONE_REQUEST_SECONDS = 1.0


class Stateful(Protocol):
    """A part of the run with a position of its own, the same on every rank."""

    def state(self) -> dict[str, Any]:
        """As JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from it."""
        ...


@contextmanager
def open_checkpoints(config: Config, mesh: Mesh, resume: str | None) -> Iterator[Checkpoints | None]:
    """The run's checkpoints under their lock; None where it neither saves nor resumes. Collective."""
    if not config.checkpoint.every and resume is None:
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
        ConfigError: there is no such checkpoint, or the directories hold another run, which would be buried.
        DamagedCheckpointError: its manifest is damaged.
    """
    root = root_of(config)
    counts = [os.environ.get(f"{starter}_RESTART_COUNT", "0") for starter in ("TORCHELASTIC", "SLURM")]
    restarted = _any_rank(mesh, any(int(count) for count in counts))

    def look() -> Saved | None:
        known = committed(root)
        own = resume in ("latest", "previous") or (resume is not None and is_inside(config, Path(resume)))
        which = "latest" if restarted and known and not own else resume
        if which is not None:
            saved = find(root, which)
            check_history(config, saved, known)
            return saved
        if known:
            raise ConfigError(
                f"{root} holds the checkpoints of a run up to step {known[-1][0]}: continue it with "
                "--resume latest, or give this run another run.dir"
            )
        return None

    return on_main(mesh, look)


def check_what_is_left(config: Config, saved: Saved | None) -> None:
    """A run that continues after its last step is complete; a supervised one still has its model to write.

    Raises:
        NothingToDo: on every rank, before anything is built.
    """
    steps = config.train.steps
    if saved is None or saved.step < steps or config.supervised_only:
        return
    raise NothingToDo(
        f"nothing to do: step {saved.step} of train.steps = {steps} is done ({saved.path}); "
        "raise train.steps to train further"
    ).on_every_rank()


def restore(run: Trainer) -> None:
    """Continue from `run.saved`, where there is one: weights, Adam, schedules, cursor, random states, log.

    Then the run directory is this run's.

    Raises:
        DamagedCheckpointError, ConfigError, DataError: before anything of the run directory is changed.
    """
    if run.saved is not None and run.checkpoints is not None:
        _restore(run, run.saved, run.checkpoints)
    on_main(run.mesh, lambda: begin(run.config, run.identity))


def _restore(run: Trainer, saved: Saved, checkpoints: Checkpoints) -> None:
    document = saved.document
    in_flight = document["state"].get("ahead", {}).get("groups", [])
    if in_flight and "ahead" not in run.stateful:
        raise ConfigError(
            f"{saved.path} holds {len(in_flight)} groups of samples in flight, and their prompts would never "
            "be trained: resume with rollout.max_staleness of 1 or more"
        )
    checkpoints.load(saved, pieces(run))
    for prefix, optimizer in run.optimizers.items():
        set_updates(optimizer, document["updates"][prefix])
    for name, part in run.stateful.items():
        if name in document["state"]:  # the saved run may have generated nothing ahead
            part.restore(document["state"][name])
    run.step_log = StepLog(run.config.run.dir, rank=run.mesh.rank, resume_step=run.step)
    changed = ", ".join(_changed(document["config"], run.config.model_dump(mode="json")))
    run.step_log.event("resume", step=run.step, path=str(saved.path), changed=changed)
    if run.mesh.is_main:
        since = f"; changed since: {changed}" if changed else ""
        if not knows_content(document["state"]["cursor"]):
            since += "; saved by an earlier version: only the ids of the training prompts could be compared"
        line = f"resumed after step {run.step} from {saved.path}{since}"
        print(printable(line), file=sys.stderr, flush=True)


def end_step(run: Trainer, step: int) -> None:
    """Save when it is due, or when a rank was asked to leave (SIGTERM, SIGINT); collective.

    Raises:
        CheckpointError: on every rank, when this or an earlier save failed.
        PreemptedError: on every rank, once `step` is saved, when one was asked to leave.
    """
    if run.checkpoints is None:
        return
    with run.timers("save"):
        run.checkpoints.poll()
        leaving = _any_rank(run.mesh, run.leave.is_set())
        every = run.config.checkpoint.every
        if leaving or (every and (step % every == 0 or step == run.config.train.steps)):
            with run.residency.during("save"):
                run.checkpoints.save(step, pieces(run), run_document(run))
        if leaving:
            run.checkpoints.wait()
            left = PreemptedError(f"asked to leave: step {step} is saved; --resume latest continues after it")
            raise left.on_every_rank()


def pieces(run: Trainer) -> list[Piece]:
    """Every tensor of the run's models and optimizers on this rank; collective.

    A model that only scores is read from its directory, but what its FP8 recipe remembers is of this run.
    """
    trained = {prefix: optimizer.model for prefix, optimizer in run.optimizers.items()}
    remembered = [fp8_pieces(model, prefix) for prefix, model in (trained | run.frozen).items()]
    return [
        *(piece for prefix, model in trained.items() for piece in model_pieces(model, prefix)),
        *(piece for prefix, one in run.optimizers.items() for piece in optimizer_pieces(one, prefix)),
        *(piece for found in remembered for piece in found),
    ]


def run_document(run: Trainer) -> dict[str, Any]:
    """All else, as JSON; the random states are added by Checkpoints."""
    return {
        "run_id": run.identity.run,
        "config": run.config.model_dump(mode="json"),
        "updates": {prefix: count_updates(optimizer) for prefix, optimizer in run.optimizers.items()},
        "state": {name: part.state() for name, part in run.stateful.items()},
    }


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for section, keys in now.items():
        saved = before.get(section, {})
        yield from (f"{section}.{key}" for key, value in keys.items() if saved.get(key) != value)


def _any_rank(mesh: Mesh, flag: bool) -> bool:
    flags = [False] * mesh.layout.world_size
    dist.all_gather_object(flags, flag, group=mesh.world)
    return any(flags)


@contextmanager
def leave_when_asked(active: bool) -> Iterator[threading.Event]:
    """Set by the first SIGTERM or SIGINT where `active`; another one has the effect that any had before.

    Not one within a second: a launcher's and that of a process group are one request.
    """
    asked = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    first = [0.0]

    def ask(number: int, frame: Any) -> None:
        if not asked.is_set():
            first[0] = time.monotonic()
            asked.set()
        elif time.monotonic() - first[0] > _ONE_REQUEST_SECONDS:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    if active:
        for number in before:
            signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
