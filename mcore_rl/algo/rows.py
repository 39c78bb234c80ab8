"""The contract of a policy loss: `loss(rows, **params) -> TokenLoss(loss, metrics)`.

`rows` are scored response tokens: all of a micro-batch, or any part of one. The loss of a row follows from
that row alone, and from what it reads of the row's whole sequence; its keyword-only parameters become
`algorithm.params`. What a loss reads of whole sequences, or of a reference model, it declares:

    @reads("sequence_log_ratio")
    def loss(rows: Rows, *, eps: float = 0.2) -> TokenLoss: ...

    @reads(drift=a_function)  # of the rows and the loss's parameters: rows.mean_of("drift") of the sequence
    @marks(a_choice)          # of the whole rollout batch, before its first update: rows.marked
    @ahead(a_function)        # summed over the rows that follow in the sequence: rows.ahead

Nothing else can be read: an undeclared field raises. So the library knows, without being told by a flag,
which models must score and whether any part of a micro-batch can be asked alone (the head's fused mode).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mcore_rl.algo.metrics import Metric
from mcore_rl.errors import ConfigError

OF_SEQUENCES = (
    *("sequence_log_ratio", "sequence_log_ratio_sum", "sequence_kept_log_ratio"),
    *("sequence_rollout_log_ratio", "sequence_rollout_log_ratio_sum"),
)
"""declared fields that need every row of a sequence"""
OF_OLD = OF_SEQUENCES[:3]
"""those of them that are 0 where the old policy is the current one"""
DECLARED = (*OF_SEQUENCES, "reference")

F = TypeVar("F", bound=Callable[..., "TokenLoss"])


class TokenLoss(NamedTuple):
    """What every policy loss returns."""

    loss: Float[Tensor, "*shape"]
    """the shape of log_prob; to be minimised, differentiable in log_prob and entropy"""
    metrics: Mapping[str, Metric] = MappingProxyType({})
    """name -> metric, named as people read it in metrics.jsonl"""


def reads(*names: str, **own: Callable[..., Tensor]) -> Callable[[F], F]:
    """Declare which of DECLARED a loss reads, and of which values it reads the mean over a sequence.

    Each of `own` is a function (rows, **params) -> [R] whose keyword-only parameters are some of the loss's.
    Raises ConfigError for another name.
    """
    for name in names:
        if name not in DECLARED:
            raise ConfigError(f"@reads({name!r}): not one of {', '.join(DECLARED)}; other fields need none")
    for name in own:
        if name in (*DECLARED, "marked", "ahead"):
            raise ConfigError(f"@reads({name}=...): is a field of rows already; give yours another name")

    def declare(loss: F) -> F:
        for name, function in own.items():
            _check_parameters(f"@reads({name}=...)", function, loss)
        vars(loss)["reads"] = frozenset(names) | frozenset(own)
        vars(loss)["averages"] = own
        return loss

    return declare


def marks(choice: Callable[..., Tensor]) -> Callable[[F], F]:
    """Declare which rows a loss treats otherwise, chosen among all rows of a rollout before its first update.

    `choice(advantage, old, rollout, **params)` gets float64 numbers of all rows [R] that are usable, the same
    on every rank, and returns bool [R]; its keyword-only parameters are some of the loss's.
    """

    def declare(loss: F) -> F:
        _check_parameters("@marks", choice, loss)
        vars(loss)["marks"] = choice
        return loss

    return declare


def ahead(values: Callable[..., tuple[Tensor, float]]) -> Callable[[F], F]:
    """Declare what a loss reads of the rows that follow in the sequence, as a discounted sum.

    `values(rows, **params) -> ([R], discount)`: rows.ahead is the sum of discount^k values over k >= 0, of
    the row of the k-th token behind; what is no row, or none that is usable, counts 0. Its keyword-only
    parameters are some of the loss's.
    """

    def declare(loss: F) -> F:
        _check_parameters("@ahead", values, loss)
        vars(loss)["ahead"] = values
        return loss

    return declare


def _check_parameters(place: str, function: Callable[..., Any], loss: Callable[..., TokenLoss]) -> None:
    """Raises ConfigError where the loss does not have what the function needs."""
    known = inspect.signature(loss).parameters
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and p.name not in known:
            raise ConfigError(
                f"{place}: needs {p.name}, which is no parameter of the loss; add it there, with its default"
            )


def marked_by(loss: Callable[..., TokenLoss]) -> Callable[..., Tensor] | None:
    """Return what chooses the marked rows of `loss`; None where it reads no mark."""
    return _of_loss(loss, "marks", None)


def ahead_by(loss: Callable[..., TokenLoss]) -> Callable[..., tuple[Tensor, float]] | None:
    """Return what gives the values that `loss` reads summed over the rows ahead; None where it reads none."""
    return _of_loss(loss, "ahead", None)


def averaged_by(loss: Callable[..., TokenLoss]) -> Mapping[str, Callable[..., Tensor]]:
    """Return the functions whose means over a sequence `loss` reads, by name."""
    return _of_loss(loss, "averages", {})


def _of_loss(loss: Callable[..., TokenLoss], name: str, otherwise: Any) -> Any:
    while isinstance(loss, functools.partial) and not hasattr(loss, name):
        loss = loss.func
    return getattr(loss, name, otherwise)


def declared(loss: Callable[..., TokenLoss]) -> frozenset[str]:
    """Return what `loss` declares to read; a partial of a loss reads what the loss does."""
    return _of_loss(loss, "reads", frozenset())


def finite(values: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """`torch.isfinite`, whose four kernels it does with two; for rows, where launching them is what costs."""
    return (values - values) == 0


@dataclass(frozen=True)
class Rows:
    """What a loss may read of some rows. Everything but log_prob and entropy is a constant, and finite.

    `Rows.of` builds it. A row that is not `usable` has log-ratios of 0; its loss counts for nothing.
    """

    log_prob: Float[Tensor, "*shape"]
    """log-prob under the policy in training"""
    entropy: Float[Tensor, "*shape"]
    """entropy of its whole distribution at this token, in nats"""
    old: Float[Tensor, "*shape"]
    """log-prob of the policy before the rollout's first update"""
    rollout: Float[Tensor, "*shape"]
    """log-prob of the policy that sampled: another engine, perhaps with older weights"""
    advantage: Float[Tensor, "*shape"]
    usable: Bool[Tensor, "*shape"]
    """every log-prob that was recorded for the token is finite"""
    sequence_tokens: Float[Tensor, "*shape"] | None = None
    """scored tokens of the row's whole sequence, where a batch says it"""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """what the loss declared, by name"""

    @classmethod
    def of(
        cls,
        log_prob: Tensor,
        entropy: Tensor,
        *,
        old: Tensor | None = None,
        rollout: Tensor | None = None,
        advantage: Tensor,
        reference: Tensor | None = None,
        sequence_tokens: Tensor | None = None,
    ) -> Rows:
        """Take what was recorded, whatever is in it; default: what the policy itself says now."""
        current = log_prob.detach()
        recorded = [finite(x.detach()) for x in (old, rollout, reference) if x is not None]
        usable = functools.reduce(torch.logical_and, recorded or [torch.ones_like(current, dtype=torch.bool)])
        old, rollout, ref = (
            current if x is None else torch.where(usable, x.detach(), current)
            for x in (old, rollout, reference)
        )
        extras = {} if reference is None else {"reference": ref}
        return cls(log_prob, entropy, old, rollout, advantage, usable, sequence_tokens, extras)

    @property
    def reference(self) -> Float[Tensor, "*shape"]:
        """Log-prob of the frozen reference model; declared."""
        return self._declared("reference")

    @property
    def sequence_log_ratio(self) -> Float[Tensor, "*shape"]:
        """Mean of log_prob - old over the usable rows of the whole sequence; declared."""
        return self._declared("sequence_log_ratio")

    @property
    def sequence_rollout_log_ratio(self) -> Float[Tensor, "*shape"]:
        """Mean of log_prob - rollout over the usable rows of the whole sequence; declared."""
        return self._declared("sequence_rollout_log_ratio")

    @property
    def sequence_log_ratio_sum(self) -> Float[Tensor, "*shape"]:
        """Sum of log_prob - old over the usable rows of the whole sequence; declared."""
        return self._declared("sequence_log_ratio_sum")

    @property
    def sequence_rollout_log_ratio_sum(self) -> Float[Tensor, "*shape"]:
        """Sum of log_prob - rollout over the usable rows of the whole sequence; declared."""
        return self._declared("sequence_rollout_log_ratio_sum")

    @property
    def sequence_kept_log_ratio(self) -> Float[Tensor, "*shape"]:
        """Mean of log_prob - old over the usable rows that the correction keeps; declared."""
        return self._declared("sequence_kept_log_ratio")

    @property
    def marked(self) -> Bool[Tensor, "*shape"]:
        """Whether the row was chosen by what @marks names; none is where nobody chose."""
        if "marked" not in self.extras:
            raise ConfigError(
                "the loss reads rows.marked without saying so; write @marks(choice) above the function"
            )
        return self.extras["marked"]

    @property
    def ahead(self) -> Float[Tensor, "*shape"]:
        """Discounted sum over this row and those that follow in its sequence, of what @ahead names."""
        if "ahead" not in self.extras:
            raise ConfigError(
                "the loss reads rows.ahead without saying so; write @ahead(values) above the function"
            )
        return self.extras["ahead"]

    def mean_of(self, name: str) -> Float[Tensor, "*shape"]:
        """Mean over the usable rows of the whole sequence of what @reads names `name`."""
        return self._declared(name)

    def _declared(self, name: str) -> Tensor:
        if name not in self.extras:
            raise ConfigError(
                f"the loss reads rows.{name} without saying so; write @reads({name!r}) above the function"
            )
        return self.extras[name]
