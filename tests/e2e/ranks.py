"""Ranks as torchrun starts them, forked from a process that has imported the library once.

Nearly all that a short run costs is the imports of its launcher and of each rank. So a test that is not about
the launcher starts the ranks alone: `python -m tests.e2e.ranks` imports what a rank imports, and then forks
one process for each rank, which calls the command with the arguments and the environment of torchrun. Where
the launcher takes part in what is proven, it is forked as well, and forks its ranks (tests/e2e/forked.py).
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from tests.sources import ROOT


class Ranks:
    """What starts the ranks: `ranks.run("train", ...)` is as `run("train", ...)` without the launcher."""

    def __init__(self, process: subprocess.Popen[str], scratch: Path, deadline: float) -> None:
        self._process, self._scratch, self._deadline = process, scratch, deadline
        self._launches = count()

    def run(
        self, *arguments: str, world: int = 1, cwd: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the command as `world` ranks to its end; all of them have to leave with the same exit code.

        Without any it is one process that is no rank, and what it says on stdout is among the rest. The first
        argument may be a script of Python in the place of one of the command's parts.
        """
        said = self._scratch / "stderr"
        said.write_bytes(b"")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        asked = {"arguments": arguments, "said": str(said), "cwd": str(cwd)}
        asked["environment"] = environment | (meeting if world else {})
        codes = self._answer({**asked, "world": world})
        assert len(set(codes)) == 1, f"ranks left with {codes}: {said.read_text()}"
        return subprocess.CompletedProcess(arguments, codes[0], "", said.read_text())

    def start(self, *arguments: str, log: Path, umask: int | None = None, **environment: str) -> Started:
        """Start the command, or `torchrun` with arguments of its own, as a launcher whose ranks are forked.

        Args:
            log: a file for what all of them say.
        """
        log.touch()
        asked = {"arguments": arguments, "said": str(log), "cwd": str(ROOT), "environment": environment}
        return Started(self, self._answer({**asked, "world": 0, "launcher": True, "umask": umask}))

    def launch(
        self, *arguments: str, umask: int | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """`start` to its end."""
        log = self._scratch / f"launch_{next(self._launches)}"
        started = self.start(*arguments, log=log, umask=umask, **environment)
        try:
            code = started.wait(self._deadline)
        finally:
            started.kill()
        return subprocess.CompletedProcess(arguments, code, "", log.read_text())

    def code_of(self, pid: int) -> int | None:
        """The exit code of what was started, if it has ended; it can be asked once."""
        return self._answer({"ended": pid})

    def _answer(self, asked: dict) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], self._deadline)
        said = Path(asked["said"]).read_text() if "said" in asked else ""
        assert ready, f"no end of {asked} within {self._deadline} s: {said}"
        return json.loads(self._process.stdout.readline())


class Started:
    """What `Ranks.start` began, as a Popen: it leads a session of its own."""

    def __init__(self, ranks: Ranks, pid: int) -> None:
        self.pid, self.returncode = pid, None
        self._ranks = ranks

    def poll(self) -> int | None:
        """Its exit code, if it has ended."""
        if self.returncode is None:
            self.returncode = self._ranks.code_of(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code when it has ended. Raises TimeoutExpired."""
        if (code := self.poll()) is None:
            descriptor = os.pidfd_open(self.pid)
            try:
                ended, _, _ = select.select([descriptor], [], [], timeout)
            finally:
                os.close(descriptor)
            if not ended:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """By SIGKILL."""
        self.send_signal(signal.SIGKILL)


@contextmanager
def imported(scratch: Path, environment: Mapping[str, str], deadline: float) -> Iterator[Ranks]:
    """A process that has imported the library; on the way out it is ended with all that it has started.

    Args:
        scratch: a directory for what ranks say.
        deadline: seconds that a run may take.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.ranks"],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield Ranks(process, scratch, deadline)
        process.communicate(timeout=30)  # the end of its input is its end
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ending(become: Callable[[int, dict], None]) -> Callable[[int, dict], None]:
    """Ends the process after it by the code that it leaves with, threads joined and `atexit` done.

    Python would then take apart all that was imported, a third of a CPU-second of every rank.
    """

    def run(rank: int, asked: dict) -> None:
        try:
            become(rank, asked)
        except SystemExit as left:
            if isinstance(left.code, str):  # which Python prints
                raise
            threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(left.code or 0)

    return run


def serve() -> None:
    """Start what each line of the input asks for, and answer with the exit codes of its ranks."""
    import torch._dynamo  # what torch's optimizers import when the first of them is made
    import torch.distributed.run  # noqa: F401  torchrun

    import mcore_rl.launch.preflight
    import mcore_rl.launch.start
    import mcore_rl.training.loop
    import mcore_rl.training.supervised  # noqa: F401  what a rank imports

    assert len(os.listdir("/proc/self/task")) == 1, "a thread would not be in what is forked"
    gc.freeze()  # no collection of a rank walks, and so copies, what was imported here
    for line in iter(sys.stdin.readline, ""):
        asked = json.loads(line)
        if "ended" in asked:
            pid, status = os.waitpid(asked["ended"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        ranks = []
        for rank in range(max(1, asked["world"])):
            ranks.append(os.fork())
            if ranks[-1] == 0:
                become(rank, asked)
        if "launcher" in asked:
            print(json.dumps(ranks[0]), flush=True)
            continue
        statuses = [os.waitpid(pid, 0)[1] for pid in ranks]
        print(json.dumps([os.waitstatus_to_exitcode(status) for status in statuses]), flush=True)


@ending
def become(rank: int, asked: dict) -> None:
    """Run the command, as one of torchrun's ranks if any; ends the process in the ordinary way."""
    from mcore_rl.__main__ import main
    from tests.e2e.forked import fork_ranks
    from tests.e2e.step_files import record

    world = str(asked["world"])
    of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update(asked["environment"] | (of_rank if asked["world"] else {}))
    os.chdir(asked["cwd"])
    nothing = os.open(os.devnull, os.O_RDWR)
    said = os.open(asked["said"], os.O_WRONLY | os.O_APPEND)
    for mine, place in ((nothing, 0), (nothing if asked["world"] else said, 1), (said, 2)):
        os.dup2(mine, place)
    if out := os.environ.pop("STEP_FILES", ""):
        record(Path(out))
    if "launcher" in asked:
        os.setsid()
        fork_ranks()
    if asked.get("umask") is not None:
        os.umask(asked["umask"])
    sys.argv = [str(ROOT / "mcore-rl"), *asked["arguments"]]
    if asked["arguments"][0] == "torchrun":
        from torch.distributed.run import main as torchrun

        sys.exit(torchrun(asked["arguments"][1:]))
    if asked["arguments"][0].endswith((".py", ".sh")):
        sys.argv = asked["arguments"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit(0)
    sys.exit(main(asked["arguments"]))


if __name__ == "__main__":
    serve()
