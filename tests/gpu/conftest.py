"""Tests that need a GPU. One process, one GPU; each skip says what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mcore_rl.model import platform
from mcore_rl.model.precision import engine_is_importable
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh, build_mesh, destroy_mesh
from tests.model.conftest import save

SIZES = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
}
"""every matrix is whole blocks of 128 x 128"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch finds none"))


@pytest.fixture(scope="session")
def engine() -> None:
    if not engine_is_importable():
        pytest.skip("needs Transformer Engine: tools/gpu_machine.sh")


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    config = transformers.Qwen3Config(**SIZES)
    return save(transformers.AutoModelForCausalLM.from_config, config, tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="session")
def mesh() -> Iterator[Mesh]:
    """One rank over NCCL, which meets nobody."""
    platform.install()
    torch.backends.cuda.matmul.allow_tf32 = False
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(platform.backend(), store=store, rank=0, world_size=1)
    try:
        yield build_mesh(Layout(), timeout=60.0)
        destroy_mesh()
    finally:
        torch.distributed.destroy_process_group()
