"""A tiny Qwen3 and a tiny Qwen3-MoE as transformers makes them, and one process with Megatron-Core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model.support import DENSE, MOE


@pytest.fixture(scope="session")
def dense_dir(tmp_path_factory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return save(Qwen3ForCausalLM, Qwen3Config(**DENSE), tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="session")
def moe_dir(tmp_path_factory) -> Path:
    """Its second layer is dense."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return save(Qwen3MoeForCausalLM, Qwen3MoeConfig(**MOE), tmp_path_factory.mktemp("moe") / "model")


def save(kind, config, directory: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(
                ("bias", "sinks")
            ):  # all ones or zeros: one not loaded would not be seen
                parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.add_(0.3 * torch.randn_like(buffer))
    model.save_pretrained(directory)
    return directory
