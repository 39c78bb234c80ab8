"""Stage 1 of tools/gpu_check.sh: the head on one GPU. Needs torch and triton alone; Megatron is not imported.

    python -m benchmarks.gpu_head [--rehearse] [--out benchmarks]

Log-probs, entropies and gradients against float64, with a control; Triton's row kernels against torch's; and
time and memory beside the GEMMs alone, by turns in one process: of the fused and the recomputing form, of
torch.compile's form of the whole logits, and of Liger's cross entropy (log-probs alone, one weight for all
rows) where that package can be imported. Writes OUT/gpu_head_DATE.json after every measurement. The goals
are in GOALS; the exit code is 1 where something failed or missed its goal on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

try:
    import jaxtyping as _shapes
except ModuleNotFoundError:  # annotations alone want it, and a GPU machine may lack it
    _shapes = ModuleType("jaxtyping")
    _shapes.__dict__.update(Float=None, Int=None)
    sys.modules["jaxtyping"] = _shapes

from benchmarks.gpu_record import CUDA, DEVICE, MIB, Record, arguments, compared, extra_mib, milliseconds
from mcore_rl.parallel.head import Call, HeadOutput, dense_log_prob_entropy, head_loss, log_prob_entropy
from mcore_rl.parallel.head.passes import row_kernels

SHAPES = ((8192, 8192, 16032), (4096, 5120, 151936 // 8))
"""rows, hidden, vocabulary of one rank: Llama-3-70B and Qwen3-32B at TP 8"""
TINY = ((64, 32, 512), (32, 48, 300))
TEMPERATURE = 0.9
GOALS = {"fused": 1.25, "mib": 192.0, "log_prob": 2e-5, "entropy": 2e-5, "gradient": 4e-3}
"""of the first shape: time over three GEMMs, MiB beside the gradients; largest errors against float64"""


class Problem:
    """bf16 hidden states and weight with an fp32 main_grad, and the loss's coefficients."""

    def __init__(self, rows: int, hidden: int, vocab: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)
        place: dict[str, Any] = {"generator": generator, "device": DEVICE}
        self.hidden = torch.randn(rows, hidden, dtype=torch.bfloat16, **place).requires_grad_()
        self.weight: Any = (torch.randn(vocab, hidden, **place) * 3 / hidden**0.5).bfloat16().requires_grad_()
        self.weight.main_grad = torch.zeros(vocab, hidden, device=DEVICE)
        self.targets = torch.randint(vocab, (rows,), **place)
        self.a, self.b = torch.randn(2, rows, **place)
        self.call = Call.of(self.weight, self.targets, TEMPERATURE)

    def loss(self, rows: slice, out: HeadOutput) -> Tensor:
        """Another coefficient for every row, as in reinforcement learning."""
        return (self.a[rows] * out.log_prob).sum() + (self.b[rows] * out.entropy).sum()

    def train(self) -> Tensor:
        """Fused mode; dL/dhidden."""
        total = head_loss(self.hidden, self.weight, self.call, self.loss)
        return torch.autograd.grad(total, (self.hidden, self.weight))[0]

    def hidden_gradient(self) -> Tensor:
        """What `train` gives, where the weight wants no gradient."""
        total = head_loss(self.hidden, self.weight, self.call, self.loss)
        return torch.autograd.grad(total, self.hidden)[0]

    def recompute(self) -> Tensor:
        """Recompute mode; dL/dhidden."""
        out = log_prob_entropy(self.hidden, self.weight, self.call)
        return torch.autograd.grad(self.loss(slice(None), out), (self.hidden, self.weight))[0]

    @torch.no_grad()
    def score(self) -> HeadOutput:
        """Log-probs and entropies alone."""
        return log_prob_entropy(self.hidden, self.weight, self.call)

    def gemms(self, count: int) -> Callable[[], None]:
        """The first `count` of: logits, logits again, dL/dhidden, dL/dweight (3: without the second)."""
        h, w = self.hidden.detach(), self.weight.detach()
        logits = h.new_empty(len(h), len(w))
        dh, dw = torch.empty_like(h), torch.empty_like(w)

        def run() -> None:
            for _ in range(2 if count == 4 else 1):
                torch.mm(h, w.T, out=logits)
            if count > 1:
                torch.mm(logits, w, out=dh)
                torch.mm(logits.T, h, out=dw)

        return run


def errors(problem: Problem, temperature: float = TEMPERATURE, some: int = 256) -> dict[str, float]:
    """Against float64 on the first rows; the gradient is that in the hidden states, by norm."""
    rows = slice(0, some)
    hidden = problem.hidden.detach()[rows].double().requires_grad_()
    weight = problem.weight.detach().double()
    exact = dense_log_prob_entropy(hidden, weight, problem.targets[rows], temperature)
    (gradient,) = torch.autograd.grad(problem.loss(rows, exact), hidden)
    scored, exact = problem.score(), HeadOutput(*(x.detach() for x in exact))
    return {
        "log_prob": float((scored.log_prob[rows] - exact.log_prob).abs().max()),
        "entropy": float((scored.entropy[rows] - exact.entropy).abs().max()),
        "gradient": float((problem.train()[rows].double() - gradient).norm() / gradient.norm()),
    }


