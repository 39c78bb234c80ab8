"""A training step on a GPU: bf16 against float32, FP8 against bf16, Transformer Engine against portable.

Errors are relative to the largest entry of the float32 (or bf16) gradient, and absolute for log-probs. The
tolerances are bounds set beforehand from the formats, not fitted: bf16 has 8 bits, e4m3 4 and e5m2 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mcore_rl.errors import ConfigError
from mcore_rl.model import precision as machine
from mcore_rl.model import spec
from mcore_rl.model.build import build_policy
from mcore_rl.model.optimizer import build_optimizer, ddp_config
from mcore_rl.model.precision import check_fp8
from mcore_rl.model.step import forward, forward_backward
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.precision import RECIPES, Fp8, token_multiple
from mcore_rl.training.batch import Batching, align_of, pack_share
from mcore_rl.training.supervised import NegativeLogLikelihood
from mcore_rl.types import PackedBatch
from tests.gpu.conftest import SIZES
from tests.model.support import TokenSequence

BF16_GRADIENT, FP8_GRADIENT = 0.05, 0.25
BF16_LOG_PROB, FP8_LOG_PROB = 0.05, 0.5
TEMPERATURE = 1.0

engine = pytest.mark.usefixtures("engine")


def sequences() -> list[TokenSequence]:
    rng = np.random.default_rng(7)
    lengths = rng.integers(5, 60, size=12)
    return [TokenSequence((1, 2), rng.integers(SIZES["vocab_size"], size=n).tolist()) for n in lengths]


def batches_of(mesh: Mesh, precision: str, recipe: str) -> list[PackedBatch]:
    scored = sequences()
    weight = [1.0 / sum(s.scored for s in scored)] * len(scored)
    order = [np.arange(s.scored) + 1000 * i for i, s in enumerate(scored)]
    align = align_of(mesh, token_multiple(precision, recipe))
    shape = Batching(1, 4096, 64, lambda lengths: np.asarray(lengths, float), align)
    return pack_share(scored, {"weight": weight, "order": order}, shape, mesh)


def step(
    directory: Path, mesh: Mesh, precision: str, fp8: Fp8 | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """([R] log-probs, gradients by canonical name) of one pass; the optimizer takes its step too."""
    fp8 = fp8 or Fp8()
    ddp = ddp_config(fp8_param_gather=precision == "fp8" and fp8.param_gather)
    model = build_policy(directory, mesh, precision=precision, fp8=fp8, ddp=ddp)
    optimizer = build_optimizer(model, lr=1e-4, precision=precision, fp8=fp8)
    batches = batches_of(mesh, precision, fp8.recipe)
    if precision == "fp8" and RECIPES[fp8.recipe].remembers:  # it begins with scales of 1, which fit nothing
        forward_backward(model, batches, NegativeLogLikelihood(), TEMPERATURE)
    rows: dict[int, float] = {}
    for batch, head in forward(model, batches, TEMPERATURE):
        rows |= dict(zip(batch.fields["order"].tolist(), head.log_prob.float().tolist(), strict=True))
    optimizer.zero_grad()
    forward_backward(model, batches, NegativeLogLikelihood(), TEMPERATURE)
    found: dict[str, Any] = global_parameters(model.unwrapped)
    gradients = {name: p.main_grad.float().clone() for name, p in found.items()}
    assert np.isfinite(optimizer.step())
    return torch.tensor([rows[key] for key in sorted(rows)]), gradients


def differences(one: tuple, other: tuple) -> tuple[float, float]:
    """(largest of a log-prob, largest of a gradient relative to the largest of its parameter)."""
    assert one[1].keys() == other[1].keys()
    gradient = max(
        float((one[1][name] - other[1][name]).abs().max() / one[1][name].abs().max()) for name in one[1]
    )
    return float((one[0] - other[0]).abs().max()), gradient


@pytest.fixture(scope="module")
def exact(directory, mesh):
    return step(directory, mesh, "fp32")


@pytest.fixture(scope="module")
def bf16(directory, mesh):
    return step(directory, mesh, "bf16")


def test_bf16_against_float32(exact, bf16) -> None:
    log_prob, gradient = differences(exact, bf16)
    print(f"bf16 against float32: log-prob {log_prob:.2e}, gradient {gradient:.2e}")
    assert 0 < log_prob <= BF16_LOG_PROB
    assert 0 < gradient <= BF16_GRADIENT


@engine
@pytest.mark.filterwarnings(
    "ignore:mxfp8 without using reuse_grad_buf:UserWarning"
)  # of Megatron, about memory
@pytest.mark.parametrize("gather", [False, True], ids=["bf16-weights", "fp8-weights"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_against_bf16(directory, mesh, bf16, recipe: Any, gather: bool) -> None:
    try:
        check_fp8(recipe)
    except ConfigError as error:
        pytest.skip(str(error))
    log_prob, gradient = differences(bf16, step(directory, mesh, "fp8", Fp8(recipe, gather)))
    print(f"{recipe} against bf16: log-prob {log_prob:.2e}, gradient {gradient:.2e}")
    assert 0 < log_prob <= FP8_LOG_PROB
    assert 0 < gradient <= FP8_GRADIENT


@engine
def test_transformer_engine_against_portable_layers(directory, mesh, exact, bf16, monkeypatch) -> None:
    """In bf16, both within the same distance of float32; the portable layers are asked for by hiding it."""
    monkeypatch.setattr(machine, "engine_is_importable", lambda: False)
    portable = step(directory, mesh, "bf16")
    monkeypatch.undo()
    log_prob, gradient = differences(portable, bf16)
    print(f"Transformer Engine against portable: log-prob {log_prob:.2e}, gradient {gradient:.2e}")
    assert 0 < log_prob <= BF16_LOG_PROB
    assert 0 < gradient <= BF16_GRADIENT
    assert differences(exact, portable)[0] <= BF16_LOG_PROB


@engine
def test_the_layers_are_transformer_engines(directory, mesh) -> None:
    model = build_policy(directory, mesh, precision="bf16")
    kinds = {type(module).__name__ for module in model.unwrapped[0].modules()}
    assert "PackedEngineAttention" in kinds
    assert type(model.unwrapped[0].output_layer).__name__ == "LogProbHead"
    assert spec.parts_of(model.config) is not spec.PORTABLE


@engine
def test_its_zig_zag_is_ours() -> None:
    """The tokens of a context-parallel rank: Transformer Engine's own partition of packed sequences."""
    import transformer_engine_torch as tex

    from mcore_rl.parallel.context import local_tokens

    boundaries = torch.tensor([0, 16, 48, 56], dtype=torch.int32)
    for size in (2, 4):
        for rank in range(size):
            theirs = tex.thd_get_partitioned_indices(boundaries.cuda(), 56, size, rank).cpu().long()
            assert torch.equal(theirs, local_tokens(boundaries, size, rank))
