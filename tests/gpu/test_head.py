"""The head on one GPU, at the shape of a 70B model's shard of 8: against cuBLAS alone, by CUDA events.

Run with `python -m pytest -m gpu tests/gpu` on an idle GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_head import SHAPES, TEMPERATURE, Problem
from benchmarks.gpu_record import MIB, extra_mib, milliseconds
from mcore_rl.parallel.head import HeadOutput, dense_log_prob_entropy, head_loss
from mcore_rl.parallel.head.passes import row_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the head is not measured"),
]


@pytest.fixture(scope="module")
def problem() -> Problem:
    case = Problem(*SHAPES[0])
    assert row_kernels(case.hidden.device, torch.float32).__name__.endswith("triton_rows")
    return case


def ratio(run: Callable[[], object], alone: Callable[[], object]) -> float:
    """The median of 20 times after 5, by turns."""
    pairs = [(milliseconds(run), milliseconds(alone)) for _ in range(25)][5:]
    return median(ours / theirs for ours, theirs in pairs)


def mib(run: Callable[[], object]) -> float:
    measured = extra_mib(run)
    assert measured is not None
    return measured


@pytest.mark.parametrize(
    ("name", "count", "limit"), [("train", 3, 1.10), ("recompute", 4, 1.10), ("score", 1, 1.08)]
)
def test_time_over_the_gemms_alone(problem: Problem, name: str, count: int, limit: float) -> None:
    measured = ratio(getattr(problem, name), problem.gemms(count))
    print(f"{name}: {measured:.3f} x {count} GEMMs on {torch.cuda.get_device_name()}")
    assert measured <= limit


def test_memory_beside_the_gradients(problem: Problem) -> None:
    """Tiles of logits and their gradients; then autograd's dummy for the weight, when those are gone."""
    gradient, dummy = problem.hidden.nbytes / MIB, problem.weight.nbytes / MIB
    assert mib(problem.score) <= 192
    assert mib(problem.train) - gradient <= max(192, dummy + 1)
    problem.weight.requires_grad_(False)
    try:
        assert mib(problem.hidden_gradient) - gradient <= 192
    finally:
        problem.weight.requires_grad_()


def test_numbers_against_float64(problem: Problem) -> None:
    """bf16 products accumulate in float32: log-probs are off by 2e-5, gradients by bf16's rounding."""
    some = slice(0, 256)
    hidden = problem.hidden.detach()[some].double().requires_grad_()
    weight = problem.weight.detach().double()
    expected = dense_log_prob_entropy(hidden, weight, problem.targets[some], TEMPERATURE)
    (gradient,) = torch.autograd.grad(problem.loss(some, expected), hidden)
    scored = problem.score()
    assert (scored.log_prob[some] - expected.log_prob).abs().max() <= 2e-5
    assert (scored.entropy[some] - expected.entropy).abs().max() <= 2e-5
    error = (problem.train()[some].double() - gradient).norm() / gradient.norm()
    assert error <= 4e-3
    wrong = dense_log_prob_entropy(hidden, weight, problem.targets[some], TEMPERATURE + 1e-3)
    assert (scored.log_prob[some] - wrong.log_prob).abs().max() > 2e-5


def test_the_same_bits_at_every_run_and_in_every_pass(problem: Problem) -> None:
    seen: list[HeadOutput] = []

    def gradients() -> tuple[Tensor, Tensor]:
        problem.weight.main_grad.zero_()
        return problem.train(), problem.weight.main_grad.clone()

    def recorded(rows: slice, out: HeadOutput) -> Tensor:
        seen.append(HeadOutput(*(x.detach().clone() for x in out)))
        return problem.loss(rows, out)

    first, second = gradients(), gradients()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    total = head_loss(problem.hidden, problem.weight, problem.call, recorded)
    torch.autograd.grad(total, problem.hidden)
    current = HeadOutput(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
    for one, other in zip(current, problem.score(), strict=True):
        assert torch.equal(one, other)
