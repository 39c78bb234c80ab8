"""The real model that `make real-model` wrote, in float32 and bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
MADE = HERE.parents[1] / "runs" / "real"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.real)
            item.add_marker(pytest.mark.timeout(900))
            item.add_marker(pytest.mark.xdist_group("real"))


@pytest.fixture(scope="session")
def made() -> Path:
    """`model`, `model_bf16`, `train.jsonl` and `eval.jsonl`."""
    assert (MADE / "model").is_dir(), f"{MADE / 'model'} is missing: run `make real-model`"
    return MADE
