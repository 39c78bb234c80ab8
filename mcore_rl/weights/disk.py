"""Transport `disk`: an HF directory for every version, which every server loads; and the export to files.

A version is a contract: names and shapes are complete before a file is opened (weights/buckets.py) and are
read back before a server is told, each server is paused while it loads, and the caller compares log-probs
afterwards.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from mcore_rl.directories import Kind, check_free, make, remove, storage_error
from mcore_rl.errors import RolloutError, WeightSyncError
from mcore_rl.model.build import Model
from mcore_rl.model.hf.files import (
    EMBEDDING,
    INDEX,
    SafetensorsWriter,
    StackedWriter,
    checkpoint_files,
    write_side_files,
)
from mcore_rl.model.hf.parameters import CriticParameterMap
from mcore_rl.model.hf.stacked import Form, in_files, is_piece, whole_of
from mcore_rl.parallel.control import on_main, raise_everywhere
from mcore_rl.rollout.client import RejectedError, RolloutClient
from mcore_rl.rollout.fleet import Fleet, on_each
from mcore_rl.weights.buckets import (
    GATHER_BYTES,
    Bucket,
    Export,
    ExportPlan,
    check_complete,
    export_of,
    plan_of,
    take_turn,
    turns_of,
    view,
)
from mcore_rl.weights.delta import Writer
from mcore_rl.weights.encoding import PLAIN, Encoding, encoded_forms
from mcore_rl.weights.follow import announce, states, wait_for_followers
from mcore_rl.weights.transport import nobody

STACKED = "model-experts.safetensors"
"""the file of an export that all ranks write the pieces of stacked tensors to"""
_REMEDY = "name another directory (publish.dir or run.dir of a run)"


class TensorFile(Protocol):
    """A weight file that is open for writing."""

    def write(self, name: str, tensor: Tensor) -> None:
        """One of its tensors, in any order. Raises OSError where there is no room."""
        ...


OpenFile = Callable[[Path, Mapping[str, Form]], AbstractContextManager[TensorFile]]
"""(path, forms of all tensors) -> the file, which is complete when its block has ended"""


class Disk:
    """The transport of whole versions, each an HF directory under `directory`.

    Args:
        directory: seen by trainer and servers.
        encoding: what the servers get, which they must have been started with.
    """

    def __init__(self, directory: Path, encoding: Encoding = PLAIN) -> None:
        self._directory = directory
        self._encoding = encoding

    def publish(self, model: Model, fleet: Fleet, version: str) -> dict[str, str]:
        """Do what Transport.publish says; older versions are removed."""
        target = self._directory.resolve() / version
        export(model, target, encoding=self._encoding)
        forms = encoded_forms(model.mapping, self._encoding, torch.float32)
        expected = in_files({name: shape for name, (shape, _) in forms.items()})
        failed = on_main(model.mesh, lambda: publish_directory(fleet, target, version, expected))
        fleet.status = on_main(model.mesh, lambda: fleet.status)
        fleet.version = version
        return failed

    def close(self, fleet: Fleet) -> None:
        """Keep nothing between publishes."""


class Changes:
    """The transport of what changed, which goes to `directory`/VERSION; servers read `replica`/VERSION.

    Followers (weights/follow.py) make whole versions of it, so that only what changed crosses the network.

    Args:
        directory: seen by the trainer and by every server's machine.
        replica: TARGET of the followers, the same path on every machine.
        timeout: seconds that followers have for a version.
        encoding: what the servers get.
    """

    def __init__(self, directory: Path, replica: Path, *, timeout: float, encoding: Encoding = PLAIN) -> None:
        self._directory, self._replica = directory.resolve(), replica.resolve()
        self._timeout, self._encoding = timeout, encoding
        self._writer = Writer()
        self._announced = ""
        self._able: set[str] | None = None
        """followers that can make the version which is being published; None, all"""

    def publish(self, model: Model, fleet: Fleet, version: str) -> dict[str, str]:
        """Do what Transport.publish says; a follower without the version is a WeightSyncError too."""
        target = self._directory / version
        if on_main(model.mesh, self._needs_all):
            self._writer.forget()
        export(model, target, encoding=self._encoding, open_file=self._writer.open)
        failed = on_main(model.mesh, lambda: self._hand_over(fleet, target, version))
        fleet.status = on_main(model.mesh, lambda: fleet.status)
        fleet.version = version
        return failed

    def close(self, fleet: Fleet) -> None:
        """Keep nothing; followers go on, for the run that resumes this one."""

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
        """Load the follower's copy; a server is lost until there is one, where its follower began anew."""
        try:
            await load_from_disk(client, self._replica / version, version)
        except WeightSyncError as error:
            raise RolloutError(
                f"{client.url} did not load version {version} from its machine's {self._replica}: "
                f"{error.__cause__}. `mcore-rl follow` must run there"
            ) from error


