"""The Triton row kernels: in the interpreter against torch's, compiled for a GPU, and chosen on one only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mcore_rl.parallel.head import rows
from mcore_rl.parallel.head.passes import row_kernels
from tests.sources import ROOT

pytest.importorskip("triton", reason="Triton is not installed: no wheel for this platform")
pytestmark = pytest.mark.timeout(300)

FLOAT32_BOUND = 1e-6
"""as torch's own kernels; everything after the logits is float32, so for bf16 ones too"""


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("interpreted.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script], env=environment, timeout=280, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_interpreted_they_equal_torch(interpreted) -> None:
    """Statistics and gradients: no row and no column, blocks cut short, logits around 1e4."""
    errors = interpreted["tiles"]
    assert len(errors) == 2 * 3 * 3 + 4 * 3
    assert {case: error for case, error in errors.items() if error > FLOAT32_BOUND} == {}


@pytest.mark.slow
def test_the_comparison_sees_a_difference(interpreted) -> None:
    """Negative control: another temperature, target, loss or cap."""
    assert len(interpreted["controls"]) == 4
    assert min(interpreted["controls"].values()) > 100 * FLOAT32_BOUND


@pytest.mark.slow
def test_the_head_through_them_equals_the_dense_reference(interpreted) -> None:
    assert interpreted["heads"].keys() == {"recomputed", "fused"}
    assert max(interpreted["heads"].values()) < FLOAT32_BOUND


def test_they_compile_for_a_gpu_and_stay_in_its_registers(tmp_path, monkeypatch) -> None:
    """For compute capability 9.0 (H100), without a GPU: the interpreter forgives what a compiler does not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name, types in {
        "_statistics": {"stats": "*fp32", "rows": "i32"},
        "_gradient": dict.fromkeys(("top", "log_total", "a", "level", "slope"), "*fp32")
        | {"out": "*bf16", "out_stride": "i64"},
    }.items():
        assert "STACK:0 " in resource_usage(name, types, tmp_path)


def resource_usage(name: str, types: dict[str, str], directory: Path) -> str:
    """What cuobjdump says of the compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mcore_rl.parallel.head import triton_rows

    kernel = getattr(triton_rows, name)
    constants = {"has_slope": True, "is_capped": True, "block": triton_rows.BLOCK}
    known = {
        "logits": "*fp32",
        "scale": "fp32",
        "cap": "fp32",
        "local": "*i64",
        "live": "i32",
        "row_stride": "i64",
    }
    known |= types
    source = ASTSource(
        kernel,
        {argument: known.get(argument, "constexpr") for argument in kernel.arg_names},
        {argument: constants[argument] for argument in kernel.arg_names if argument in constants},
    )
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": triton_rows.WARPS})
    binary = directory / f"{name}.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", binary]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("device", "dtype", "name"),
    [
        ("cuda", torch.float32, "triton_rows"),
        ("cuda", torch.bfloat16, "triton_rows"),
        ("cuda", torch.float64, "rows"),
        ("cpu", torch.float32, "rows"),
    ],
)
def test_a_gpu_gets_them_where_their_precision_suffices(device: str, dtype: torch.dtype, name: str) -> None:
    assert row_kernels(torch.device(device), dtype).__name__.split(".")[-1] == name


@pytest.mark.slow
def test_nothing_imports_triton_for_a_cpu() -> None:
    """In a process that scores on a CPU and has not Megatron or dynamo beside it."""
    code = (
        "import sys, torch; from mcore_rl.parallel.head import Call, log_prob_entropy as f;"
        "w = torch.ones(4, 3); f(torch.ones(2, 3), w, Call.of(w, torch.tensor([0, 1])));"
        "print('triton' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, timeout=100, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
    assert row_kernels(torch.device("cpu"), torch.float32) is rows
