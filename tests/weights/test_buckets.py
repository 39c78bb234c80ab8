"""Buckets from every layout: the HF tensors bit by bit, no byte twice, two buckets of memory."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mcore_rl.errors import WeightSyncError
from mcore_rl.model.build import build_policy
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.parallel.control import raise_everywhere
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.weights.buckets import (
    Bucket,
    OwnedParameter,
    export_of,
    plan_buckets,
    plan_of,
    take_turn,
    turns_of,
)
from mcore_rl.weights.online import servers_of
from tests.model.support import at_layout

BUCKET = 24_000
"""bytes; the largest parameter has 12800"""


class Recorder:
    """A channel that keeps what it is given to send, and what was done to its memory meanwhile."""

    def __init__(self, nbytes: int) -> None:
        self.failed: dict[str, str] = {}
        self.buffers = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(2)]
        self.sent: dict[str, Tensor] = {}
        self.nbytes: list[int] = []
        self.lasts: list[bool] = []

    def buffer(self, number: int) -> Tensor:
        return self.buffers[number % 2]

    def send(self, bucket: Bucket, number: int, *, last: bool) -> None:
        data = self.buffer(number)
        for slot in bucket.slots:
            assert slot.name not in self.sent
            self.sent[slot.name] = data[slot.begin : slot.end].view(slot.dtype).view(slot.shape).clone()
        self.nbytes.append(bucket.nbytes)
        self.lasts.append(last)

    def close(self) -> None: ...


class Allocations(TorchDispatchMode):
    """Counts the bytes of all memory that operations of this thread make, given back or not."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = {id_of(leaf): leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        self.nbytes += sum(leaf.untyped_storage().nbytes() for key, leaf in made.items() if key not in known)
        return out


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass
class Sent:
    """What a rank sent of its copy of the model."""

    copy: int
    tensors: dict[str, Tensor]
    nbytes: list[int]
    """of its buckets"""
    lasts: list[bool]
    held: int
    """bytes of memory that it took for it"""
    copied: int
    """bytes that a copy of everything which it sent takes"""


def record(mesh: Mesh, source: Path) -> Sent:
    export = export_of(build_policy(source, mesh))
    plan = plan_of(export, BUCKET)
    mine = plan.of(mesh.rank)
    recorder = Recorder(max((bucket.nbytes for bucket in mine), default=0))
    with Allocations() as made:
        for owner in turns_of(plan, mesh):
            take_turn(export, plan, owner, recorder if owner == mesh.rank else None)
    raise_everywhere(mesh, None)
    with Allocations() as copied:
        for tensor in recorder.sent.values():
            tensor.clone()
    held = made.nbytes + (sum(buffer.nbytes for buffer in recorder.buffers) if mine else 0)
    return Sent(mesh.copy, recorder.sent, recorder.nbytes, recorder.lasts, held, copied.nbytes)


def check(pool: Pool, layout: str, source: Path, copies: int = 1) -> None:
    """Every copy sends the whole model once, whatever the others do."""
    want = load_file(source / "model.safetensors")
    ranks = at_layout(pool, layout, record, source)
    assert {sent.copy for sent in ranks} == set(range(copies))
    for copy in range(copies):
        of_copy = [sent for sent in ranks if sent.copy == copy]
        got: dict[str, Tensor] = {}
        for sent in of_copy:
            assert not sent.tensors.keys() & got.keys()
            got |= sent.tensors
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert sum(sum(sent.nbytes) for sent in of_copy) == sum(tensor.nbytes for tensor in want.values())
        assert [last for sent in of_copy for last in sent.lasts].count(True) == 1
    assert max(sent.held for sent in ranks) <= 2 * BUCKET
    assert max(sent.copied for sent in ranks) > 2 * BUCKET, "the witness sees no memory"
    assert max(len(sent.nbytes) for sent in ranks) > 2, "no buffer was used twice"


@pytest.mark.parametrize(("layout", "copies"), [("tp2+sp", 1), ("pp2", 1), ("dp2", 2)])
def test_dense(pool2: Pool, layout: str, copies: int, dense_dir: Path) -> None:
    check(pool2, layout, dense_dir, copies)


@pytest.mark.parametrize(("layout", "copies"), [("ep2", 1), ("tp2ep2", 1), ("dp2", 2)])
def test_mixture_of_experts(pool2: Pool, layout: str, copies: int, moe_dir: Path) -> None:
    check(pool2, layout, moe_dir, copies)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "copies"),
    [("tp2pp2", 1), ("tp2ep2pp2", 1), ("tp2ep2dp2", 2), ("ep2dp4", 2), ("tp2ep4dp2", 1), ("cp2dp2", 2)],
)
def test_four_ranks(pool4: Pool, layout: str, copies: int, dense_dir: Path, moe_dir: Path) -> None:
    check(pool4, layout, moe_dir if "ep" in layout else dense_dir, copies)