# --- the export to files ------------------------------------------------------------------------------------


def export(
    model: Model,
    directory: Path,
    *,
    kind: Kind = "weights",
    encoding: Encoding = PLAIN,
    open_file: OpenFile = SafetensorsWriter,
    bucket_bytes: int = GATHER_BYTES,
) -> None:
    """Write a model as an HF directory; collective over all ranks.

    Every rank that owns parameters writes a file, bucket by bucket. The directory appears complete or not at
    all, and replaces one that an earlier export of the same `kind` wrote. config.json and the tokenizer are
    those that the model was built from, whatever its source holds by now.

    Raises (on every rank):
        ConfigError: `directory` holds what no export of this kind wrote.
        StorageError: a file cannot be written; nothing is left of the attempt.
        NumericsError: a weight cannot be encoded.
    """
    mesh, what = model.mesh, export_of(model, encoding)
    directory = Path(directory)
    partial = directory.with_name(directory.name + ".partial")
    plan = plan_of(what, bucket_bytes)
    owners = [owner for owner in plan.owners if _forms(plan.of(owner), pieces=False)]
    names = {owner: f"model-{i + 1:05d}-of-{len(owners):05d}.safetensors" for i, owner in enumerate(owners)}
    stacked = _forms(plan.buckets, pieces=True)
    on_main(mesh, lambda: _begin(directory, partial, kind, stacked))
    try:
        _write_files(what, plan, partial, names, open_file)
        on_main(mesh, lambda: _write_side_files(model, encoding, plan, names, partial))
        on_main(mesh, lambda: _put_in_place(partial, directory, kind))
    except Exception:
        if mesh.is_main:
            shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
        raise


def _forms(buckets: Iterable[Bucket], *, pieces: bool) -> dict[str, Form]:
    """The tensors of `buckets` that are pieces of stacked ones (hf.stacked), or those that are none."""
    slots = (slot for bucket in buckets for slot in bucket.slots)
    return {slot.name: (slot.shape, slot.dtype) for slot in slots if is_piece(slot.name) is pieces}


def _write_files(
    what: Export, plan: ExportPlan, partial: Path, names: Mapping[int, str], open_file: OpenFile
) -> None:
    """Write every owner's file, in turns within a tensor-parallel group; collective over all ranks.

    What can fail before a turn, fails on every rank before any rank waits for another one's shards.
    """
    mesh = what.mesh
    turns = turns_of(plan, mesh) if mesh.copy == 0 else []
    channel: _FileChannel | None = None
    error: Exception | None = None
    with ExitStack() as file:
        if mesh.rank in turns:
            try:
                channel = _opened(what, plan, partial, names.get(mesh.rank), open_file, file)
            except Exception as caught:  # whatever it is: the other ranks would wait for this one
                error = caught
        raise_everywhere(mesh, error)
        for owner in turns:
            try:
                with (
                    _reported(partial / names.get(owner, STACKED)),
                    file if owner == mesh.rank else nullcontext(),
                ):
                    take_turn(what, plan, owner, channel if owner == mesh.rank else None)
            except Exception as caught:  # raised on every rank, once no rank waits for this one's shards
                error = error or caught
    raise_everywhere(mesh, error)


def _opened(
    what: Export,
    plan: ExportPlan,
    partial: Path,
    name: str | None,
    open_file: OpenFile,
    file: ExitStack,
) -> _FileChannel:
    """The channel into this rank's file, and into the one of all ranks' pieces; closed with `file`."""
    buckets = plan.of(what.mesh.rank)
    device = next(iter(what.tensors.values())).device
    files: dict[bool, TensorFile] = {}
    if name is not None:
        with _reported(partial / name):
            files[False] = file.enter_context(open_file(partial / name, _forms(buckets, pieces=False)))
    if _forms(buckets, pieces=True):
        with _reported(partial / STACKED):
            stacked = _forms(plan.buckets, pieces=True)
            files[True] = file.enter_context(StackedWriter(partial / STACKED, stacked))
    return _FileChannel(files, max(bucket.nbytes for bucket in buckets), len(buckets), device)


