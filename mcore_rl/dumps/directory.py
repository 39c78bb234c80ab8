"""The directory of a run's dumps: `rollouts/step_N.npz`, and `rollouts/step_N.trained.npz` beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mcore_rl.directories import is_ours, storage_error, write_whole
from mcore_rl.dumps.rollouts import RolloutDump, read_dump
from mcore_rl.errors import DataError
from mcore_rl.terminal import listed, quoted

NAME = "rollouts"
"""of the directory in a run's"""
FILES = re.compile(r"step_(\d{1,15})(\.trained)?\.npz(\.partial)?")
_GROUPS = re.compile(r"step_(\d{1,15})\.npz")


def groups_file(directory: Path, step: int) -> Path:
    """The groups of `step`."""
    return directory / f"step_{step}.npz"


def trained_file(directory: Path, step: int) -> Path:
    """What the trainer made of them."""
    return directory / f"step_{step}.trained.npz"


def find_dumps(place: Path) -> Path:
    """The directory of dumps that `place`, a run directory or that directory itself, is or has.

    Raises:
        DataError: there are none.
    """
    for directory in (place / NAME, place):
        if dumped_steps(directory):
            return directory
    raise DataError(
        f"{place}: no dumps of rollouts in it ({NAME}/step_N.npz); a run keeps every N-th step with "
        "rollout.dump = N, and `mcore-rl rollout` keeps all that it samples"
    )


def dumped_steps(directory: Path) -> list[int]:
    """The steps whose groups are in `directory`, ascending."""
    with suppress(OSError):
        found = (_GROUPS.fullmatch(path.name) for path in directory.iterdir())
        return sorted(int(match[1]) for match in found if match and match[1] == str(int(match[1])))
    return []


def read_step(directory: Path, step: int) -> RolloutDump:
    """The dump of `step`. Raises DataError as read_dump, and where the file holds another step."""
    path = groups_file(directory, step)
    dump = read_dump(path)
    if dump.step != step:
        raise DataError(f"{path}: holds step {dump.step}; give it the name that it was written under")
    return dump


def find_sample(directory: Path, id: str, steps: Sequence[int]) -> int:
    """The step of the sample `id`. Raises DataError where none of the `steps` has it."""
    named = re.search(r"@(\d{1,15})/\d+$", id)
    first = [int(named[1])] if named and int(named[1]) in steps else []
    for step in [*first, *(step for step in reversed(steps) if step not in first)]:
        if any(s.id == id for group in read_step(directory, step).groups for s in group.samples):
            return step
    raise DataError(
        f"{directory}: no sample {quoted(id)} in the dumps of steps {listed(steps)}; `mcore-rl samples "
        "RUN_DIR STEP` lists those of a step"
    )


def write_groups(directory: Path, step: int, content: bytes, keep: int | None = None) -> None:
    """Write the dump of a step whole; then only the newest `keep` steps stay.

    What the trainer made of groups that were there before goes first.

    Raises:
        StorageError: it cannot be written; the older dumps are as they were.
    """
    remove(directory, [step], trained_only=True)
    write_whole(groups_file(directory, step), content)
    if keep is not None:
        older = [number for number in dumped_steps(directory) if number <= step]
        remove(directory, older[:-keep])


def remove(directory: Path, steps: Sequence[int], *, trained_only: bool = False) -> None:
    """Remove the dumps of `steps` from a directory that is ours. Raises StorageError."""
    if not (is_ours(directory, "rollouts") or is_ours(directory, "sampled")):
        return
    for step in steps:
        trained, groups = trained_file(directory, step), groups_file(directory, step)
        for path in [trained] if trained_only else [trained, groups]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error(path, error) from error
