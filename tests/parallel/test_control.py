"""What a lead hands to its ranks: objects as they are, arrays as memory beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mcore_rl.errors import DataError
from mcore_rl.model import platform
from mcore_rl.parallel.control import from_buffers, gather_replicas, on_leads, on_main, to_buffers
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import build_mesh, destroy_mesh
from mcore_rl.parallel.pool import Pool


def value_of(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "large": rng.normal(size=(100, 30 + seed)),
        "column": rng.integers(9, size=(80, 90)).T[::2],  # not contiguous
        "small": np.arange(3, dtype=np.int16),
        "empty": np.zeros(0, np.float32),
        "rest": ("text", seed, None),
    }


def same(got: dict, wanted: dict) -> bool:
    return got["rest"] == wanted["rest"] and all(
        got[name].dtype == wanted[name].dtype and np.array_equal(got[name], wanted[name])
        for name in ("large", "column", "small", "empty")
    )


def test_large_arrays_are_not_copied_and_the_rest_is_pickled() -> None:
    value = value_of(0)
    rest, memory = to_buffers(value)
    assert [one.numel() for one in memory] == [value["large"].nbytes]
    assert same(from_buffers(rest, memory), value)
    memory[0].zero_()
    assert not value["large"].any(), "the same memory"


def test_a_read_only_array_arrives_too() -> None:
    value = np.frombuffer(bytes(5000), np.uint8)
    rest, memory = to_buffers(value)
    assert memory == []
    assert np.array_equal(from_buffers(rest, memory), value)


def exchange(layout: str) -> list[bool]:
    """On one rank: whether it has what its lead, the main rank and all replicas handed out."""
    platform.install()
    mesh = build_mesh(Layout.parse(layout), timeout=60.0)
    try:
        lead = on_leads(mesh, lambda: value_of(mesh.dp_rank))
        main = on_main(mesh, lambda: value_of(7))
        replicas = gather_replicas(mesh, value_of(10 + mesh.dp_rank))
        with pytest.raises(DataError, match="of a lead"):
            on_leads(mesh, lambda: fail(mesh.dp_rank))
        return [
            same(lead, value_of(mesh.dp_rank)),
            same(main, value_of(7)),
            len(replicas) == mesh.layout.data,
            *(same(got, value_of(10 + replica)) for replica, got in enumerate(replicas)),
            not same(replicas[-1], value_of(99)),
        ]
    finally:
        destroy_mesh()


def fail(replica: int) -> torch.Tensor:
    if replica == 0:
        raise DataError("of a lead")
    return torch.zeros(1)


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_every_rank_has_the_same(pool2: Pool, layout: str) -> None:
    for rank in pool2.run(exchange, layout):
        assert all(rank), rank
