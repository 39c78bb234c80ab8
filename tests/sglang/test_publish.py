"""After a publish from any trainer layout (dp2 is TP1, twice) a real server's log-probs are Megatron's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mcore_rl.data.packing import TokenSequence
from mcore_rl.model.build import build_policy
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.launch import Pool
from mcore_rl.parallel.mesh import Layout, Mesh
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.train.score import log_probs
from mcore_rl.weights.publish import publish_by_disk, server_log_probs
from tests.model.support import at_layout, shape_at
from tests.rollout.support import VOCAB
from tests.sglang.conftest import KEY_ENV

P999, LARGEST = 2e-5, 2e-4
SEQUENCES = [np.random.default_rng(i).integers(VOCAB - 1, size=24 + 4 * i).tolist() for i in range(16)]


def published(mesh: Mesh, source: Path, url: str, directory: Path, version: str) -> tuple[Tensor, Tensor]:
    """[tokens] |Megatron - server| after publishing `source` from this layout, and before."""
    model = build_policy(source, mesh)
    fleet = Fleet([url], api_key_env=KEY_ENV, timeout=60.0)

    def served(tag: str) -> Tensor:
        scores, failed = on_main(mesh, lambda: server_log_probs(fleet.serving, SEQUENCES, tag))
        assert not failed
        return torch.tensor([value for row in scores[url] for value in row], dtype=torch.float64)

    stale = served(f"{version}-stale")
    assert publish_by_disk(model, fleet, directory, version) == {}
    scored = [TokenSequence(tokens[:1], tokens[1:]) for tokens in SEQUENCES]
    held = torch.from_numpy(np.concatenate(log_probs(model, scored, shape_at(mesh, 256), 1.0))).double()
    return (held - served(f"{version}-fresh")).abs(), (held - stale).abs()


@pytest.fixture
def pool(request: pytest.FixtureRequest, layout: str) -> Pool:
    """As many processes as the layout has ranks."""
    return request.getfixturevalue(f"pool{Layout.parse(layout).world_size}")


def check(pool: Pool, layout: str, source: Path, url: str, directory: Path) -> None:
    fresh, stale = at_layout(pool, layout, published, source, url, directory, layout)[0]
    assert len(fresh) > 800
    assert fresh.quantile(0.999) <= P999
    assert fresh.max() <= LARGEST
    assert stale.max() > LARGEST, "the check cannot see stale weights"
    assert stale.quantile(0.5) > P999


@pytest.mark.parametrize("layout", ["dp2", "tp2", "tp2pp2"])
def test_dense(
    pool: Pool, layout: str, dense_url: str, dense_dirs: tuple[Path, Path], tmp_path: Path
) -> None:
    check(pool, layout, dense_dirs[1], dense_url, tmp_path)


@pytest.mark.parametrize("layout", ["dp2", "ep2", "tp2ep2", "tp2pp2ep2"])
def test_mixture_of_experts(
    pool: Pool, layout: str, moe_url: str, moe_dirs: tuple[Path, Path], tmp_path: Path
) -> None:
    check(pool, layout, moe_dirs[1], moe_url, tmp_path)
