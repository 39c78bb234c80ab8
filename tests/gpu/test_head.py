"""The head on one GPU, at the shape of a 70B model's shard of 8: against cuBLAS alone, by CUDA events.

Run with `python -m pytest -m gpu tests/gpu` on an idle GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import pytest
import torch
from torch import Tensor

from mcore_rl.parallel.head import Call, HeadOutput, dense_log_prob_entropy, head_loss, log_prob_entropy
from mcore_rl.parallel.head.passes import row_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the head is not measured"),
]

ROWS, HIDDEN, VOCAB = 8192, 8192, 16032
MIB = 1 << 20
TEMPERATURE = 0.9


class Problem:
    """bf16 hidden states and weight with an fp32 main_grad, and the loss's coefficients."""

    def __init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        place = {"generator": generator, "device": "cuda"}
        self.hidden = torch.randn(ROWS, HIDDEN, dtype=torch.bfloat16, **place).requires_grad_()
        self.weight = (torch.randn(VOCAB, HIDDEN, **place) * 3 / HIDDEN**0.5).bfloat16().requires_grad_()
        self.weight.main_grad = torch.zeros(VOCAB, HIDDEN, device="cuda")
        self.targets = torch.randint(VOCAB, (ROWS,), **place)
        self.a, self.b = torch.randn(2, ROWS, **place)
        self.call = Call.of(self.weight, self.targets, TEMPERATURE)

    def loss(self, rows: slice, out: HeadOutput) -> Tensor:
        return (self.a[rows] * out.log_prob).sum() + (self.b[rows] * out.entropy).sum()

    def train(self) -> Tensor:
        """Fused mode; dL/dhidden."""
        total = head_loss(self.hidden, self.weight, self.call, self.loss)
        return torch.autograd.grad(total, (self.hidden, self.weight))[0]

    def hidden_gradient(self) -> Tensor:
        """As `train`, where the weight wants none."""
        total = head_loss(self.hidden, self.weight, self.call, self.loss)
        return torch.autograd.grad(total, self.hidden)[0]

    def recompute(self) -> Tensor:
        """Recompute mode; dL/dhidden."""
        out = log_prob_entropy(self.hidden, self.weight, self.call)
        return torch.autograd.grad(self.loss(slice(None), out), (self.hidden, self.weight))[0]

    @torch.no_grad()
    def score(self) -> HeadOutput:
        return log_prob_entropy(self.hidden, self.weight, self.call)

    def gemms(self, count: int) -> Callable[[], None]:
        """The first `count` of: logits, logits again, dL/dhidden, dL/dweight (3: without the second)."""
        h, w = self.hidden.detach(), self.weight.detach()
        logits = h.new_empty(ROWS, VOCAB)
        dh, dw = torch.empty_like(h), torch.empty_like(w)

        def run() -> None:
            for _ in range(2 if count == 4 else 1):
                torch.mm(h, w.T, out=logits)
            if count > 1:
                torch.mm(logits, w, out=dh)
                torch.mm(logits.T, h, out=dw)

        return run


@pytest.fixture(scope="module")
def problem() -> Problem:
    case = Problem()
    assert row_kernels(case.hidden.device, torch.float32).__name__.endswith("triton_rows")
    return case


def milliseconds(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def ratio(run: Callable[[], object], alone: Callable[[], object]) -> float:
    """Of the times, by turns: the median of 20 after 5."""
    pairs = [(milliseconds(run), milliseconds(alone)) for _ in range(25)][5:]
    return median(ours / theirs for ours, theirs in pairs)


def extra_mib(run: Callable[[], object]) -> float:
    """The peak above what was allocated before, after a first run that fills cuBLAS's workspace."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


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
    assert extra_mib(problem.score) <= 192
    assert extra_mib(problem.train) - gradient <= max(192, dummy + 1)
    problem.weight.requires_grad_(False)
    try:
        assert extra_mib(problem.hidden_gradient) - gradient <= 192
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
