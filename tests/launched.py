"""Ranks without a launcher, and what their short runs need: problems, a model of one layer, its server.

A plugin of tests/conftest.py: tests/e2e, tests/faults and tests/verify share them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from examples.arithmetic import main as write_arithmetic
from mcore_rl.rollout.processes import Embedded, LocalServer
from tests.e2e.ranks import Ranks, imported

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
DEADLINE = 240.0


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Ranks without a launcher, which cost no imports."""
    with imported(tmp_path_factory.mktemp("ranks"), ENVIRONMENT, DEADLINE) as process:
        yield process


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The arithmetic task with a model of one layer: `model`, and `policy`, which has random weights."""
    made = tmp_path_factory.mktemp("small")
    small = ["--train", "40", "--eval", "5", "--layers", "1", "--hidden", "64"]
    assert write_arithmetic([str(made), *small]) == 0
    shutil.copytree(made / "model", made / "policy")
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(made / "policy"))
    policy.float().save_pretrained(made / "policy")
    return made


@pytest.fixture(scope="session")
def server_url(folder: Path) -> Iterator[str]:
    """A server of the policy, which takes the weights of whatever run publishes to it."""
    with LocalServer(folder / "policy", Embedded(threads=1), log_file=folder / "server.log") as running:
        yield running.url
