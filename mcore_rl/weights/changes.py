"""Weights by disk, of which only what changed crosses the network: followers make whole versions of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from mcore_rl.errors import RolloutError, WeightSyncError
from mcore_rl.model.build import Model
from mcore_rl.parallel.control import on_main
from mcore_rl.rollout.client import RolloutClient
from mcore_rl.rollout.fleet import Fleet, on_each
from mcore_rl.weights.delta import Writer
from mcore_rl.weights.follow import announce, states, wait_for_followers
from mcore_rl.weights.publish import load_from_disk, nobody


class Changes:
    """What changed goes to `directory`/VERSION; servers read the followers' `replica`/VERSION.

    Args:
        directory: seen by the trainer and by every server's machine.
        replica: TARGET of the followers, the same path on every machine.
        quantized: in FP8 (model.quantize).
        timeout: seconds that followers have for a version.
    """

    def __init__(self, directory: Path, replica: Path, *, quantized: bool, timeout: float) -> None:
        self._directory, self._replica = directory.resolve(), replica.resolve()
        self._quantized, self._timeout = quantized, timeout
        self._writer = Writer()
        self._announced = ""
        self._able: set[str] | None = None
        """followers that can make the version which is being published; None, all"""

    def publish(self, model: Model, fleet: Fleet, version: str) -> dict[str, str]:
        """As Transport.publish; WeightSyncError too where a follower has not made the version."""
        target = self._directory / version
        if on_main(model.mesh, self._needs_all):
            self._writer.forget()
        model.export(target, quantized=self._quantized, write=self._writer.write)
        failed = on_main(model.mesh, lambda: self._hand_over(fleet, target, version))
        fleet.status = on_main(model.mesh, lambda: fleet.status)
        fleet.version = version
        return failed

    def close(self, fleet: Fleet) -> None:
        """As Transport.close: followers go on, for the run that resumes this one."""

    def _needs_all(self) -> bool:
        """Whether a follower lacks what was published last, and could not change it; or there is none yet."""
        found = states(self._directory)
        whole = not found or any(state.have != self._announced for state in found)
        self._able = None if whole else {state.name for state in found}
        return whole

    def _hand_over(self, fleet: Fleet, target: Path, version: str) -> dict[str, str]:
        self._announced = announce(self._directory, version)
        wait_for_followers(self._directory, self._announced, self._timeout, self._able)
        clients = [*fleet.serving, *fleet.returning()]
        loaded, failed = asyncio.run(on_each(clients, lambda client: self._load(client, version)))
        if not loaded:
            raise nobody(fleet, version, failed)
        fleet.mark_published(loaded, target)
        return failed

    async def _load(self, client: RolloutClient, version: str) -> None:
        """As load_from_disk; a server whose follower was restarted has no copy, and is lost until it has."""
        try:
            await load_from_disk(client, self._replica / version, version)
        except WeightSyncError as error:
            raise RolloutError(
                f"{client.url} did not load version {version} from its machine's {self._replica}: "
                f"{error.__cause__}. `mcore-rl follow` must run there"
            ) from error
