"""Megatron's fast paths on a GPU against the plain forms: dense, and a mixture."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from mcore_rl.model import build, fusions, spec
from mcore_rl.parallel.mesh import Mesh
from tests.gpu.conftest import SIZES
from tests.gpu.test_step import BF16_GRADIENT, BF16_LOG_PROB, differences, step
from tests.model.conftest import save

pytestmark = pytest.mark.usefixtures("engine")

MIXTURE = {"moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.Qwen3MoeConfig(**SIZES | MIXTURE)
    return save(transformers.AutoModelForCausalLM.from_config, config, tmp_path_factory.mktemp("mixture"))


@pytest.mark.parametrize("kind", ["directory", "mixture"])
def test_they_give_the_numbers_of_the_plain_forms(
    kind: str, mesh: Mesh, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = request.getfixturevalue(kind)
    fast = step(where, mesh, "bf16")
    settings = fusions.fast_settings
    monkeypatch.setattr(
        spec, "fast_settings", lambda arch, engine, fp8: settings(arch, engine=False, fp8=fp8)
    )
    monkeypatch.setattr(build, "fuse_weight_gradients", lambda chunk: 0)
    log_prob, gradient = differences(step(where, mesh, "bf16"), fast)
    print(f"{kind}: fast paths against plain forms: log-prob {log_prob:.2e}, gradient {gradient:.2e}")
    assert 0 < log_prob <= BF16_LOG_PROB
    assert 0 < gradient <= BF16_GRADIENT
