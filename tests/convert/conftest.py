"""A tiny model of each kind of table as transformers makes it, and its conversion."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_rl.convert.command import hf_to_mcore
from tests.model.conftest import save
from tests.model.families import FAMILIES


@pytest.fixture(scope="session", params=["llama", "qwen2", "qwen3_moe", "gpt_oss"])
def source(request, tmp_path_factory) -> Path:
    return make(request.param, tmp_path_factory.mktemp(request.param) / "hf")


@pytest.fixture(scope="session")
def dense_source(tmp_path_factory) -> Path:
    return make("qwen3", tmp_path_factory.mktemp("dense") / "hf")


@pytest.fixture(scope="session")
def converted(source: Path, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "mcore"
    hf_to_mcore(source, target, tensor=2, pipeline=2)
    return target


def make(family: str, directory: Path) -> Path:
    import transformers

    kind, settings = FAMILIES[family]
    config = getattr(transformers, kind)(**settings)
    return save(transformers.AutoModelForCausalLM.from_config, config, directory)
