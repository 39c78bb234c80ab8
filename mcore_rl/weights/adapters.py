"""The adapters of a model to files in PEFT's format, from any layout; and the transport of adapters alone."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mcore_rl import directories
from mcore_rl.errors import RolloutError, WeightSyncError
from mcore_rl.model.adapters import adapter_parameters
from mcore_rl.model.build import Model
from mcore_rl.model.hf.adapters import AdapterMap
from mcore_rl.model.hf.peft_files import write_adapter
from mcore_rl.parallel.control import gather_ranks, on_main
from mcore_rl.rollout.client import RejectedError, RolloutClient
from mcore_rl.rollout.fleet import Fleet, on_each
from mcore_rl.weights.buckets import gather
from mcore_rl.weights.transport import nobody

_REMEDY = "choose another directory, or move its files away"
_UNLOAD_SECONDS = 5.0
"""for one server to forget adapters: it does so when their requests have ended, and can be asked again"""
_LOADED = "already loaded"
"""what SGLang says of a name that it holds"""


class Adapters:
    """The transport of adapters alone: PEFT's files of every version, which servers hold beside the model.

    Servers are not paused: what runs goes on under the adapter that it began with, and the next request asks
    for the new one.

    Args:
        directory: seen by trainer and servers; of this run alone.
        base: what the files call the frozen model.
        kept: versions that servers hold: that which serves, and those that requests in flight ask for.
    """

    def __init__(self, directory: Path, *, base: str, kept: int) -> None:
        self._directory, self._base, self._kept = directory.resolve(), base, kept
        self._versions: list[str] = []
        """main rank: published by this process and kept, oldest first"""

    def publish(self, model: Model, fleet: Fleet, version: str) -> dict[str, str]:
        """Do what Transport.publish says; versions that no request can ask for are removed."""
        target = self._directory / version
        export_adapter(model, target, base=self._base, kind="weights", plain=True)
        failed = on_main(model.mesh, lambda: self._hand_over(fleet, target, version))
        fleet.status = on_main(model.mesh, lambda: fleet.status)
        fleet.version = version
        return failed

    def close(self, fleet: Fleet) -> None:
        """Servers that go on without the run forget its adapters, as far as they answer."""
        local = {server.url for server in fleet.local}
        urls = [url for url in fleet.status.urls if url not in local] if self._versions else []
        names = [adapter.name for one in self._versions if (adapter := fleet.adapter_of(one)) is not None]
        with suppress(RolloutError):
            asyncio.run(on_each(list(map(fleet.client, urls)), lambda client: _unload(client, names)))

    def _hand_over(self, fleet: Fleet, target: Path, version: str) -> dict[str, str]:
        """The main rank's part of a publish."""
        kept = [*self._versions, version][-self._kept :]
        names = {one: adapter.name for one in kept if (adapter := fleet.adapter_of(one)) is not None}
        clients = [*fleet.serving, *fleet.returning()]
        work = lambda client: self._load(client, target, version, names)  # noqa: E731
        loaded, failed = asyncio.run(on_each(clients, work))
        if not loaded:
            raise nobody(fleet, version, failed)
        fleet.mark_published(loaded)
        for old in set(self._versions) - set(kept):
            shutil.rmtree(self._directory / old, ignore_errors=True)
        self._versions = kept
        return failed

    async def _load(
        self, client: RolloutClient, target: Path, version: str, names: Mapping[str, str]
    ) -> None:
        """Make one (opened) server hold the adapter in `target`; those of this run that are no more go.

        Among them are those of an attempt that this one continues: their files are in the same directory.
        What requests still ask for stays for now: no training waits for a long answer, and no server is lost
        for it.
        """
        try:
            body = {"lora_name": names[version], "lora_path": str(target)}
            told = await client.told("/load_lora_adapter", body)
        except RejectedError as error:
            if _LOADED in str(error):  # by an attempt of this call whose answer was lost: the name is its own
                return
            raise WeightSyncError(
                f"{client.url} did not load the adapter of version {version} from {target}: {error}. The "
                "server must see this path (set publish.dir to a directory that trainer and servers share), "
                "and be started with --enable-lora; see its log"
            ) from error
        held = told.get("loaded_adapters")
        ours = {
            name: Path(str(path)).parent == self._directory
            for name, path in (held.items() if isinstance(held, dict) else ())
        }
        await _unload(client, [name for name, our in ours.items() if our and name not in names.values()])


async def _unload(client: RolloutClient, names: Sequence[str]) -> None:
    """Let go of the adapters that no request asks for by now; the server lets the others go when it can."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_UNLOAD_SECONDS):
            for name in names:
                with suppress(RolloutError):
                    await client.told("/unload_lora_adapter", {"lora_name": name}, retries=0)


def export_adapter(
    model: Model, directory: Path, *, base: str, kind: directories.Kind = "adapter", plain: bool = False
) -> None:
    """Write the adapters of `model` to `directory`; collective over all ranks.

    The directory appears complete or not at all, and replaces one that an earlier call wrote. The whole
    adapter is in the main rank's host memory meanwhile: PEFT has one file.

    Args:
        base: what the file calls the model that it is beside.
        kind: the mark that the directory gets.
        plain: the file's alpha is that of an adapter without rsLoRA, which SGLang would pass over.

    Raises (on every rank):
        ConfigError: `directory` holds what no call of this wrote.
        StorageError: a file cannot be written.
    """
    adapters = model.adapters
    assert adapters is not None
    own = gather(adapter_parameters(model.unwrapped), adapters, model.mesh)
    ranks = gather_ranks(model.mesh, own)
    found = {name: tensor for rank in ranks for name, tensor in rank.items()}
    tensors = {name: found[name] for name in adapters.hf_shapes()}
    partial = directory.with_name(directory.name + ".partial")
    lora = adapters.lora
    plainly = replace(lora, alpha=lora.scale * lora.rank, rslora=False) if plain else lora
    written = AdapterMap(adapters.arch, plainly)

    def write() -> None:
        try:
            directories.check_free(directory, _REMEDY, kind=kind)
            directories.make(partial, _REMEDY, kind=kind)
            try:
                write_adapter(written, tensors, partial, base=base)
                directories.remove(directory, _REMEDY, kind=kind)
                partial.rename(directory)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
                raise
        except OSError as error:
            raise directories.storage_error(partial, error, remedy=_REMEDY) from error

    on_main(model.mesh, write)
