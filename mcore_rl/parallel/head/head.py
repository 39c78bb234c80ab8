"""The vocab-parallel head: hidden rows x lm_head shard -> log-prob and entropy, never holding the logits.

Every rank of the tensor-parallel group owns the rows [start, start + V_local) of the lm_head. A row's logits
are reduced to four numbers per rank, exchanged in ONE all-gather and merged. Gradients come in two modes:

- `log_prob_entropy`, recompute mode, four GEMMs: the backward pass computes the logits again. For any loss.
- `head_loss`, fused mode, three GEMMs: the loss is asked inside the backward pass, chunk by chunk, while the
  logits are there. For losses whose derivative at a row follows from that row's own log-prob and entropy.

Both need one reduction of the hidden gradient, which runs beside the last GEMM for the weight's.

Legend: R rows, H hidden, T tokens, V vocabulary, V_local rows of this rank's shard (padding at the end of the
last shards). With z = logits / temperature, p = softmax(z), entropy = -sum p log p, a = dL/dlog_prob and b =
dL/dentropy:

    dL/dz = a (onehot - p) - b p (log p + entropy)

Source: Megatron-LM's vocab-parallel cross entropy (arXiv 1909.08053, section 3) for the exchange of max and
sum; the entropy term by differentiating -sum p log p.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mcore_rl.parallel.head.passes import (
    Call,
    Differentiate,
    begin_gather,
    begin_reduction,
    gather_statistics,
    gradients,
    row_kernels,
    scored_hidden,
    statistics,
    statistics_of,
    weight_grad,
)
from mcore_rl.parallel.head.rows import RowTerms, accumulate_dtype, merge_statistics


class HeadOutput(NamedTuple):
    """Per scored row; float32, or float64 when the hidden states are."""

    log_prob: Float[Tensor, " R"]
    """log p(target) at the temperature"""
    entropy: Float[Tensor, " R"]
    """entropy of the distribution at the temperature, in nats"""

    @property
    def device(self) -> torch.device:
        """The device of both; Megatron's schedules ask a model with experts for that of its output."""
        return self.log_prob.device


RowLoss = Callable[[slice, HeadOutput], Tensor]
"""(some of the rows, their log-probs and entropies) -> the sum of their losses, differentiable in both"""


def dense_log_prob_entropy(
    hidden: Float[Tensor, "R H"],
    weight: Float[Tensor, "V H"],
    targets: Int[Tensor, " R"],
    temperature: float = 1.0,
    cap: float | None = None,
) -> HeadOutput:
    """The reference on one rank, for tests: materialises [R, V] logits and leaves the rest to autograd."""
    logits = hidden @ weight.T
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    log_prob = log_p.gather(-1, targets[:, None]).squeeze(-1)
    return HeadOutput(log_prob, -(log_p.exp() * log_p).sum(-1))


def log_prob_entropy(
    hidden: Float[Tensor, "T_local H"], weight: Float[Tensor, "V_local H"], call: Call
) -> HeadOutput:
    """Log-prob of the targets and full-vocabulary entropy, vocab-parallel; differentiable in both tensors.

    Args:
        hidden: the last hidden states, equal on every rank of the group, or this rank's T / ranks of them
            under sequence parallelism.
        weight: this rank's lm_head rows; the padding behind the last token takes no part.
        call: what is scored, and how the vocabulary is cut; `Call.of` builds it.

    A weight that Megatron's DDP owns (it has `main_grad`) gets its gradient added there directly; see
    `head_passes.weight_grad`.
    """
    return HeadOutput(*_LogProbEntropy.apply(hidden, weight, call))


def head_loss(
    hidden: Float[Tensor, "T_local H"], weight: Float[Tensor, "V_local H"], call: Call, loss: RowLoss
) -> Float[Tensor, ""]:
    """A scalar whose backward pass adds the gradient of sum(loss), times the gradient it receives.

    Its own value is 0: the log-probs are known to the backward pass only, and `loss` is told them there, once
    for every row, wave after wave (once with no row where there is none). A caller that wants the loss or
    metrics of it keeps them from that call.

    Args:
        loss: a pure sum over rows, so that it may be asked for any part of them. Every rank of the group must
            answer the same.

    The others are those of `log_prob_entropy`.
    """
    return _HeadLoss.apply(hidden, weight, call, loss)  # type: ignore[return-value]


