"""Saving and loading, on every rank: stage, write, commit; in the foreground or beside the training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from mcore_rl.checkpoint.directory import CheckpointDirectory, write_error
from mcore_rl.checkpoint.image import FileImage, PieceEntry, Written
from mcore_rl.checkpoint.manifest import Saved
from mcore_rl.checkpoint.pieces import Piece
from mcore_rl.checkpoint.rng import rng_state, set_rng_state
from mcore_rl.checkpoint.torch_dist import data_file, load_pieces, side_files
from mcore_rl.errors import CheckpointError, McoreRLError
from mcore_rl.parallel.control import on_main, raise_everywhere
from mcore_rl.parallel.mesh import Mesh

T = TypeVar("T")


class Checkpoints:
    """Writes the checkpoints of one run; every rank holds one and makes the same calls.

    A save has two halves. Staging copies the state into a host buffer, which is all that training waits for
    with `background`. The rest (write, gather the checksums, commit) is the same code in a thread per rank,
    over a process group of its own. Every wait, in the thread too, ends after `timeout` seconds.
    """

    def __init__(self, root: Path, mesh: Mesh, *, keep: int, background: bool, timeout: float) -> None:
        """Collective: makes the process group.

        Args:
            keep: newest checkpoints that stay.
        """
        self._mesh = mesh
        own = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self._writers = replace(mesh, world=own)
        self._directory = CheckpointDirectory(root, keep)
        self._background = background
        self._timeout = timeout
        self._image = FileImage()
        self._writer: _WriterThread | None = None
        self._begun = time.monotonic()

    @property
    def minutes(self) -> float:
        """Since the last save began, on this rank's clock; before the first, since the run began."""
        return (time.monotonic() - self._begun) / 60

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the directory's lock; on the way out, see the save in flight through.

        Raises:
            CheckpointError: on every rank: another job holds it, it is not writable, or the last save failed.
        """
        with ExitStack() as stack:
            on_main(self._mesh, lambda: stack.enter_context(self._directory.locked()))
            stack.callback(self._join)
            yield
            self.wait()

    def save(self, step: int, pieces: Sequence[Piece], document: Mapping[str, Any]) -> None:
        """Save `pieces`, and `document` (JSON, the main rank's), as `step`; collective.

        In the background, returns when the state is staged; a save in flight is waited for first.

        Raises:
            CheckpointError: on every rank: this save failed, or the one before it. What is committed stays.
        """
        self.wait()
        self._begun = time.monotonic()
        self._image.fill([piece for piece in pieces if piece.written])
        sizes = _gather(self._mesh, self._image.size)
        directory = on_main(self._mesh, lambda: self._directory.begin(step, sum(sizes)))
        kept = {
            **document,
            "layout": asdict(self._mesh.layout),
            "rng": _gather(self._mesh, rng_state()),
        }
        finish = partial(self._finish, step, directory, kept)
        if self._background:
            self._writer = _WriterThread(finish)
            self._writer.start()
        else:
            finish()

    def poll(self) -> None:
        """Collective and short: the error of a save in flight once it has failed. Raises as `save`."""
        if self._writer is not None and all(_everywhere(self._mesh, not self._writer.is_alive())):
            self.wait()

    def wait(self) -> None:
        """Collective: return when the save in flight is committed. Raises as `save`, also at the deadline."""
        if self._writer is not None:
            self._join()
            writer, self._writer = self._writer, None
            error = self._stuck() if writer.is_alive() else writer.error
            try:
                raise_everywhere(self._mesh, error)
            except RuntimeError as lost:  # of gloo: who is gone cannot be told; what it left undone is said
                if error is None or isinstance(lost, McoreRLError):
                    raise
                raise error from lost

    def load(self, saved: Saved, pieces: Sequence[Piece]) -> None:
        """Check every file of `saved` and fill `pieces`; random states too where the layout is the saved one.

        Raises:
            DamagedCheckpointError, ConfigError: on every rank; what has been filled is then of no use.
        """
        mesh, names = self._mesh, sorted(saved.files)
        raise_everywhere(mesh, _caught(lambda: saved.check(names[mesh.rank :: mesh.layout.world_size])))
        raise_everywhere(mesh, _caught(lambda: load_pieces(saved.path, pieces, names)))
        if saved.document["layout"] == asdict(mesh.layout):
            set_rng_state(saved.document["rng"][mesh.rank])

    def _finish(self, step: int, directory: Path, document: Mapping[str, Any]) -> None:
        """What follows staging: write, gather, commit. Runs on every rank, on the writers' group only."""
        mesh, written = self._writers, list[Written]()
        try:
            error = _caught(lambda: written.append(self._image.write(directory / data_file(mesh.rank))))
            raise_everywhere(mesh, error)
            ranks = _gather(mesh, (self._image.entries, written[0]))
            on_main(mesh, lambda: self._commit(step, directory, ranks, document))
        except McoreRLError:
            raise
        except RuntimeError as error:  # of gloo: a rank is gone, or silent past the deadline
            raise CheckpointError(
                f"{directory}: a rank did not finish writing ({error}); earlier checkpoints are untouched: "
                "resume from the latest"
            ) from error

    def _commit(
        self,
        step: int,
        directory: Path,
        ranks: Sequence[tuple[tuple[PieceEntry, ...], Written]],
        document: Mapping[str, Any],
    ) -> None:
        side = side_files([entries for entries, _ in ranks])
        self._directory.commit(directory, step, [written for _, written in ranks], side, document)

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join(self._timeout)

    def _stuck(self) -> CheckpointError:
        return CheckpointError(
            f"{self._directory.root}: a save is still not written after {self._timeout:g} s "
            "(train.step_timeout); look at the disk or network behind it. Earlier checkpoints are untouched"
        )


class _WriterThread(threading.Thread):
    """Runs the second half of a save."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(name="checkpoint writer", daemon=True)  # a stuck disk must not keep the process
        self._work = work
        self.error: Exception | None = None

    def run(self) -> None:
        self.error = _caught(self._work)


def _caught(work: Callable[[], Any]) -> Exception | None:
    """The exception of `work`, to be raised on every rank."""
    try:
        work()
    except OSError as error:
        return write_error(Path(error.filename or "checkpoint"), error)
    except Exception as error:
        return error
    return None


def _gather(mesh: Mesh, value: T) -> list[T]:
    """All ranks' values on the main rank, in rank order; nothing elsewhere."""
    values: list[Any] | None = [None] * mesh.layout.world_size if mesh.is_main else None
    dist.gather_object(value, values, group=mesh.world, group_dst=0)
    return values or []


def _everywhere(mesh: Mesh, value: T) -> list[T]:
    values: list[Any] = [None] * mesh.layout.world_size
    dist.all_gather_object(values, value, group=mesh.world)
    return values
