"""A policy loss against its contract, in float64: its gradient by finite differences, row by row.

Whatever the loss detaches (or computes without gradient) is a constant of its gradient, so it is held while a
row is moved: the values of the base point are handed out again, in the order in which they were made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mcore_rl.algo.algorithms import Algorithm
from mcore_rl.algo.rows import Rows, ahead_by, declared, marked_by
from mcore_rl.errors import NumericsError
from mcore_rl.training.objective import check_answer

ROWS = 48
STEP = 1e-6
LIMIT = 1e-6
"""largest difference of a derivative, relative to the largest one"""


class _Constants(TorchFunctionMode):
    """Records what is detached, or replays it."""

    def __init__(self, recorded: list[Tensor] | None = None) -> None:
        super().__init__()
        self.recorded: list[Tensor] = [] if recorded is None else recorded
        self._replayed = None if recorded is None else iter(recorded)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        answer = func(*args, **(kwargs or {}))
        constant = func in (Tensor.detach, torch.detach) or not torch.is_grad_enabled()
        if not (constant and isinstance(answer, Tensor) and answer.is_floating_point()):
            return answer
        if self._replayed is None:
            self.recorded.append(answer.clone())
            return answer
        return next(self._replayed, answer).clone()


def check_loss(algorithm: Algorithm) -> float:
    """Raise NumericsError unless the loss of a row is a function of that row, with the gradient it says.

    Returns the largest difference of a derivative, relative to the largest one, which LIMIT bounds.

    Raises:
        ConfigError: the loss answers with something else than the contract says, or reads what it does not
            declare.
    """
    rows = _rows(algorithm)
    log_prob, entropy = (x.clone().requires_grad_() for x in (rows.log_prob, rows.entropy))
    leaves = replace(rows, log_prob=log_prob, entropy=entropy)
    with _Constants() as constants:
        token = _loss(algorithm, leaves)
    check_answer(token, leaves)
    if not torch.isfinite(token.loss).all():
        raise NumericsError(f"{_name(algorithm)}: its value is not finite on finite log-probs")
    by_autograd = torch.autograd.grad(
        token.loss.sum(), (log_prob, entropy), allow_unused=True, materialize_grads=True
    )
    largest = max(1.0, *(float(gradient.abs().max()) for gradient in by_autograd))
    worst = 0.0
    for name, gradient in zip(("log_prob", "entropy"), by_autograd, strict=True):
        jacobian = _jacobian(algorithm, rows, name, constants.recorded)
        others = jacobian - torch.diag(jacobian.diagonal())
        if others.abs().max() > LIMIT * largest:
            row, moved = divmod(int(others.abs().argmax()), ROWS)
            raise NumericsError(
                f"{_name(algorithm)}: the loss of row {row} changes with the {name} of row {moved}; a row's "
                "loss must follow from that row, and from declared fields of its sequence"
            )
        error = (jacobian.diagonal() - gradient).abs()
        if not error.max() <= LIMIT * largest:
            row = int(error.argmax())
            raise NumericsError(
                f"{_name(algorithm)}: d loss / d {name} of row {row} is {gradient[row]:.9g} by autograd and "
                f"{jacobian[row, row]:.9g} by finite differences"
            )
        worst = max(worst, float(error.max()) / largest)
    _check_parts(algorithm, rows, token.loss.detach())
    return worst


def _check_parts(algorithm: Algorithm, rows: Rows, whole: Tensor) -> None:
    """The head asks any part of a micro-batch, and packing decides what is in one."""
    cuts = (slice(0, 1), slice(1, 20), slice(20, 20), slice(20, ROWS))
    parts = torch.cat([_loss(algorithm, _part(rows, cut)).loss.detach() for cut in cuts])
    difference = (parts - whole).abs()
    if difference.max() > LIMIT * max(1.0, float(whole.abs().max())):
        raise NumericsError(
            f"{_name(algorithm)}: the loss of row {int(difference.argmax())} depends on which other rows it "
            "is asked with; a row's loss must follow from that row, and from declared fields of its sequence"
        )


def _rows(algorithm: Algorithm) -> Rows:
    """Rows in float64 whose ratios and advantages lie on both sides, near and far; no two are alike."""
    generator = torch.Generator().manual_seed(5)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(ROWS, generator=generator, dtype=torch.float64)

    log_prob = -normal(1.0).abs() - 0.05
    spread = torch.tensor([0.01, 0.3, 1.5], dtype=torch.float64).repeat(ROWS // 3)
    old = log_prob + spread * normal(1.0)
    rollout = old + 0.3 * spread * normal(1.0)
    rows = Rows.of(log_prob, normal(1.0).abs(), old=old, rollout=rollout, advantage=normal(1.0))
    names = declared(algorithm.loss)
    extras = {n: log_prob + normal(0.3) if n == "reference" else normal(0.2) for n in sorted(names)}
    if ahead_by(algorithm.loss) is not None:
        extras["ahead"] = normal(0.2)
    if marked_by(algorithm.loss) is not None:
        extras["marked"] = torch.arange(ROWS) % 5 < 2
    return replace(rows, sequence_tokens=torch.full_like(old, 7.0), extras=extras)


def _part(rows: Rows, cut: slice) -> Rows:
    tensors = {name: value[cut] for name, value in vars(rows).items() if isinstance(value, Tensor)}
    return replace(rows, **tensors, extras={name: value[cut] for name, value in rows.extras.items()})


def _jacobian(algorithm: Algorithm, rows: Rows, name: str, constants: list[Tensor]) -> Tensor:
    """[ROWS, ROWS] d loss[i] / d name[j], by central differences."""
    columns = []
    for j in range(ROWS):
        ends = []
        for step in (STEP, -STEP):
            moved = getattr(rows, name).clone()
            moved[j] += step
            # a leaf that wants a gradient, so that the loss takes the same path as at the base point
            point = replace(rows, **{name: moved.requires_grad_()})
            with _Constants(constants):
                loss = _loss(algorithm, point).loss
            ends.append(loss.detach())
        columns.append((ends[0] - ends[1]) / (2 * STEP))
    return torch.stack(columns, 1)


def _loss(algorithm: Algorithm, rows: Rows):
    return algorithm.loss(rows, **algorithm.loss_params)


def _name(algorithm: Algorithm) -> str:
    return getattr(algorithm.loss, "__name__", "the loss")