class _LogProbEntropy(torch.autograd.Function):
    """Recompute mode."""

    @staticmethod
    def forward(ctx, hidden, weight, call: Call):
        ctx.set_materialize_grads(False)
        scored = scored_hidden(hidden, call)
        gathered = gather_statistics(statistics(scored, weight, call), call.shard.group)
        log_prob, entropy, top, log_total = merge_statistics(gathered, call.scale)
        ctx.save_for_backward(scored, weight, top, log_total, entropy)
        ctx.call, ctx.tokens = call, len(hidden)
        return log_prob, entropy

    @staticmethod
    def backward(ctx, grad_log_prob, grad_entropy):  # pyright: ignore[reportIncompatibleMethodOverride]
        scored, weight, top, log_total, entropy = ctx.saved_tensors
        grad_log_prob = torch.zeros_like(top) if grad_log_prob is None else grad_log_prob

        def differentiate(rows: slice, logits: Tensor) -> Callable[[Tensor], None]:
            slope = None if grad_entropy is None else grad_entropy[rows]
            terms = RowTerms(top[rows], log_total[rows], entropy[rows], grad_log_prob[rows], slope)
            return lambda out: _write_gradient(logits, ctx.call, rows, terms, out)

        return *_backward(ctx, scored, weight, differentiate), None


class _HeadLoss(torch.autograd.Function):
    """Fused mode."""

    @staticmethod
    def forward(ctx, hidden, weight, call: Call, loss: RowLoss):
        ctx.save_for_backward(hidden, weight)
        ctx.call, ctx.loss, ctx.tokens = call, loss, len(hidden)
        return hidden.new_zeros((), dtype=accumulate_dtype(hidden.dtype))

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight = ctx.saved_tensors
        call, loss = ctx.call, ctx.loss
        scored = scored_hidden(hidden, call)

        def differentiate(rows: slice, logits: Tensor) -> Callable[[Tensor], None]:
            gathered = begin_gather(statistics_of(logits, call, rows), call.shard.group)

            def write(out: Tensor) -> None:
                log_prob, entropy, top, log_total = merge_statistics(gathered(), call.scale)
                a, b = _derivatives(loss, rows, HeadOutput(log_prob, entropy))
                terms = RowTerms(top, log_total, entropy, a * grad, None if b is None else b * grad)
                _write_gradient(logits, call, rows, terms, out)

            return write

        if len(scored) == 0:
            none = scored.new_zeros(0, dtype=grad.dtype)
            _derivatives(loss, slice(0, 0), HeadOutput(none, none.clone()))
        return *_backward(ctx, scored, weight, differentiate), None, None


def _backward(ctx, scored, weight, differentiate: Differentiate) -> tuple[Tensor | None, Tensor | None]:
    need_hidden, need_weight = ctx.needs_input_grad[:2]

    def begin(grad_rows: Tensor) -> Callable[[], Tensor]:
        return begin_reduction(grad_rows, ctx.tokens, ctx.call)

    hidden_grad, total = gradients(
        scored, weight, ctx.call, differentiate, begin if need_hidden else None, need_weight
    )
    return hidden_grad, weight_grad(weight, total)


def _write_gradient(logits: Tensor, call: Call, rows: slice, terms: RowTerms, out: Tensor) -> None:
    kernels = row_kernels(logits.device, logits.dtype)
    kernels.logit_gradient(logits, call.local(rows), terms, call.scale, out, call.cap)


def _derivatives(loss: RowLoss, rows: slice, head: HeadOutput) -> tuple[Tensor, Tensor | None]:
    """dL/dlog_prob and dL/dentropy of some rows; None where the loss does not read the entropy."""
    leaves = HeadOutput(*(x.requires_grad_() for x in head))
    with torch.enable_grad():
        total = loss(rows, leaves)
    a, b = torch.autograd.grad(total, tuple(leaves), allow_unused=True)
    return (torch.zeros_like(head.log_prob) if a is None else a), b
