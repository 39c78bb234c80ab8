"""A directory of checkpoints: how one comes into being whole, is found, checked and removed.

    step_12.partial/    being written, or left by a crash
    step_12/            whole: data, manifest.json (size, SHA-256 of every file), COMMITTED (of the manifest)
    LOCK                held by the job that writes here

COMMITTED is written last and the directory renamed after it, each step durable before the next. So a
directory `step_N` with COMMITTED is whole, and after a crash at any point the one before it still is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mcore_rl.checkpoint import manifest
from mcore_rl.checkpoint.image import Written, write_file
from mcore_rl.checkpoint.manifest import COMMITTED, Saved
from mcore_rl.errors import CheckpointError, ConfigError

LOCK = "LOCK"

_STEP = re.compile(r"step_(\d+)")
_PARTIAL = ".partial"
_SUPERSEDED = ".superseded"


def committed(root: Path) -> list[tuple[int, Path]]:
    """(step, path) of the committed checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    steps = ((_STEP.fullmatch(path.name), path) for path in root.iterdir())
    return sorted((int(match[1]), path) for match, path in steps if match and (path / COMMITTED).is_file())


def find(root: Path, which: str) -> Saved:
    """The checkpoint that `--resume` names: `latest`, `previous`, or a path.

    Raises:
        ConfigError: there is none.
        DamagedCheckpointError: its manifest is not what was committed.
    """
    if which not in ("latest", "previous"):
        return manifest.read(Path(which))
    known, back = committed(root), {"latest": 1, "previous": 2}[which]
    if len(known) < back:
        raise ConfigError(
            f"--resume {which}: {root} holds {len(known)} committed checkpoints; give the path of one, or "
            "start without --resume"
        )
    return manifest.read(known[-back][1])


class CheckpointDirectory:
    """The checkpoints of one run, for the one process that writes them: the main rank's."""

    def __init__(self, root: Path, keep: int) -> None:
        """`keep`: committed checkpoints that stay, the newest."""
        self.root = root
        self._keep = keep

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory, and clear away what a crash left in it.

        The lock ends with the process, however that ends.

        Raises:
            CheckpointError: another job holds it, or the directory cannot be written.
        """
        with _reported(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            file = (self.root / LOCK).open("a+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                raise CheckpointError(
                    f"{self.root} is in use by {file.read().strip() or 'another job'}: two jobs would "
                    "destroy each other's checkpoints. Wait for it, or give this run a directory of its own"
                ) from None
            with _reported(self.root):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                self._recover()
            yield

    def _recover(self) -> None:
        """Finish or remove what was begun: only a whole checkpoint is ever kept."""
        for path in sorted(self.root.glob(f"step_*{_PARTIAL}")):
            try:
                whole = manifest.read(path)
                whole.check()
            except (CheckpointError, ConfigError):
                shutil.rmtree(path)
            else:
                self._publish(path, self.root / f"step_{whole.step}")
        for path in self.root.glob(f"step_*{_SUPERSEDED}"):
            final = path.with_name(path.name.removesuffix(_SUPERSEDED))
            shutil.rmtree(path) if final.exists() else path.rename(final)
        for path in self.root.glob("step_*"):
            if _STEP.fullmatch(path.name) and not (path / COMMITTED).exists():  # its removal was interrupted
                shutil.rmtree(path)

    def begin(self, step: int, size: int) -> Path:
        """An empty directory to write `step` into.

        Raises:
            CheckpointError: it cannot be made, or has no room for `size` bytes.
        """
        partial = self.root / f"step_{step}{_PARTIAL}"
        with _reported(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            free = shutil.disk_usage(partial).free
        if free < size:
            raise CheckpointError(
                f"{partial}: needs {size} bytes, {free} are free; make room, lower checkpoint.keep, or set "
                "checkpoint.dir to a larger disk"
            )
        return partial

    def commit(
        self,
        partial: Path,
        step: int,
        data: Sequence[Written],
        side: Mapping[str, bytes],
        document: Mapping[str, Any],
    ) -> Path:
        """Make `partial`, in which the `data` files lie, the checkpoint of `step`; then remove old ones.

        Raises:
            CheckpointError: a file cannot be written; no checkpoint was touched.
        """
        with _reported(partial):
            files = [*data, *(write_file(partial / name, content) for name, content in side.items())]
            manifest.commit(partial, files, step=step, run=document)
            final = self.root / f"step_{step}"
            self._publish(partial, final)
            self._prune(final)
        return final

    def _publish(self, partial: Path, final: Path) -> None:
        superseded = final.with_name(final.name + _SUPERSEDED)
        if final.exists():  # a run that resumed before this step reaches it again
            shutil.rmtree(superseded, ignore_errors=True)
            final.rename(superseded)
        partial.rename(final)
        manifest.sync_directory(self.root)
        shutil.rmtree(superseded, ignore_errors=True)

    def _prune(self, newest: Path) -> None:
        """Keep `newest` and those before it; later steps belong to a history that a resume has left."""
        known = [path for _, path in committed(self.root)]
        at = known.index(newest)
        for path in [*known[: max(0, at + 1 - self._keep)], *known[at + 1 :]]:
            (path / COMMITTED).unlink()  # from here on it is none, wherever the removal is interrupted
            shutil.rmtree(path)


@contextlib.contextmanager
def _reported(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(place, error) from error


def write_error(place: Path, error: OSError) -> CheckpointError:
    """Why nothing can be written at `place`, for people."""
    return CheckpointError(
        f"{error.filename or place}: {error.strerror or error}; earlier checkpoints are untouched. Make room "
        "or make it writable, or set checkpoint.dir to another place"
    )
