"""Run a function on several processes of this machine: one gloo group, a deadline on every wait, no orphans.

`Pool` keeps its processes, since importing torch and Megatron-Core takes seconds; `spawn` is a pool for one
call. Every process leads its own session, so a rank is ended together with whatever it has started, and ends
itself when the caller is gone. Rendezvous is a file in a private directory and traffic stays on the loopback
interface: no port is ever chosen.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mcore_rl.errors import EXIT_RETRYABLE, McoreRLError

T = TypeVar("T")

ECHO_SECONDS = 0.5
"""how much later than its peers' broken connections a death may show"""
GOODBYE_SECONDS = 20.0
_BOOTSTRAPPING = "its bootstrapping phase"
"""what multiprocessing says where a new process runs the caller's script and starts processes itself"""
_NO_GUARD = (
    "a rank of a pool ran the caller's script from its beginning, and came to start a pool itself: put the "
    'script\'s calls under `if __name__ == "__main__":`'
)


class RankError(McoreRLError, RuntimeError):
    """A rank died, or raised something that cannot be handed to the caller as it is."""

    exit_code = EXIT_RETRYABLE


class RankTimeoutError(RankError, TimeoutError):
    """Ranks had not answered at the deadline; the message names them and shows where each one stood."""


@dataclass(frozen=True)
class _Rank:
    index: int
    process: ForkServerProcess
    pipe: Connection
    stack: Path
    """where the process writes its Python stack on SIGUSR1"""


class Pool:
    """`world` processes in one gloo group that run module-level functions until the `with` block ends.

    They start at the first `run`. After a failure all of them are ended, and the next `run` starts new ones:
    a group in which one rank left a collective is never used again. The process group stays initialised
    between calls; model-parallel state belongs to the functions, which build and destroy it.

    `setup` runs once in every new process, before anything else. Processes are forked from Python's fork
    server, which has no threads and no CUDA context. It keeps the environment that the caller had when the
    first of them started, and has imported what the caller named by `multiprocessing.set_forkserver_preload`.
    """

    def __init__(
        self,
        world: int,
        *,
        setup: Callable[[], Any] | None = None,
        start_timeout: float = 120.0,
    ) -> None:
        self.world = world
        self.setup = setup
        self.start_timeout = start_timeout
        self._ranks: list[_Rank] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def run(self, fn: Callable[..., T], *args: Any, timeout: float = 120.0) -> list[T]:
        """Call `fn(*args)` on every rank at once; the ranks' return values (tensors allowed), in rank order.

        `timeout` is in seconds and starts when all ranks are ready. Raises the first exception of a rank, its
        type kept and its rank and traceback added as a note; RankError where a rank died; RankTimeoutError at
        the deadline.
        """
        if not self._ranks:
            self._start()
        return self._call(fn, args, timeout)

    def close(self) -> None:
        """Leave the process group in order and end every process; a second call does nothing."""
        if self._ranks:
            with suppress(RankError):
                self._call(_leave_group, (), GOODBYE_SECONDS)
        self._kill()

    def _start(self) -> None:
        # multiprocessing joins live children at exit: without this an open pool hangs it
        atexit.register(self.close)
        self._directory = tempfile.TemporaryDirectory(prefix="mcore_rl_ranks_")
        directory = Path(self._directory.name)
        try:
            for index in range(self.world):
                self._ranks.append(_start_rank(index, directory))
        except BaseException as error:
            self._kill()
            if isinstance(error, RuntimeError) and _BOOTSTRAPPING in str(error):
                raise RankError(_NO_GUARD) from None
            raise
        self._call(_join_group, (self.world, directory / "rendezvous"), self.start_timeout, with_rank=True)
        if self.setup is not None:
            self._call(self.setup, (), self.start_timeout)

    def _call(
        self, fn: Callable[..., T], args: tuple[Any, ...], timeout: float, *, with_rank: bool = False
    ) -> list[T]:
        deadline = time.monotonic() + timeout
        try:
            for rank in self._ranks:
                with suppress(BrokenPipeError):  # it died; its end of file says so below
                    rank.pipe.send_bytes(pickle.dumps((fn, (rank.index, *args) if with_rank else args)))
            return _collect(
                self._ranks, deadline, f"{getattr(fn, '__qualname__', fn)} ({timeout:g} s allowed)"
            )
        except BaseException:
            self._kill()
            raise

    def _kill(self) -> None:
        for rank in self._ranks:
            if rank.process.pid is not None:
                with suppress(ProcessLookupError):
                    os.killpg(rank.process.pid, signal.SIGKILL)
                rank.process.kill()  # a process that has not come to lead its group yet
                rank.process.join()
            rank.pipe.close()
        self._ranks.clear()
        if self._directory is not None:
            self._directory.cleanup()
        atexit.unregister(self.close)


