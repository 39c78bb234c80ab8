"""The platform module: every fix is needed, none reaches beyond Megatron-Core."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from mcore_rl import before_megatron
from mcore_rl.model import platform
from mcore_rl.model.portable import _ScaledNorm
from mcore_rl.parallel.pool import Pool
from tests.model.removal import nothing, outcome


def replaced(source: str) -> set[str]:
    """What a module assigns to names of torch.cuda and torch.Tensor."""
    targets = (
        t for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign) for t in node.targets
    )
    names = (ast.unparse(target).split(".") for target in targets)
    return {name[2] for name in names if name[:2] in (["torch", "cuda"], ["torch", "Tensor"])}


def test_the_first_lines_list_what_is_replaced_for_the_whole_process() -> None:
    names = replaced(Path(platform.__file__).read_text())
    assert len(names) > 10
    assert [name for name in sorted(names) if name not in (platform.__doc__ or "")] == []
    assert replaced("torch.cuda.empty_cache = print") == {"empty_cache"}, "the control: it is not listed"
    assert "empty_cache" not in (platform.__doc__ or "")


# --- CUDA ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cuda", "calls"), [(True, 0), (False, 1)])
def test_where_cuda_is_present_nothing_is_changed(monkeypatch, cuda: bool, calls: int) -> None:
    called: list[str] = []
    monkeypatch.setattr(platform, "_installed", False)
    monkeypatch.setattr(platform, "FIXES", (lambda: called.append("fix"),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    platform.install()
    platform.install()
    assert len(called) == calls


# --- imports --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("imported", "loaded"), [("mcore_rl.training.loop", "False"), ("megatron.core", "True")]
)
@pytest.mark.slow
def test_importing_megatron_loads_no_compiler(imported: str, loaded: str) -> None:
    program = f"import sys, {imported}; print('torch._inductor.compile_fx' in sys.modules)"
    words = [sys.executable, "-W", "ignore", "-c", program]
    assert subprocess.run(words, capture_output=True, text=True, check=True, timeout=100).stdout.split() == [
        loaded
    ]


def test_functions_of_others_are_compiled() -> None:
    assert before_megatron.compile_unless_megatron(_double) is not _double
    assert before_megatron.compile_unless_megatron(backend="eager")(_double)(2) == 4


def _double(x: int) -> int:
    return 2 * x


# --- beyond Megatron-Core ---------------------------------------------------------------------------------

FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")


def logits_and_factories(directory: Path) -> tuple[torch.Tensor, list[bool]]:
    """What transformers computes in a process with the platform; which of torch's factories are its own."""
    from transformers import Qwen3ForCausalLM

    before = [getattr(torch, name) for name in FACTORIES]
    platform.install()
    unchanged = [getattr(torch, name) is one for name, one in zip(FACTORIES, before, strict=True)]
    with torch.no_grad():
        return Qwen3ForCausalLM.from_pretrained(directory)(torch.arange(20)[None]).logits, unchanged


def test_transformers_is_left_alone(pool1: Pool, dense_dir: Path) -> None:
    from transformers import Qwen3ForCausalLM

    with torch.no_grad():
        expected = Qwen3ForCausalLM.from_pretrained(dense_dir)(torch.arange(20)[None]).logits
    ((logits, unchanged),) = pool1.run(logits_and_factories, dense_dir)
    assert torch.equal(logits, expected)
    assert all(unchanged)


def test_literals_are_redirected_inside_megatron_only(pool1: Pool) -> None:
    inside, outside = pool1.run(device_of_a_literal)[0]
    assert inside == "cpu"
    assert outside != "cpu"


def device_of_a_literal() -> tuple[str, str]:
    platform.install()
    from megatron.core.pipeline_parallel import schedules

    inside = schedules.torch.zeros(1, device="cuda", pin_memory=True)
    try:
        outside = str(torch.zeros(1, device="cuda").device)
    except (AssertionError, RuntimeError) as error:
        outside = str(error)
    return str(inside.device), outside


# --- every fix is needed ----------------------------------------------------------------------------------

NEEDS = {
    "redirect_literal_devices": "pp2",
    "answer_current_device": "pp2",
    "keep_tensors_on_cpu": "pp2:tied",
    "skip_synchronize": "pp2",
    "use_cpu_generator": "pp2",
    "name_cuda_types": "pp2",
    "null_streams": "ep2",
    "list_splits_on_host": "ep2",
}
"""fix -> a case of `verify layouts` that cannot run without it"""


def remove(name: str) -> None:
    platform.FIXES = tuple(fix for fix in platform.FIXES if fix.__name__ != name)


def test_every_fix_is_listed() -> None:
    assert set(NEEDS) == {fix.__name__ for fix in platform.FIXES}


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(set(NEEDS.values())))
def test_nothing_fails_with_all_fixes(case: str, tmp_path: Path) -> None:
    assert outcome(nothing, case, tmp_path).finished


@pytest.mark.slow
@pytest.mark.parametrize("fix", NEEDS)
def test_without_a_fix_something_fails(fix: str, tmp_path: Path) -> None:
    ended = outcome(partial(remove, fix), NEEDS[fix], tmp_path)
    assert not ended.finished
    assert "Error" in ended.words


def test_the_gradient_of_a_swiglu_is_that_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up = (20 * torch.randn(3, 5, 14, generator=generator, dtype=torch.float64)).requires_grad_()
    gate, up = gate_up.chunk(2, -1)
    out = torch.nn.functional.silu(gate) * up
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(out, gate_up, grad)
    torch.testing.assert_close(platform.swiglu_gradient(grad, gate_up.detach()), expected, rtol=1e-12, atol=0)
    single = platform.swiglu_gradient(grad.float(), gate_up.detach().float())
    torch.testing.assert_close(single.double(), expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_norm_and_its_gradients_are_those_of_autograd(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(4, 1, 32, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(32, generator=generator).to(dtype)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    found = _ScaledNorm.apply(*leaves, 1e-5)
    wide = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = wide[1] * torch.nn.functional.rms_norm(wide[0], (32,), eps=1e-5)
    limit = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype]
    gradients = torch.autograd.grad(expected, wide, grad.double())
    given = (found, *torch.autograd.grad(found, leaves, grad))
    for one, other in zip(given, (expected, *gradients), strict=True):
        assert one.dtype == dtype
        apart = (one.double() - other).detach().abs().max() / other.detach().abs().max()
        assert float(apart) < limit
