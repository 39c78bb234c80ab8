"""A tiny model of each kind of table as transformers makes it, and its conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mcore_rl.convert.command import hf_to_mcore
from mcore_rl.lora import Lora
from mcore_rl.model.hf.adapters import AdapterMap
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.peft_files import write_adapter
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


@pytest.fixture(scope="session")
def adapted(dense_source: Path, tmp_path_factory) -> Path:
    """An adapter of `dense_source` in PEFT's format."""
    adapters = AdapterMap(read_architecture(dense_source), Lora(16, 16.0))
    tensors = {name: torch.ones(shape) for name, shape in adapters.hf_shapes().items()}
    directory = tmp_path_factory.mktemp("adapter")
    write_adapter(adapters, tensors, directory, base="a model")
    return directory


def make(family: str, directory: Path) -> Path:
    import transformers

    kind, settings = FAMILIES[family]
    config = getattr(transformers, kind)(**settings)
    return save(transformers.AutoModelForCausalLM.from_config, config, directory)
