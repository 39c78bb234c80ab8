"""Two vocab-parallel heads side by side: a student's divergence from its teacher, never holding the logits.

Both models see the same positions; each has hidden states of its own width and its own lm_head, cut alike
over the tensor-parallel group. Rows go through in waves: both GEMMs for logits, one exchange of the
statistics that give log p and log q, one of the divergence's sums over the vocabulary, then the gradient in
the student's logits, in the place of those logits, and its two GEMMs. That is four GEMMs, the student's three
and one of the teacher's width, and two collectives a wave.

Legend: R rows, H and H' hidden sizes of student and teacher, V_local rows of this rank's lm_head shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mcore_rl.errors import LayoutError
from mcore_rl.parallel.head.passes import (
    Call,
    Tiling,
    begin_reduction,
    gather_statistics,
    gradients,
    logits_of,
    parts,
    scored_hidden,
    statistics_of,
    weight_grad,
)
from mcore_rl.parallel.head.rows import (
    BLOCK_ELEMENTS,
    accumulate_dtype,
    cap_slope,
    capped_,
    merge_statistics,
)

GPU_BLOCK_ELEMENTS = 1 << 24
"""elements of a block on a GPU: 64 MiB in float32, a few of them at once"""

DivergenceLoss = Callable[[slice, Tensor], Tensor]
"""(some of the rows, their divergences) -> the sum of their losses, differentiable"""


@runtime_checkable
class Divergence(Protocol):
    """How far a student is from its teacher, per position, in nats; `mcore_rl.algo.distillation` has them.

    `log_p` and `log_q` [C, L] are the student's and the teacher's log-probs over the whole vocabulary, of the
    L tokens that this rank holds.
    """

    def sums(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """[S, C] sums over these tokens; those of all ranks are added."""
        ...

    def value(self, sums: Tensor) -> Tensor:
        """[C] the divergence from the sums over the whole vocabulary."""
        ...

    def logit_gradient(self, log_p: Tensor, log_q: Tensor, sums: Tensor) -> Tensor:
        """[C, L] its derivative in the student's logits, which are divided by the temperature already."""
        ...


class Teacher(NamedTuple):
    """What the teacher says of the same positions; no gradient reaches it."""

    hidden: Tensor
    """[T_local, H'] placed as the student's"""
    weight: Tensor
    """[V_local, H'] the same tokens as the student's shard, before padding"""
    cap: float | None = None
    """the teacher's bound of its logits; see `Call.cap`, which is the student's"""
    divisor: float = 1.0
    """a constant that divides its logits; whoever knows the student's divides `hidden` by their ratio"""


class Against(NamedTuple):
    """What a student is compared with at the rows of one micro-batch, and how."""

    teacher: Teacher
    divergence: Divergence


class _Normalized(NamedTuple):
    """What turns logits of some rows into log-probs over the whole vocabulary."""

    top: Tensor
    """[C] the largest logit"""
    log_total: Tensor
    """[C] log S"""
    cap: float | None
    """of the logits"""

    def log_probs(self, logits: Tensor, block: slice, scale: float) -> Tensor:
        """[c, L] of a block of the rows; a new tensor, at least float32."""
        top, log_total = self.top[block, None], self.log_total[block, None]
        z = logits[block] if self.cap is None else capped_(logits[block].to(top.dtype, copy=True), self.cap)
        return (z - top).mul_(scale).sub_(log_total)


def divergences(
    hidden: Float[Tensor, "T_local H"],
    weight: Float[Tensor, "V_local H"],
    teacher: Teacher,
    call: Call,
    divergence: Divergence,
) -> Float[Tensor, " R"]:
    """The divergence at every scored row, without gradient; equal on every rank of the group.

    Args:
        call: as for `log_prob_entropy`; what it says of rows and vocabulary holds for both models.

    Raises:
        LayoutError: the two lm_heads do not hold the same tokens on this rank.
    """
    with torch.no_grad():
        pair = _Pair(hidden, weight, teacher, call, divergence)
        found = hidden.new_empty(len(pair.scored), dtype=accumulate_dtype(hidden.dtype))
        for rows in parts(slice(0, len(found)), pair.call.tiling.tile):
            logits = logits_of(pair.scored, pair.live, pair.call, rows)
            found[rows] = pair.compare(rows, logits).value
    return found


def divergence_loss(
    hidden: Float[Tensor, "T_local H"],
    weight: Float[Tensor, "V_local H"],
    teacher: Teacher,
    call: Call,
    divergence: Divergence,
    loss: DivergenceLoss,
) -> Float[Tensor, ""]:
    """A scalar whose backward pass adds the gradient of sum(loss), times the gradient it receives.

    Its own value is 0, as that of `head_loss`, whose rules for `loss` hold: a pure sum over rows, asked wave
    after wave in the backward pass, answered alike by every rank of the group.

    Raises:
        LayoutError: the two lm_heads do not hold the same tokens on this rank.
    """
    return _DivergenceLoss.apply(hidden, weight, teacher, call, divergence, loss)  # type: ignore[return-value]