def _start_rank(index: int, directory: Path) -> _Rank:
    context = multiprocessing.get_context("forkserver")
    pipe, theirs = context.Pipe()
    stack = directory / f"stack_{index}"
    process = context.Process(target=_serve, args=(theirs, stack), name=f"rank {index}")
    try:
        process.start()
    except BaseException:
        pipe.close()
        raise
    finally:
        theirs.close()  # so that the death of the process reads as end of file
    return _Rank(index, process, pipe, stack)


def spawn(fn: Callable[..., T], world: int, *args: Any, timeout: float = 120.0) -> list[T]:
    """`Pool.run` on `world` new processes that end with the call; same results and errors."""
    with Pool(world) as pool:
        return pool.run(fn, *args, timeout=timeout)


def _collect(ranks: Sequence[_Rank], deadline: float, what: str) -> list[Any]:
    answers: dict[int, Any] = {}
    while len(answers) < len(ranks):
        waiting = [rank for rank in ranks if rank.index not in answers]
        ready = wait([rank.pipe for rank in waiting], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankTimeoutError(_describe_hang(waiting, len(ranks), what))
        # A death first: what the other ranks raise then (a closed connection) is only its consequence.
        for rank in sorted(
            (r for r in waiting if r.pipe in ready), key=lambda r: (r.process.is_alive(), r.index)
        ):
            try:
                answers[rank.index] = _receive(rank, len(ranks), what)
            except RankError:
                raise
            except Exception:
                _raise_if_died([r for r in waiting if r is not rank], len(ranks), what)
                raise
    return [answers[rank.index] for rank in ranks]


def _receive(rank: _Rank, world: int, what: str) -> Any:
    try:
        value, error, trace = pickle.loads(rank.pipe.recv_bytes())  # noqa: S301  from our own child's pipe
    except (EOFError, ConnectionResetError):
        rank.process.join(timeout=5.0)
        raise _death(rank, world, what) from None
    if error is None:
        return value
    error.add_note(f"on rank {rank.index} of {world} in {what}:\n{trace}")
    raise error


def _death(rank: _Rank, world: int, what: str) -> RankError:
    return RankError(
        f"rank {rank.index} of {world} died with exit code {rank.process.exitcode} in {what}; its last "
        "words are on stderr. -9 is mostly the kernel's out-of-memory killer: use fewer processes or a "
        "smaller model"
    )


def _raise_if_died(others: Sequence[_Rank], world: int, what: str) -> None:
    """A rank's error may be the echo of another's death, whose end is not seen yet: give it a moment."""
    wait([rank.process.sentinel for rank in others], timeout=ECHO_SECONDS)
    for rank in others:
        if not rank.process.is_alive():
            raise _death(rank, world, what)


def _describe_hang(waiting: Sequence[_Rank], world: int, what: str) -> str:
    for rank in waiting:
        if rank.process.pid is not None and rank.process.is_alive():  # signal 0's group would be the caller's
            with suppress(ProcessLookupError):
                os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(0.3)  # faulthandler writes from the signal handler itself: this is ample
    names = ", ".join(str(rank.index) for rank in waiting)
    stacks = "\n".join(
        f"rank {r.index}: {r.stack.read_text().strip() if r.stack.exists() else 'still starting'}"
        for r in waiting
    )
    return (
        f"no answer from rank {names} of {world} in {what}. Ranks that wait in different collectives, or one "
        f"that left early, are the usual cause; otherwise allow more time. They stood here:\n{stacks}"
    )


def _serve(pipe: Connection, stack: Path) -> None:
    """A rank's life: call what the pipe brings and answer, until the pipe closes."""
    os.setsid()
    threading.Thread(target=_end_with_caller, daemon=True).start()
    torch.set_num_threads(1)
    with stack.open("w") as file, suppress(EOFError):
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
        while True:
            pipe.send_bytes(_answer(pipe.recv_bytes()))


def _answer(request: bytes) -> bytes:
    try:
        fn, args = pickle.loads(request)  # noqa: S301  from our own parent's pipe
        return pickle.dumps((fn(*args), None, ""))
    except BaseException as error:
        return pickle.dumps((None, _portable(error), traceback.format_exc()))


def _portable(error: BaseException) -> Exception:
    """The error itself where it survives a round trip through pickle (some classes do not)."""
    try:
        if isinstance(error, Exception):
            return pickle.loads(pickle.dumps(error))  # noqa: S301  made on the same line
    except Exception:  # noqa: S110  whatever pickling raises, the answer is the same
        pass
    return RankError(f"{type(error).__name__}: {error}")


def _join_group(rank: int, world: int, rendezvous: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=world)


def _leave_group() -> None:
    dist.barrier()  # the last collective of a slow rank must not meet closed connections
    dist.destroy_process_group()


def _end_with_caller() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)
