"""One process with Megatron-Core, and config-only models whose weights are random by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_rl.verify.layouts.problem import MODELS, write_model


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """ "dense", "tied" and "moe" -> a directory with its config.json."""
    return {name: write_model(tmp_path_factory.mktemp("models") / name, name) for name in MODELS}