class _DivergenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher: Teacher, call: Call, divergence: Divergence, loss):
        _check_same_tokens(weight, teacher, call)
        ctx.save_for_backward(hidden, weight, teacher.hidden, teacher.weight)
        ctx.teacher_cap = teacher.cap
        ctx.call, ctx.divergence, ctx.loss, ctx.tokens = call, divergence, loss, len(hidden)
        return hidden.new_zeros((), dtype=accumulate_dtype(hidden.dtype))

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, *of_teacher = ctx.saved_tensors
        teacher = Teacher(of_teacher[0], of_teacher[1], ctx.teacher_cap)
        pair = _Pair(hidden, weight, teacher, ctx.call, ctx.divergence)

        def differentiate(rows: slice, logits: Tensor) -> Callable[[Tensor], None]:
            found = pair.compare(rows, logits)

            def write(out: Tensor) -> None:
                found.write_gradient(_derivative(ctx.loss, rows, found.value) * grad, out)

            return write

        def begin(grad_rows: Tensor) -> Callable[[], Tensor]:
            return begin_reduction(grad_rows, ctx.tokens, pair.call)

        if len(pair.scored) == 0:
            _derivative(ctx.loss, slice(0, 0), grad.new_zeros(0))
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        hidden_grad, total = gradients(
            pair.scored, weight, pair.call, differentiate, begin if need_hidden else None, need_weight
        )
        return hidden_grad, weight_grad(weight, total), None, None, None, None


class _Pair:
    """Both heads over the same rows."""

    def __init__(self, hidden, weight, teacher: Teacher, call: Call, divergence: Divergence) -> None:
        _check_same_tokens(weight, teacher, call)
        self.call = call._replace(tiling=_of_two(call.tiling))
        self.divergence = divergence
        self.teacher_call = self.call._replace(cap=teacher.cap)
        self.live, self.teacher_live = weight[: call.shard.live], teacher.weight[: call.shard.live]
        self.scored = scored_hidden(hidden, call)
        self.teacher_scored = scored_hidden(teacher.hidden.detach(), call)

    def compare(self, rows: slice, logits: Tensor) -> _Compared:
        """The divergence of `rows` from the student's logits: one GEMM and two collectives."""
        call, group = self.call, self.call.shard.group
        of_teacher = logits_of(self.teacher_scored, self.teacher_live, call, rows)
        calls = (call, self.teacher_call)
        pair = zip((logits, of_teacher), calls, strict=True)
        both = torch.stack([statistics_of(x, of_model, rows) for x, of_model in pair], 1)
        gathered = gather_statistics(both.flatten(1), group).unflatten(2, both.shape[1:])
        student, teacher = (
            _Normalized(*merge_statistics(gathered[:, :, model], call.scale)[2:], calls[model].cap)
            for model in (0, 1)
        )
        found = _Compared(call.scale, self.divergence, logits, of_teacher, student, teacher)
        local = torch.cat([self.divergence.sums(log_p, log_q) for _, log_p, log_q in found.blocks()], 1)
        found.sums = gather_statistics(local, group).sum(0)
        return found


class _Compared:
    """Logits of both models at some rows, and what normalises them."""

    def __init__(self, scale, divergence, logits, of_teacher, student, teacher) -> None:
        self.scale, self.divergence = scale, divergence
        self.logits, self.of_teacher = logits, of_teacher
        self.student, self.teacher = student, teacher
        self.sums: Tensor = logits.new_empty(0)

    @property
    def value(self) -> Tensor:
        """[C] the divergence of each row."""
        return self.divergence.value(self.sums)

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(some rows, log p, log q) [c, L] of this rank's tokens, each block once."""
        limit = BLOCK_ELEMENTS if self.logits.device.type == "cpu" else GPU_BLOCK_ELEMENTS
        rows = max(1, limit // max(1, self.logits.shape[1]))
        for block in parts(slice(0, len(self.logits)), rows):
            yield (
                block,
                self.student.log_probs(self.logits, block, self.scale),
                self.teacher.log_probs(self.of_teacher, block, self.scale),
            )

    def write_gradient(self, weight: Tensor, out: Tensor) -> None:
        """out = dL/dlogits with dL/dD = `weight` [C]; `out` may be the student's logits themselves."""
        factor = weight * self.scale
        for block, log_p, log_q in self.blocks():
            slope = self.divergence.logit_gradient(log_p, log_q, self.sums[:, block])
            cap = self.student.cap
            if cap is not None:
                capped = capped_(self.logits[block].to(slope.dtype, copy=True), cap)
                slope = slope * cap_slope(capped, cap)
            out[block] = slope.mul_(factor[block, None])


def _derivative(loss: DivergenceLoss, rows: slice, value: Tensor) -> Tensor:
    leaf = value.detach().requires_grad_()
    with torch.enable_grad():
        total = loss(rows, leaf)
    (found,) = torch.autograd.grad(total, leaf, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found


def _of_two(tiling: Tiling) -> Tiling:
    """Half the rows at once, since the logits of two models are alive; the GEMMs' columns stay."""
    tile = max(1, tiling.tile // 2)
    return tiling._replace(tile=tile, wave=tile * (tiling.wave // tiling.tile))


def _check_same_tokens(weight: Tensor, teacher: Teacher, call: Call) -> None:
    if weight.shape[0] != teacher.weight.shape[0]:
        raise LayoutError(
            f"the teacher's lm_head has {teacher.weight.shape[0]} rows on this rank and the student's "
            f"{weight.shape[0]}: both models need the same tokenizer and the same padding of its vocabulary"
        )