class _FileChannel:
    """The channel into this rank's files: False, of whole tensors; True, of pieces."""

    def __init__(
        self, files: Mapping[bool, TensorFile], nbytes: int, count: int, device: torch.device
    ) -> None:
        self.failed: dict[str, str] = {}
        self._files = files
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(min(2, count))]

    def buffer(self, number: int) -> Tensor:
        return self._buffers[number % 2]

    def send(self, bucket: Bucket, number: int, *, last: bool) -> None:
        data = self.buffer(number)
        for slot in bucket.slots:
            self._files[is_piece(slot.name)].write(slot.name, view(data, slot).cpu())

    def close(self) -> None: ...


def _begin(directory: Path, partial: Path, kind: Kind, stacked: Mapping[str, Form]) -> None:
    """Make a directory to write to, empty but for the file of pieces, if there are any.

    Nothing that somebody else wrote will have to go for it.
    """
    check_free(directory, _REMEDY, kind=kind)
    with _reported(partial):
        make(partial, _REMEDY, kind=kind)
        if stacked:
            StackedWriter.begin(partial / STACKED, stacked)


def _write_side_files(
    model: Model, encoding: Encoding, plan: ExportPlan, names: Mapping[int, str], partial: Path
) -> None:
    """Write the index, config.json and the tokenizer."""
    weight_map = {
        whole_of(slot.name): STACKED if is_piece(slot.name) else names[bucket.owner]
        for bucket in plan.buckets
        for slot in bucket.slots
    }
    with _reported(partial):
        index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
        (partial / INDEX).write_text(json.dumps(index, indent=1))
        slots = {slot.name: slot for bucket in plan.buckets for slot in bucket.slots}
        classifier = isinstance(model.mapping, CriticParameterMap)
        quantization = encoding.config(model.mapping)
        write_side_files(model.files, partial, slots[EMBEDDING].dtype, quantization, classifier=classifier)


def _put_in_place(partial: Path, directory: Path, kind: Kind) -> None:
    """The new directory takes the place of the old one."""
    with _reported(partial):
        check_free(directory, _REMEDY, kind=kind)
        old = directory.with_name(directory.name + ".replaced")
        remove(old, _REMEDY, kind=kind)
        if directory.exists():
            directory.rename(old)
        partial.rename(directory)
        remove(old, _REMEDY, kind=kind)


@contextmanager
def _reported(place: Path) -> Iterator[None]:
    """An OSError becomes a StorageError that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        raise storage_error(place, error, remedy=_REMEDY) from error


# --- the servers --------------------------------------------------------------------------------------------


def publish_directory(
    fleet: Fleet, target: Path, version: str, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """The main rank's part of a publish: servers load `target`, if it holds the tensors `expected`.

    Servers that were lost and answer again are published to like the others, and serve from then on. Returns
    those that failed (url -> why).

    Raises:
        WeightSyncError: the directory holds other tensors, or no server has loaded them.
    """
    remedy = "Something else writes to this directory (publish.dir)"
    check_complete(_tensors_in(target), expected, str(target), remedy)
    clients = [*fleet.serving, *fleet.returning()]
    loaded, failed = asyncio.run(on_each(clients, lambda client: load_from_disk(client, target, version)))
    if not loaded:
        raise nobody(fleet, version, failed)
    fleet.mark_published(loaded, target)
    return failed


def _tensors_in(target: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor in the files of `target`."""
    for file in set(checkpoint_files(target).values()):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dictionary
                yield name, tuple(tensors.get_slice(name).get_shape())


async def load_from_disk(client: RolloutClient, target: Path, version: str) -> None:
    """Make one (opened) server load the HF directory `target` as `version`.

    Paused, so that nothing is sampled from half-loaded weights; retracted, so that what was running goes on
    without the cache of the old ones (pausing in place, the server would keep it, or refuse to flush it).

    Raises:
        WeightSyncError: the server refuses the weights. RolloutError: it gave no usable answer, and stays
            paused: to wait for another deadline helps nobody, and `Fleet.returning` resumes who comes back.
    """
    await client.pause("retract")
    try:
        await client.update_weights_from_disk(str(target), version)
    except RejectedError as error:
        await client.resume()
        raise WeightSyncError(
            f"{client.url} did not load version {version} from {target}: {error}. The server must see this "
            "path: set publish.dir to a directory that trainer and servers share"
        ) from error
    await client.resume()
