"""The harm that benchmarks/soak.py does to a run, each with a witness that it was done."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROLES = {
    "rank": "-m mcore_rl train",
    "server": "-m mcore_rl.server",
    "reward": "-m mcore_rl.rewards",
    "agent": "-S -c",
}
"""who a child of the launcher is -> what its command line says"""
BRIEF, LONG = 2.0, 460.0
"""seconds for which a process is stopped or the disk is full: a run outlives the first, not the second"""
Harm = Callable[["Target", random.Random], dict[str, Any]]


class Cut:
    """A way to a server on this machine that can be torn: all connections break, new ones are refused."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.broken = 0
        """connections that were broken so far"""
        self._torn = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def tear(self, seconds: float, patience: float) -> None:
        """Break every connection, and those that are made for so many seconds; waits until there is one."""
        before, end = self.broken, time.monotonic() + patience
        self._torn.set()
        while self.broken == before and time.monotonic() < end:
            self._break()
            time.sleep(0.02)
        time.sleep(seconds)
        self._break()
        self._torn.clear()

    def close(self) -> None:
        self._closed.set()
        self._break()
        self._listener.close()

    def _break(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            self.broken += 1
            for one in pair:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        self._listener.settimeout(0.5)
        while not self._closed.is_set():
            with suppress(TimeoutError, OSError):
                near, _ = self._listener.accept()
                if self._torn.is_set():
                    near.close()
                    self.broken += 1
                    continue
                threading.Thread(target=self._carry, args=[near], daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with ExitStack() as stack:
            stack.enter_context(near)
            stack.enter_context(suppress(OSError))
            far = stack.enter_context(socket.create_connection(self._target, timeout=60))
            with self._lock:
                self._pairs.append((near, far))
            while not self._closed.is_set():
                for one in select.select([near, far], [], [], 0.5)[0]:
                    data = one.recv(1 << 16)
                    if not data:
                        return
                    (far if one is near else near).sendall(data)


class Target:
    """A run that is going on, and what of it can be harmed."""

    def __init__(self, run: subprocess.Popen[bytes], disk: Path | None, way: Cut | None) -> None:
        self.run, self.disk, self.way = run, disk, way

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Role -> the processes that have it."""
        launcher = psutil.Process(self.run.pid)
        found: dict[str, list[psutil.Process]] = {"launcher": [launcher]}
        for child in launcher.children(recursive=True):
            with suppress(psutil.Error):
                line = " ".join(child.cmdline())
                for role, says in ROLES.items():
                    if says in line:
                        found.setdefault(role, []).append(child)
        return found

    def ended(self, seconds: float) -> bool:
        """Whether the run has ended within so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self.run.wait(seconds)
        return self.run.poll() is not None


def harm(target: Target, drawn: random.Random) -> dict[str, Any]:
    """Do one harm, drawn from those that this run can meet: what it was, and its `witness`; empty if none."""
    kinds: list[Harm] = [kill, kill, terminate, stop]
    kinds += [fill] if target.disk is not None else []
    kinds += [tear, tear] if target.way is not None else []
    with suppress(psutil.NoSuchProcess):
        return drawn.choice(kinds)(target, drawn)
    return {}  # the run has just ended


def kill(target: Target, drawn: random.Random) -> dict[str, Any]:
    """SIGKILL for a process of any role."""
    role, victim = _one(target, drawn)
    victim.kill()
    if role == "launcher":  # our own child, whose exit code nobody else may take
        return {"harm": "SIGKILL", "of": role, "witness": target.ended(LONG) and target.run.returncode == -9}
    gone, _ = psutil.wait_procs([victim], timeout=60)
    return {"harm": "SIGKILL", "of": role, "witness": bool(gone) or victim.status() == psutil.STATUS_ZOMBIE}


def terminate(target: Target, drawn: random.Random) -> dict[str, Any]:
    """SIGTERM for the launcher or a rank, as of a scheduler: the step is finished and saved.

    Not before it listens: until Python has begun, the signal ends any program, with a code of its own.
    """
    role, victim = _one(target, drawn, ("launcher", "rank"))
    end = time.monotonic() + LONG
    while not _listens(victim.pid) and time.monotonic() < end:
        time.sleep(0.01)
    victim.send_signal(signal.SIGTERM)
    return {"harm": "SIGTERM", "of": role, "witness": target.ended(LONG)}


def _listens(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM, or is gone."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        (caught,) = (line for line in lines if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return True


def stop(target: Target, drawn: random.Random) -> dict[str, Any]:
    """SIGSTOP for a process, which goes on after a while; or not, and is ended by the run or killed here."""
    role, victim = _one(target, drawn)
    seconds = BRIEF if role == "launcher" else drawn.choice([BRIEF, LONG])
    victim.suspend()
    time.sleep(0.2)
    witness = victim.status() == psutil.STATUS_STOPPED
    target.ended(seconds)
    with suppress(psutil.NoSuchProcess):
        victim.resume()
    return {"harm": f"SIGSTOP for {seconds:g} s", "of": role, "witness": witness}


def fill(target: Target, drawn: random.Random) -> dict[str, Any]:
    """Everything that the disk of the run has left is taken, until the run has ended or a while is over."""
    assert target.disk is not None
    ballast = target.disk / "ballast"
    full = False
    try:
        with ballast.open("wb", buffering=0) as file:
            with suppress(OSError):
                os.posix_fallocate(file.fileno(), 0, psutil.disk_usage(str(target.disk)).free)
            with suppress(OSError):
                file.seek(0, os.SEEK_END)
                while file.write(bytes(1 << 16)):
                    pass
            full = psutil.disk_usage(str(target.disk)).free < 1 << 16
        if target.run.poll() is not None:
            return {}  # it ended before the disk was full
        target.ended(LONG)
    finally:
        ballast.unlink()
    return {"harm": "full disk", "of": "run.dir", "witness": full}


def tear(target: Target, drawn: random.Random) -> dict[str, Any]:
    """The network between the ranks and the server breaks for a moment, or for longer than they wait."""
    assert target.way is not None
    before, seconds = target.way.broken, drawn.choice([0.2, BRIEF])
    target.way.tear(seconds, LONG)
    return {"harm": f"torn network for {seconds:g} s", "of": "server", "witness": target.way.broken > before}


def _one(
    target: Target, drawn: random.Random, roles: Sequence[str] = ("launcher", *ROLES)
) -> tuple[str, psutil.Process]:
    """A process; each role that there is has the same chance."""
    found = {role: its for role, its in target.processes().items() if role in roles}
    role = drawn.choice(sorted(found))
    return role, drawn.choice(found[role])


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path | None]:
    """A file system of its own at `place`, to be filled; None where this user may not mount one."""
    place.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0
    try:
        yield place if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False, timeout=60)
