"""Saves that die at every point: `python -m tests.checkpoint.killed DIRECTORY`, answers as one line of JSON.

Torch is imported once; every attempt is a forked process with its own process group. Python's audit events
are the points: the process kills itself with SIGKILL when its n-th change of a file or directory under the
checkpoints is about to happen; in further attempts the kernel ends it in the middle of a write.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mcore_rl.checkpoint import Checkpoints, find
from mcore_rl.checkpoint.directory import CheckpointDirectory
from mcore_rl.errors import CheckpointError
from mcore_rl.model import platform
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh, build_mesh
from tests.checkpoint.support import step_in, tensors

CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove"}


def main(root: Path) -> None:
    platform.install()
    print(json.dumps({"points": at_every_point(root), "cut": in_writes(root), "peer": a_dead_peer(root)}))


def at_every_point(root: Path) -> list[dict[str, Any]]:
    """What died where, and which step is found after it, before and after the next job has cleared up."""
    points = []
    for number in range(100):
        place = root / f"point_{number}"
        status = forked(save_and_die, place, number)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            break
        points.append({"signal": os.WTERMSIG(status), "at": witness(place), **after(place)})
    return points


def in_writes(root: Path) -> list[dict[str, Any]]:
    """The kernel ends a process whose file outgrows its limit: SIGXFSZ, the file cut there."""
    cuts = []
    for size in (1, 700, 9_000):
        place = root / f"cut_{size}"
        status = forked(save_and_be_cut, place, size)
        cuts.append({"signal": os.WTERMSIG(status), **after(place)})
    return cuts


def a_dead_peer(root: Path) -> dict[str, Any]:
    """Rank 1 of 2 is killed, stopped or fails while it writes; what every rank says, and after how long."""
    answers = {}
    for what in ("SIGKILL", "SIGSTOP", "fails"):
        for background in (False, True):
            place = root / f"peer_{what}_{background}"
            place.mkdir()
            ranks = [fork(rank_of_two, place, rank, what, background) for rank in range(2)]
            os.waitpid(ranks[0], 0)
            if what != "fails":
                os.kill(ranks[1], signal.SIGKILL)
            os.waitpid(ranks[1], 0)
            said = [json.loads(file.read_text()) for file in sorted(place.glob("said_*"))]
            fired = (place / "witness").exists()
            answers[f"{what} {background}"] = {"said": said, "fired": fired, **after(place)}
    return answers


def fork(work: Callable[..., None], *arguments: Any) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def forked(work: Callable[..., None], *arguments: Any) -> int:
    return os.waitpid(fork(work, *arguments), 0)[1]


def join(place: Path, rank: int = 0, world: int = 1, timeout: float = 30.0) -> Mesh:
    place.mkdir(exist_ok=True)
    store = dist.FileStore(str(place / "store"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
    return build_mesh(Layout(data=world), timeout=timeout)


def save_and_die(place: Path, number: int) -> None:
    """Steps 1 and 2 are saved; step 3, which replaces step 1, is not lived through."""
    seen = 0

    def die(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if not changes(place / "checkpoints", event, arguments):
            return
        if seen == number:
            descriptor = os.open(place / "witness", os.O_CREAT | os.O_WRONLY)
            os.write(descriptor, f"{event} {Path(os.fsdecode(arguments[0])).name}".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    checkpoints = Checkpoints(
        place / "checkpoints", join(place), keep=2, background=number % 2 == 1, timeout=10.0
    )
    with checkpoints.open():
        for step in (1, 2):
            checkpoints.save(step, tensors(step), {})
        checkpoints.wait()
        sys.addaudithook(die)
        checkpoints.save(3, tensors(3), {})


def changes(root: Path, event: str, arguments: tuple[Any, ...]) -> bool:
    """This audit event is about to change something under `root`."""
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if not (event in CHANGES or writes) or not isinstance(arguments[0], str | bytes | os.PathLike):
        return False
    path = os.fsdecode(arguments[0])
    if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # relative to an open directory
        path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
    return os.path.abspath(path).startswith(str(root))


def save_and_be_cut(place: Path, size: int) -> None:
    checkpoints = Checkpoints(place / "checkpoints", join(place), keep=2, background=False, timeout=10.0)
    with checkpoints.open():
        for step in (1, 2):
            checkpoints.save(step, tensors(step), {})
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        checkpoints.save(3, tensors(3), {})


def rank_of_two(place: Path, rank: int, what: str, background: bool) -> None:
    mesh = join(place, rank, 2, timeout=5.0)
    checkpoints = Checkpoints(place / "checkpoints", mesh, keep=2, background=background, timeout=3.0)

    def harm(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or "__1_0" not in str(arguments[0]):
            return
        (place / "witness").touch()
        if what == "fails":
            raise OSError(errno.EIO, os.strerror(errno.EIO), arguments[0])
        os.kill(os.getpid(), signal.Signals[what])

    own = tensors(1) if rank == 0 else []
    with checkpoints.open():
        checkpoints.save(1, own, {})
        checkpoints.wait()
        if rank == 1:
            sys.addaudithook(harm)
        began = time.monotonic()
        try:
            checkpoints.save(2, tensors(2) if rank == 0 else [], {})
            checkpoints.wait()
        except CheckpointError as error:
            said = {"error": str(error), "seconds": time.monotonic() - began}
            (place / f"said_{rank}").write_text(json.dumps(said))
            os._exit(0)


def witness(place: Path) -> str:
    return (place / "witness").read_text()


def after(place: Path) -> dict[str, Any]:
    """The step that a resume finds, before and after the next job has cleared up, and what it leaves."""
    root = place / "checkpoints"
    before = step_in(find(root, "latest"))
    with CheckpointDirectory(root, 2).locked():
        return {
            "found": before,
            "kept": step_in(find(root, "latest")),
            "left": sorted(path.name for path in root.iterdir()),
        }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
