"""The ways in which weights reach the servers, behind one protocol."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Protocol

from mcore_rl.errors import ConfigError
from mcore_rl.model import platform
from mcore_rl.model.build import Model
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.weights.distributed import DistributedChannel, Groups
from mcore_rl.weights.online import publish_online
from mcore_rl.weights.publish import publish_by_disk
from mcore_rl.weights.tensor import Memory, TensorChannel


class Transport(Protocol):
    """Publishes the weights of a model to a fleet. Every rank has one."""

    def publish(self, model: Model, fleet: Fleet, version: str) -> dict[str, str]:
        """Every server that answers takes them as `version`; collective over all ranks.

        Returns those that failed (url -> why), which the caller counts as lost.

        Raises:
            WeightSyncError: on every rank, when a server refuses the weights, or none is left that has them.
        """
        ...

    def close(self, fleet: Fleet) -> None:
        """Give back what is kept between publishes; no collective, and no error."""
        ...


class Disk:
    """An HF directory per version, which every server reads.

    Args:
        directory: seen by trainer and servers.
        quantized: in FP8 (model.quantize).
    """

    def __init__(self, directory: Path, *, quantized: bool) -> None:
        self._directory = directory
        self._quantized = quantized

    def publish(self, model: Model, fleet: Fleet, version: str) -> dict[str, str]:
        """As Transport.publish."""
        return publish_by_disk(model, fleet, self._directory, version, quantized=self._quantized)

    def close(self, fleet: Fleet) -> None:
        """As Transport.close."""


class SharedTensor:
    """Servers of this machine read the owners' memory (weights.tensor).

    Args:
        bucket_bytes: of a bucket; two are held at a time.

    Raises:
        ConfigError: the ranks are on several machines.
    """

    def __init__(self, bucket_bytes: int) -> None:
        here, everywhere = (os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        if here != everywhere:
            raise ConfigError(
                f'publish.transport: "tensor" hands over memory of one machine, and {here} of {everywhere} '
                'ranks are on this one; set it to "distributed"'
            )
        self._bucket_bytes = bucket_bytes
        self._memory: list[Memory] = []

    def publish(self, model: Model, fleet: Fleet, version: str) -> dict[str, str]:
        """As Transport.publish."""
        channel = partial(TensorChannel, self._memory, device=platform.device())
        return publish_online(model, fleet, version, self._bucket_bytes, channel)

    def close(self, fleet: Fleet) -> None:
        """As Transport.close."""
        while self._memory:
            self._memory.pop().close()


class Distributed:
    """Owners broadcast to the servers' ranks (weights.distributed).

    Args:
        bucket_bytes: of a bucket; two are held at a time.
    """

    def __init__(self, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes
        self._groups = Groups()

    def publish(self, model: Model, fleet: Fleet, version: str) -> dict[str, str]:
        """As Transport.publish."""
        channel = partial(DistributedChannel, self._groups, device=platform.device())
        return publish_online(model, fleet, version, self._bucket_bytes, channel)

    def close(self, fleet: Fleet) -> None:
        """As Transport.close."""
        self._groups.close(fleet.serving)
