"""Transport `tensor`: servers on this machine read buckets out of the owner's memory.

On CUDA the handle of memory on the GPU travels (CUDA IPC), on CPU the name of shared memory; bytes do not.
"""

from __future__ import annotations

import asyncio
import base64
import pickle
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Protocol

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from mcore_rl.errors import WeightSyncError
from mcore_rl.rollout.client import RejectedError, RolloutClient
from mcore_rl.rollout.fleet import on_each
from mcore_rl.weights.calls import update_body
from mcore_rl.weights.plan import Bucket
from mcore_rl.weights.shared_memory import Rebuilt, SharedBytes

_DEVICE = 6
"""where in the arguments of torch's rebuild_cuda_tensor the device is"""


class Memory(Protocol):
    """What a bucket is filled in: SharedBytes, or CudaBytes."""

    data: Tensor

    def handle(self, nbytes: int, user: int) -> object: ...
    def renew(self, *, keep: bool) -> None: ...
    def close(self) -> None: ...


class TensorChannel:
    """One owner's two buffers, and the calls that hand their handles to every server.

    Args:
        memory: of earlier publishes, to use again and to add to: fresh memory costs as much as the copies.
    """

    def __init__(
        self,
        memory: list[Memory],
        clients: Mapping[RolloutClient, int],
        version: str,
        nbytes: int,
        count: int,
        device: torch.device,
    ) -> None:
        self.failed: dict[str, str] = {}
        self._memory = memory
        self._users: dict[RolloutClient, range] = {}
        """one for each process that opens the memory"""
        for client, ranks in clients.items():
            begin = sum(map(len, self._users.values()))
            self._users[client] = range(begin, begin + ranks)
        self._version = version
        self._nbytes = nbytes
        self._device = device
        for index in range(min(2, count)):
            self._hold(index)

    def _hold(self, index: int) -> None:
        """Enough memory at `index`."""
        if index < len(self._memory):
            if self._memory[index].data.numel() >= self._nbytes:
                return
            self._memory.pop(index).close()
        self._memory.insert(index, self._allocate())

    def _allocate(self) -> Memory:
        return (
            CudaBytes(self._nbytes, self._device)
            if self._device.type == "cuda"
            else SharedBytes(self._nbytes)
        )

    def buffer(self, number: int) -> Tensor:
        """As Channel.buffer; on CUDA new memory each time.

        A server answers when its copies are queued, not when they are done. Memory that was handed out is
        reused by torch only when the server has let go of it, which waits for its stream.
        """
        index = number % 2
        if number >= 2 and self._device.type == "cuda":
            self._memory[index].close()
            self._hold(index)
        return self._memory[index].data

    def send(self, bucket: Bucket, number: int, *, last: bool) -> None:
        """As Channel.send."""
        memory = self._memory[number % 2]
        body = update_body(bucket, self._version, last=last)

        async def load(client: RolloutClient) -> None:
            # One handle for each that opens it: CUDA's count users.
            users = self._users[client]
            entries = [serialize(bucket, memory.handle(bucket.nbytes, user)) for user in users]
            try:
                await client.control(
                    "/update_weights_from_tensor", {"serialized_named_tensors": entries, **body}
                )
            except RejectedError as error:
                raise WeightSyncError(
                    f"{client.url} did not load version {self._version} from this machine's memory: {error}. "
                    "It stays paused. See its log"
                ) from error

        alive = [client for client in self._users if client.url not in self.failed]
        self.failed |= asyncio.run(on_each(alive, load))[1]

    def close(self) -> None:
        """As Channel.close.

        A server that gave no answer may yet open what it was told of, and would end if it were not there.
        """
        for memory in self._memory:
            memory.renew(keep=bool(self.failed))


def serialize(bucket: Bucket, shared: object) -> str:
    """What SGLang unpickles; its list of allowed names holds no class of ours, and ours none of SGLang's."""
    metadata = [
        SimpleNamespace(
            name=slot.name,
            shape=torch.Size(slot.shape),
            dtype=slot.dtype,
            start_idx=slot.begin,
            end_idx=slot.end,
            numel=slot.end - slot.begin,
        )
        for slot in bucket.slots
    ]
    raw = pickle.dumps({"flattened_tensor": shared, "metadata": metadata})
    return base64.b64encode(raw).decode()


class CudaBytes:
    """`nbytes` on a GPU that processes of this machine open by CUDA's handle."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.data: Tensor = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def handle(self, nbytes: int, user: int) -> object:
        """Pickles to what an SGLang server unpickles to the tensor [nbytes] of the first bytes."""
        function, arguments = reductions.reduce_tensor(self.data[:nbytes])
        # SGLang looks for the GPU by its UUID: its numbers may be others than ours.
        uuid = str(torch.cuda.get_device_properties(self.data.device).uuid)
        return Rebuilt(function, *arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])

    def renew(self, *, keep: bool) -> None:
        """As `close`: a GPU has better use for it between publishes; CUDA keeps what may still be opened."""
        self.close()

    def close(self) -> None:
        """Give it back; torch waits until no server uses it."""
        self.data = torch.empty(0, dtype=torch.uint8)
        torch.cuda.ipc_collect()
