"""Transport `tensor`: servers on this machine read buckets out of the owner's memory.

On CUDA the handle of memory on the GPU travels (CUDA IPC), on CPU the name of shared memory; bytes do not.
The shared memory is files of /dev/shm that torch in another process maps as a tensor's storage (its
`file_system` sharing), written by hand: torch's own way starts a daemon that inherits our streams and lives
as long as a server that has opened a file, and is chosen by a switch for the whole process. A server runs
such a daemon of its own.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import mmap
import os
import pickle
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing import reductions

from mcore_rl.errors import ConfigError, WeightSyncError
from mcore_rl.model import platform
from mcore_rl.model.build import Model
from mcore_rl.rollout.client import RejectedError, RolloutClient
from mcore_rl.rollout.fleet import Fleet, on_each
from mcore_rl.weights.buckets import Bucket
from mcore_rl.weights.encoding import PLAIN, Encoding
from mcore_rl.weights.online import publish_online, update_body

_DEVICE = 6
"""where in the arguments of torch's rebuild_cuda_tensor the device is"""

_ROOT = Path("/dev/shm")
_PREFIX = "mcore_rl_"
_HEADER = 64
"""bytes before the data: torch's RefcountedMapAllocator keeps the count of users in the first four"""
_USERS = 1 << 30
"""so that no user is the last one, who would remove the file: that is for us to do"""


class SharedTensor:
    """The transport to servers of this machine, which read the owners' memory.

    Args:
        bucket_bytes: of a bucket; two are held at a time.
        encoding: what the servers get, which they must have been started with.

    Raises:
        ConfigError: the ranks are on several machines.
    """

    def __init__(self, bucket_bytes: int, encoding: Encoding = PLAIN) -> None:
        here, everywhere = (os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        if here != everywhere:
            raise ConfigError(
                f'publish.transport: "tensor" hands over memory of one machine, and {here} of {everywhere} '
                'ranks are on this one; set it to "distributed"'
            )
        self._bucket_bytes, self._encoding = bucket_bytes, encoding
        self._memory: list[BucketMemory] = []

    def publish(self, model: Model, fleet: Fleet, version: str) -> dict[str, str]:
        """Do what Transport.publish says."""
        channel = partial(TensorChannel, self._memory, device=platform.device())
        return publish_online(model, fleet, version, self._bucket_bytes, channel, self._encoding)

    def close(self, fleet: Fleet) -> None:
        """Give the shared memory back."""
        while self._memory:
            self._memory.pop().close()


class BucketMemory(Protocol):
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
        memory: list[BucketMemory],
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

    def _allocate(self) -> BucketMemory:
        return (
            CudaBytes(self._nbytes, self._device)
            if self._device.type == "cuda"
            else SharedBytes(self._nbytes)
        )

    def buffer(self, number: int) -> Tensor:
        """Memory for bucket `number`; on CUDA new memory each time.

        A server answers when its copies are queued, not when they are done. Memory that was handed out is
        reused by torch only when the server has let go of it, which waits for its stream.
        """
        index = number % 2
        if number >= 2 and self._device.type == "cuda":
            self._memory[index].close()
            self._hold(index)
        return self._memory[index].data

    def send(self, bucket: Bucket, number: int, *, last: bool) -> None:
        """Returns when every server that takes part has loaded the bucket."""
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
        """Take the names of the memory back.

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
        """Give it back, for a GPU has better use for it; CUDA keeps what may still be opened."""
        self.close()

    def close(self) -> None:
        """Give it back; torch waits until no server uses it."""
        self.data = torch.empty(0, dtype=torch.uint8)
        torch.cuda.ipc_collect()


# --- shared memory of the CPU ---


class SharedBytes:
    """`nbytes` of memory that processes of this machine open by name; removed by `close`.

    Raises:
        ConfigError: the machine has not as much shared memory.
    """

    def __init__(self, nbytes: int) -> None:
        _sweep()
        self._links: set[Path] = set()
        self._kept: set[Path] = set()
        self._round = 0
        name = f"{_PREFIX}{uuid.uuid4().hex}"
        self._path = _ROOT / f".{name}"  # not swept before it is locked
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._path = self._path.rename(_ROOT / name)
            # Now, since a write to memory that is not there ends the process.
            os.posix_fallocate(self._file, 0, _HEADER + nbytes)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"{_ROOT} has no room for a bucket of {nbytes} bytes ({error}); enlarge it (docker: "
                "--shm-size), or lower publish.bucket_mib"
            ) from error
        mapped = torch.frombuffer(mmap.mmap(self._file, _HEADER + nbytes), dtype=torch.uint8)
        mapped[:4].view(torch.int32).fill_(_USERS)
        self.data: Tensor = mapped[_HEADER:]
        """[nbytes] uint8"""

    def handle(self, nbytes: int, user: int) -> object:
        """Pickles to what another process unpickles to the tensor [nbytes] of the first bytes.

        Every process is a `user` with a name of its own for the file: when it ends, its daemon of torch
        removes the names that it was told, and others may still have to open theirs.
        """
        link = self._path.with_name(f"{self._path.name}.{self._round}.{user}")
        if link not in self._links:
            link.hardlink_to(self._path)
            self._links.add(link)
        name, size = f"/{link.name}".encode(), self.data.numel()
        storage = Rebuilt(reductions.rebuild_storage_filename, torch.UntypedStorage, b"", name, size)
        typed = Rebuilt(reductions.rebuild_typed_storage, storage, torch.uint8)
        view = (0, torch.Size([nbytes]), (1,), False)
        return Rebuilt(reductions.rebuild_tensor, Tensor, typed, view)

    def renew(self, *, keep: bool) -> None:
        """The next names are others; those that were handed out go, unless some may still be opened: `keep`.

        Never the same again: the daemon of a user that ends removes those that it was told, late.
        """
        self._round += 1
        if keep:
            self._kept |= self._links
        else:
            _remove(self._links)
        self._links = set()

    def close(self) -> None:
        """Remove the file; who has it open keeps its memory. May be called again."""
        _remove({*self._links, *self._kept, self._path})
        with suppress(OSError):
            os.close(self._file)


def _remove(paths: set[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


class Rebuilt:
    """Unpickles to `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def _sweep() -> None:
    """Remove what a process left that was killed: nobody holds its lock."""
    for path in _ROOT.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another one's, or removed meanwhile
            file = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(file)