class Broken(Recorder):
    """Its second bucket does not arrive."""

    def send(self, bucket: Bucket, number: int, *, last: bool) -> None:
        super().send(bucket, number, last=last)
        if number == 1:
            raise WeightSyncError("scripted")


def broken(mesh: Mesh, source: Path) -> tuple[int, int]:
    export = export_of(build_policy(source, mesh))
    plan = plan_of(export, BUCKET)
    channel = Broken(BUCKET) if mesh.rank == 0 else None
    try:
        take_turn(export, plan, 0, channel)
    except WeightSyncError:
        assert channel is not None
        return len(channel.nbytes), len(plan.of(0))
    assert channel is None
    return 2, len(plan.of(0))


def test_an_error_in_sending_leaves_no_rank_waiting(pool2: Pool, dense_dir: Path) -> None:
    for sent, planned in at_layout(pool2, "tp2", broken, dense_dir):
        assert sent == 2
        assert planned > 4


# -- the plan, without ranks


def mapping_of(directory: Path) -> ParameterMap:
    arch = read_architecture(directory)
    return ParameterMap(arch, arch.vocab)


def held_by_one(mapping: ParameterMap, **dtypes: torch.dtype) -> list[OwnedParameter]:
    """Every parameter, fp32 but for `dtypes` by a word in the name."""

    def dtype(name: str) -> torch.dtype:
        return next((t for word, t in dtypes.items() if word in name), torch.float32)

    return [OwnedParameter(e.megatron, dtype(e.megatron), 0) for e in mapping.entries()]


def test_every_tensor_begins_where_its_type_can_and_nothing_lies_between(moe_dir: Path) -> None:
    mapping = mapping_of(moe_dir)
    mixed = held_by_one(mapping, norm=torch.bfloat16, linear=torch.bfloat16)
    plan = plan_buckets([mixed], mapping, 1, 10_000)
    assert any(len({slot.dtype for slot in bucket.slots}) > 1 for bucket in plan.buckets)
    for bucket in plan.buckets:
        assert bucket.slots[0].begin == 0
        assert all(slot.begin % slot.dtype.itemsize == 0 for slot in bucket.slots)
        assert all(one.end == other.begin for one, other in pairwise(bucket.slots))
        assert bucket.nbytes <= 10_000 or len(bucket.parts) == 1


@pytest.mark.parametrize("change", ["missing", "twice"])
def test_a_tensor_that_nobody_or_two_ranks_own_is_seen_before_a_server_is_told(
    dense_dir: Path, change: str
) -> None:
    mapping = mapping_of(dense_dir)
    held = held_by_one(mapping)
    ranks = [held[1:], []] if change == "missing" else [held, held[:1]]
    with pytest.raises(WeightSyncError, match=r"embed_tokens.*no server was told"):
        plan_buckets(ranks, mapping, 1, BUCKET)


def test_each_owner_has_one_turn(dense_dir: Path) -> None:
    mapping = mapping_of(dense_dir)
    held = held_by_one(mapping)
    plan = plan_buckets([held[:5], [], held[5:]], mapping, 1, BUCKET)
    assert plan.owners == [0, 2]
    assert [b.owner for b in plan.buckets] == sorted(b.owner for b in plan.buckets)


@pytest.mark.slow
def test_the_plan_of_a_large_mixture_of_experts_takes_no_time(moe_dir: Path) -> None:
    """25000 tensors, two thirds of what Qwen3-235B-A22B has, in every publish on every rank."""
    arch = read_architecture(moe_dir)
    assert arch.experts is not None
    large = replace(arch, layers=64, experts=replace(arch.experts, count=128, sparse_layers=(True,) * 64))
    mapping = ParameterMap(large, large.vocab)
    held = held_by_one(mapping)
    began = time.process_time()
    plan = plan_buckets([held], mapping, 1, 1 << 30)
    assert time.process_time() - began < 3
    assert len(plan.buckets[0].slots) > 24_000


# -- which copy sends to which servers


@pytest.mark.parametrize(("copies", "servers"), [(1, 3), (2, 2), (2, 5), (4, 2)])
def test_every_server_has_one_copy_that_sends_to_it(copies: int, servers: int) -> None:
    urls = [f"http://{i}" for i in range(servers)]
    shares = [servers_of(copy, copies, urls) for copy in range(copies)]
    assert sorted(url for share in shares for url in share) == urls
    assert max(map(len, shares)) == -(-servers // copies), "the longest publish is as short as can be"
