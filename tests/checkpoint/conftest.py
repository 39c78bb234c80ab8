"""One process with Megatron-Core, and config-only models whose weights are random by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mcore_rl.parallel.pool import Pool
from mcore_rl.verify.layouts.problem import MODELS, write_model
from tests.conftest import check_annotations


@pytest.fixture(scope="session")
def pool1() -> Iterator[Pool]:
    with Pool(1, setup=check_annotations) as pool:
        yield pool


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """ "dense", "tied" and "moe" -> a directory with its config.json."""
    return {name: write_model(tmp_path_factory.mktemp("models") / name, name) for name in MODELS}