def kernels(problem: Problem) -> dict[str, Any]:
    """Which row kernels run, and the largest relative difference of their statistics to torch's."""
    from mcore_rl.parallel.head import rows

    logits = (problem.hidden.detach() @ problem.weight.detach().T).float()
    taken = row_kernels(logits.device, logits.dtype)
    one, other = (module.shard_statistics(logits, problem.targets, 1.0) for module in (taken, rows))
    return {
        "module": taken.__name__.rpartition(".")[2],
        "difference": float(((one - other) / other).abs().max()),
    }


def compiled(problem: Problem) -> Callable[[], object]:
    """The whole logits, log-softmax in float32 and autograd, under torch.compile."""

    def naive(hidden: Tensor, weight: Tensor) -> Tensor:
        log_p = torch.log_softmax((hidden @ weight.T).float() / TEMPERATURE, dim=-1)
        chosen = log_p.gather(1, problem.targets[:, None]).squeeze(1)
        return (problem.a * chosen).sum() - (problem.b * (log_p.exp() * log_p).sum(-1)).sum()

    # A rehearsal need not wait for a C++ compiler.
    run: Any = torch.compile(naive, backend="inductor" if CUDA else "eager")
    inputs = (problem.hidden, problem.weight)
    return lambda: torch.autograd.grad(run(*inputs), inputs)


def liger(problem: Problem) -> Callable[[], object]:
    """Liger's fused linear cross entropy, of one weight for all rows and without entropies."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

    loss: Any = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    inputs = (problem.hidden, problem.weight)
    return lambda: torch.autograd.grad(loss(problem.weight, problem.hidden, problem.targets), inputs)


def times(record: Record, shape: tuple[int, int, int], repeats: int) -> None:
    """Time and memory of every form at one shape."""
    problem, name = Problem(*shape), "x".join(map(str, shape))
    flops = 2 * shape[0] * shape[1] * shape[2]
    for form, run, count in (
        ("fused", problem.train, 3),
        ("recompute", problem.recompute, 4),
        ("score", problem.score, 1),
    ):

        def ours(run: Callable[[], object] = run, count: int = count) -> dict[str, Any]:
            found: dict[str, Any] = compared(run, problem.gemms(count), repeats)
            found["gemm_tflops"] = round(count * flops / found["gemms_ms"] / 1e9, 2)
            found["mib"] = extra_mib(run)
            return found

        record.measure(f"{name} {form}", ours)
    record.measure(f"{name} MiB beside dL/dhidden", lambda: beside(problem))
    others: dict[str, Callable[[Problem], Callable[[], object]]] = {"torch.compile": compiled}
    if CUDA and find_spec("liger_kernel") is not None:
        others["Liger"] = liger
    else:
        record.skip(f"{name} Liger", "liger_kernel is not installed, or there is no GPU")
    for form, build in others.items():

        def theirs(build: Callable[[Problem], Callable[[], object]] = build) -> dict[str, Any]:
            run = build(problem)
            return {**compared(run, problem.gemms(3), repeats), "mib": extra_mib(run)}

        record.measure(f"{name} {form}", theirs)


def beside(problem: Problem) -> float | None:
    """Extra memory of the fused form beside dL/dhidden, and without autograd's dummy of the weight."""
    problem.weight.requires_grad_(False)
    try:
        extra = extra_mib(problem.hidden_gradient)
    finally:
        problem.weight.requires_grad_()
    return None if extra is None else round(extra - problem.hidden.nbytes / MIB, 1)


def missed(record: Record, shape: tuple[int, int, int]) -> list[str]:
    """Goals that the measurements of the first shape do not meet."""
    name, found = "x".join(map(str, shape)), record.found["measured"]
    measured = dict(found.get("against float64") or {})
    measured["fused"] = found.get(f"{name} fused", {}).get("ratio")
    measured["mib"] = found.get(f"{name} MiB beside dL/dhidden")
    return [
        f"{key} {measured[key]} above {goal}"
        for key, goal in GOALS.items()
        if measured.get(key) is not None and measured[key] > goal
    ]


def main() -> int:
    """Measure everything: 1 where something failed, or missed its goal on a GPU."""
    a = arguments(__doc__ or "").parse_args()
    shapes, repeats = (TINY, 2) if a.rehearse else (SHAPES, 20)
    record = Record("head", a.out, rehearsal=a.rehearse)
    first = Problem(*shapes[0])
    record.measure("against float64", lambda: errors(first))
    record.measure("control: at another temperature", lambda: errors(first, TEMPERATURE + 1e-3)["log_prob"])
    record.measure("row kernels", lambda: kernels(first))
    record.measure("launch and wait, ms", lambda: round(milliseconds(lambda: first.a + first.b), 4))
    del first
    for shape in shapes:
        times(record, shape, repeats)
    record.found["missed"] = missed(record, shapes[0]) if CUDA and not a.rehearse else []
    record.measure("imported Megatron", lambda: any(name.startswith("megatron") for name in sys.modules))
    print(record.path)
    return int(bool(record.failed or record.found["missed"]))


if __name__ == "__main__":
    sys.exit(main())
