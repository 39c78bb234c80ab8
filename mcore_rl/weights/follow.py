"""`mcore-rl follow SOURCE TARGET`: a copy of the newest weights on a server's machine, kept up by changes.

The trainer writes to SOURCE (publish.dir, on a file system that both see) what changed since the version
before; a follower makes of it and of its copy the whole new version, in TARGET/VERSION, which the servers of
its machine load. It reports in SOURCE/followers what it has; one that is new, or has lost the thread, gets a
whole version.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mcore_rl.directories import VERSION, is_ours, make, remove, storage_error, write_whole
from mcore_rl.errors import ConfigError, McoreRLError, WeightSyncError
from mcore_rl.terminal import printable, quoted
from mcore_rl.weights.delta import SUFFIX, SUM_SUFFIX, apply, check, files_of

LATEST = "LATEST"
FOLLOWERS = "followers"
_POLL_SECONDS = 0.2
_BEAT_SECONDS = 5.0
_REMEDY = "name another TARGET"
DEAD_SECONDS = 60.0
"""without a sign, after which a follower is not waited for"""


@dataclass(frozen=True)
class State:
    """What a follower says of itself."""

    name: str
    have: str = ""
    """the edition that it holds, complete and checked"""
    failed: str = ""
    """the edition that it could not make"""
    why: str = ""


class Follower:
    """Keeps TARGET like the newest version of SOURCE. One per machine and TARGET.

    Raises:
        ConfigError: one of them is the other, or lies in it: versions of the trainer's would be removed.
    """

    def __init__(self, source: Path, target: Path) -> None:
        real = [Path(os.path.realpath(place)) for place in (source, target)]
        if real[0].is_relative_to(real[1]) or real[1].is_relative_to(real[0]):
            raise ConfigError(f"TARGET: {target} and SOURCE, {source}, are not apart; {_REMEDY}")
        self._source, self._target = source, target
        self.state = State(f"{socket.gethostname()}-{os.getpid()}")
        self._beat = 0.0

    def run(self) -> None:
        """Follow until the process ends. Raises StorageError where SOURCE cannot be read or written."""
        try:
            while True:
                self.step()
                time.sleep(_POLL_SECONDS)
        finally:
            with suppress(OSError):  # of a SOURCE that cannot be read, which the error says
                self._file.unlink()

    def step(self) -> None:
        """Take the newest version if it is news; say so, and now and then that this lives."""
        edition = latest(self._source)
        if edition not in ("", self.state.have, self.state.failed):
            try:
                self._take(version_of(edition))
                self._say(State(self.state.name, have=edition))
            except (McoreRLError, OSError) as error:
                why = f"{type(error).__name__}: {error}"
                self._say(replace(self.state, failed=edition, why=why))
        elif time.monotonic() - self._beat > _BEAT_SECONDS:
            self._say(self.state)

    @property
    def _file(self) -> Path:
        return self._source / FOLLOWERS / f"{self.state.name}.json"

    def _say(self, state: State) -> None:
        if state != self.state:
            what = state.why or f"version {version_of(state.have)}"
            print(printable(f"mcore-rl follow: {what}"), file=sys.stderr, flush=True)
        self.state, self._beat = state, time.monotonic()
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(self._file, error) from error
        write_whole(self._file, json.dumps(asdict(state)))

    def _take(self, version: str) -> None:
        if not VERSION.fullmatch(version):  # it becomes a directory's name
            raise WeightSyncError(f"{self._source / LATEST}: {quoted(version)} is no version of weights")
        new, partial = self._source / version, self._target / f"{version}.partial"
        make(partial, _REMEDY, kind="weights")
        for name in files_of(new):
            path, copy = new / name, partial / name
            copy.parent.mkdir(exist_ok=True)
            if path.suffix == SUFFIX:
                self._patch(path, copy.with_suffix(""))
                continue
            shutil.copyfile(path, copy)
            expected = path.with_name(path.name + SUM_SUFFIX)
            if expected.exists():
                check(copy, expected.read_text())
        whole = self._target / version
        remove(whole, _REMEDY, kind="weights")
        partial.rename(whole)
        self._forget(version)

    def _patch(self, delta: Path, file: Path) -> None:
        if not self.state.have:
            raise WeightSyncError(f"{delta}: changes, and there is nothing here that they change")
        shutil.copyfile(self._target / version_of(self.state.have) / file.name, file)
        apply(delta, file)

    def _forget(self, version: str) -> None:
        """Remove older versions; what is not named and marked as one is somebody else's, or a whole run."""
        kept = {version, version_of(self.state.have)}  # a server may be reading the one before
        for path in self._target.iterdir():
            if path.name in kept or not VERSION.fullmatch(path.name):
                continue
            if is_ours(path, "weights"):
                remove(path, _REMEDY, kind="weights")


def version_of(edition: str) -> str:
    """An edition is a version and a mark that tells it from one of the same name, of a run that went back."""
    return edition.partition(" ")[0]


def latest(source: Path) -> str:
    """The newest edition of SOURCE that is complete; empty before the first.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        return (source / LATEST).read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise storage_error(source / LATEST, error, remedy="name another SOURCE") from error


def announce(source: Path, version: str) -> str:
    """Tell the followers that SOURCE/`version` is complete; what it is called as an edition."""
    edition = f"{version} {uuid.uuid4().hex}"
    write_whole(source / LATEST, edition)
    return edition


def states(source: Path) -> list[State]:
    """What the followers say that live: within DEAD_SECONDS of the newest sign, by the file system's clock.

    Raises:
        StorageError: SOURCE cannot be written.
    """
    probe = source / f".{FOLLOWERS}.clock"
    try:
        probe.write_text("")
        now = probe.stat().st_mtime
    except OSError as error:
        raise storage_error(probe, error) from error
    found = []
    for file in sorted((source / FOLLOWERS).glob("*.json")):
        try:
            if now - file.stat().st_mtime < DEAD_SECONDS:
                state = State(**json.loads(file.read_text()))
                found += [state] if all(isinstance(said, str) for said in vars(state).values()) else []
        except (OSError, ValueError, TypeError, RecursionError):  # gone meanwhile, or not a follower's
            continue
    return found


def wait_for_followers(
    source: Path, edition: str, timeout: float, able: Collection[str] | None = None
) -> None:
    """Return when every follower that lives has `edition`.

    Args:
        able: the names of those that it was written for, where it is not whole: one that has come meanwhile
            takes the next version.

    Raises:
        WeightSyncError: there is none, one could not make it, or has not after `timeout` seconds.
    """
    end, version = time.monotonic() + timeout, version_of(edition)
    while True:
        found = [state for state in states(source) if able is None or state.name in able]
        failed = [state for state in found if state.failed == edition]
        waiting = [state.name for state in found if state.have != edition]
        if failed:
            raise WeightSyncError(f"follower {failed[0].name} has not version {version}: {failed[0].why}")
        if found and not waiting:
            return
        if time.monotonic() > end:
            raise WeightSyncError(_silent(source, version, timeout, waiting))
        time.sleep(_POLL_SECONDS)


def _silent(source: Path, version: str, timeout: float, waiting: Sequence[str]) -> str:
    if not waiting:
        return f"{source}: no follower; start `mcore-rl follow {source} REPLICA` on every server's machine"
    return f"after {timeout:g} s these followers have not made version {version}: {', '.join(waiting)}"
