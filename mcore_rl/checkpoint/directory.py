"""A directory of checkpoints: how one comes into being whole, is found, checked and removed.

    step_12.partial/    being written, or left by a crash
    step_12/            whole: data, manifest.json (size, SHA-256 of every file), COMMITTED (of the manifest)
    LOCK                held by the job that writes here

COMMITTED is written last and the directory renamed after it, each step durable before the next. So a
directory `step_N` with COMMITTED is whole, and after a crash at any point the one before it still is.
Each carries the mark of mcore_rl from its first moment: a `step_N` of another program stops the run before
anything is cleared away.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mcore_rl.checkpoint import manifest
from mcore_rl.checkpoint.image import Written, write_file
from mcore_rl.checkpoint.manifest import COMMITTED, Saved
from mcore_rl.directories import LOCK, is_free, is_ours, locked, make, mark, remove
from mcore_rl.errors import CheckpointError, ConfigError

_REMEDY = "set checkpoint.dir to another place"
_STEP = re.compile(r"step_(\d+)")
_PARTIAL = ".partial"
_SUPERSEDED = ".superseded"
_ANY_STEP = re.compile(rf"step_\d+({re.escape(_PARTIAL)}|{re.escape(_SUPERSEDED)})?")


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
        """Hold the directory, and clear away what a crash of ours left in it.

        The lock ends with the process, however that ends.

        Raises:
            ConfigError: it holds a `step_N` that mcore_rl did not write; nothing was touched.
            CheckpointError: another job holds it, or the directory cannot be written.
        """
        if not (self.root / LOCK).exists():  # else it may be another job's, which is writing
            _check_ours(self.root)
        with locked(self.root, _REMEDY, CheckpointError):
            with _reported(self.root):
                _check_ours(self.root)
                self._recover()
            yield

    def _recover(self) -> None:
        """Finish or remove what was begun: only a whole checkpoint is ever kept."""
        for path in _steps(self.root):
            if not is_ours(path, "checkpoint"):
                mark(path, "checkpoint")  # of an earlier version, which wrote no mark: its manifest vouches
        for path in sorted(self.root.glob(f"step_*{_PARTIAL}")):
            try:
                whole = manifest.read(path)
                whole.check()
            except (CheckpointError, ConfigError):
                remove(path, _REMEDY, kind="checkpoint")
            else:
                self._publish(path, self.root / f"step_{whole.step}")
        for path in self.root.glob(f"step_*{_SUPERSEDED}"):
            final = path.with_name(path.name.removesuffix(_SUPERSEDED))
            if final.exists():
                remove(path, _REMEDY, kind="checkpoint")
            else:
                path.rename(final)
        for path in self.root.glob("step_*"):
            if _STEP.fullmatch(path.name) and not (path / COMMITTED).exists():  # its removal was interrupted
                remove(path, _REMEDY, kind="checkpoint")

    def begin(self, step: int, size: int) -> Path:
        """An empty directory to write `step` into.

        Raises:
            CheckpointError: it cannot be made, or has no room for `size` bytes.
        """
        partial = self.root / f"step_{step}{_PARTIAL}"
        with _reported(partial):
            make(partial, _REMEDY, kind="checkpoint")
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
            remove(superseded, _REMEDY, kind="checkpoint")
            final.rename(superseded)
        partial.rename(final)
        manifest.sync_directory(self.root)
        remove(superseded, _REMEDY, kind="checkpoint")

    def _prune(self, newest: Path) -> None:
        """Keep `newest` and those before it; later steps belong to a history that a resume has left."""
        known = [path for _, path in committed(self.root)]
        at = known.index(newest)
        for path in [*known[: max(0, at + 1 - self._keep)], *known[at + 1 :]]:
            discard(path)


def discard(path: Path) -> None:
    """Remove a committed checkpoint. Raises CheckpointError, and ConfigError where it is not ours."""
    with _reported(path):
        (path / COMMITTED).unlink()  # from here on it is none, wherever the removal is interrupted
        remove(path, _REMEDY, kind="checkpoint")


def _steps(root: Path) -> list[Path]:
    """Everything under `root` that is named like a checkpoint, whole or not."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _ANY_STEP.fullmatch(path.name))


def _check_ours(root: Path) -> None:
    """Raises ConfigError for what is named like a checkpoint and neither marked nor whole."""
    foreign = [path for path in _steps(root) if not is_free(path, "checkpoint") and not _is_whole(path)]
    if foreign:
        names = ", ".join(path.name for path in foreign[:5]) + (", ..." if len(foreign) > 5 else "")
        raise ConfigError(
            f"{root} holds {names}, which mcore_rl did not write, or an earlier version left unfinished: no "
            f"mark, and no intact manifest. Nothing was touched. Move them away, or {_REMEDY}"
        )


def _is_whole(path: Path) -> bool:
    """Whether its manifest is that of a committed checkpoint: all that an earlier version leaves to see."""
    try:
        manifest.read(path)
    except (CheckpointError, ConfigError):
        return False
    return not path.is_symlink()


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
