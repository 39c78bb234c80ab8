"""The start-up probe: a known gradient through Megatron's schedules, and scales that it must refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen3Config

from mcore_rl.errors import NumericsError
from mcore_rl.model import step
from mcore_rl.model.build import build_policy
from mcore_rl.model.optimizer import ddp_config
from mcore_rl.model.probe import check_gradient_scale
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from tests.model.support import DENSE, at_layout


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Four layers for four virtual stages; its weights are random, the probe does not read them."""
    directory = tmp_path_factory.mktemp("probe")
    Qwen3Config(**DENSE | {"num_hidden_layers": 4}).save_pretrained(directory)
    return directory


def probe(mesh: Mesh, model: Path, distributed: bool, overlap: bool) -> None:
    ddp = ddp_config(distributed=distributed, overlap=overlap)
    policy = build_policy(model, mesh, random_seed=0, ddp=ddp)
    check_gradient_scale(policy)


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
@pytest.mark.parametrize("layout", ["tp2+sp", "dp2", "pp2", "cp2", "pp2+vpp2"])
def test_the_scale_is_right_at_every_kind_of_layout(pool2: Pool, model, layout, distributed) -> None:
    at_layout(pool2, layout, probe, model, distributed, False)


def test_the_scale_is_right_when_reductions_overlap(pool2: Pool, model: Path) -> None:
    at_layout(pool2, "dp2", probe, model, True, True)


def probe_with(mesh: Mesh, model: Path, scale) -> str:
    """The refusal of a loss scale other than the right one."""
    right = step.loss_scale
    step.loss_scale = scale
    try:
        probe(mesh, model, True, False)
    except NumericsError as error:
        return str(error)
    finally:
        step.loss_scale = right
    return ""


def without_microbatches(num_microbatches: int, mesh: Mesh) -> int:
    return mesh.layout.data * mesh.layout.context


def without_ranks(num_microbatches: int, mesh: Mesh) -> int:
    return num_microbatches


@pytest.mark.parametrize("scale", [without_microbatches, without_ranks])
def test_a_wrong_scale_is_refused_on_every_rank(pool2: Pool, model: Path, scale) -> None:
    for message in at_layout(pool2, "dp2", probe_with, model, scale):
        assert "a gradient of 26 arrives as" in message
