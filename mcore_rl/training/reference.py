"""The frozen reference of preference training: what it says of the rows, each step or once for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

from mcore_rl.config import Config
from mcore_rl.data.examples import Example
from mcore_rl.data.packing import TokenSequence
from mcore_rl.data.prompts import PromptSet
from mcore_rl.model.adapters import AdaptersOff
from mcore_rl.model.build import Model
from mcore_rl.model.residency import Offloaded, Residency, ResidentPart, Swapped, weights_of
from mcore_rl.training.assemble import build_reference
from mcore_rl.training.batch import Batching
from mcore_rl.training.model_passes import log_probs
from mcore_rl.training.session import examples, sequences_of

_ROWS_AT_ONCE = 1024
"""rows that are scored together where all of a file are"""


@dataclass(frozen=True)
class ReferencePolicy:
    """What the frozen starting policy says of the rows that are trained."""

    policy: Model
    shape: Batching
    """how micro-batches are made"""
    model: Model | None
    """None where all that it says is kept"""
    waiting: Mapping[str, ResidentPart] = field(default_factory=dict)
    """what of it waits in host memory"""
    kept: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """id of a training row -> the mean log-prob of each of its sequences"""

    @property
    def frozen(self) -> dict[str, Model]:
        """Prefix in checkpoints -> a model of its own."""
        own = self.model is not None and self.model is not self.policy
        return {"reference.": self.model} if own and self.model is not None else {}

    def of_rows(self, rows: Sequence[Example], residency: Residency) -> list[float]:
        """The mean log-prob of the trained tokens of every sequence of training rows; collective."""
        if self.model is None:
            return [mean for row in rows for mean in self.kept[row.id]]
        return self.of_sequences(sequences_of(rows), residency)

    def of_sequences(self, sequences: Sequence[TokenSequence], residency: Residency) -> list[float]:
        """The same of any sequences, where there is a model; collective."""
        assert self.model is not None
        with residency.during("reference"):
            return means_of(self.model, self.shape, sequences)


def start_reference(
    config: Config, policy: Model, shape: Batching, data: PromptSet, reached: Callable[[str], None]
) -> ReferencePolicy:
    """The reference, where residency.reference has it, or the policy without its adapters; collective.

    Args:
        policy: with its starting weights: not restored yet.
        data: the training rows.
        reached: told that the run goes on.
    """
    where = config.residency.reference
    if policy.adapters is not None:
        return ReferencePolicy(policy, shape, policy, {"reference": AdaptersOff(policy.unwrapped)})
    if where == "kept":
        return ReferencePolicy(policy, shape, None, kept=_of_all_rows(policy, shape, data, reached))
    if where == "swapped":
        return ReferencePolicy(policy, shape, policy, {"reference": Swapped(policy)})
    model = build_reference(config, policy.mesh)
    if where == "resident":
        return ReferencePolicy(policy, shape, model)
    offloaded = Offloaded(partial(weights_of, model), constant=True)
    return ReferencePolicy(policy, shape, model, {"reference": offloaded})


def without_adapters(policy: Model) -> AbstractContextManager[None]:
    """Inside, a policy before its training is its reference, whatever its adapters begin with."""
    return AdaptersOff(policy.unwrapped).resident() if policy.adapters is not None else nullcontext()


def means_of(model: Model, shape: Batching, sequences: Sequence[TokenSequence]) -> list[float]:
    """The mean log-prob of the trained tokens of every sequence; the same on every rank, collective."""
    return [float(one.mean(dtype="float64")) for one in log_probs(model, sequences, shape, 1.0)]


def _of_all_rows(
    policy: Model, shape: Batching, data: PromptSet, reached: Callable[[str], None]
) -> dict[str, tuple[float, ...]]:
    """What the policy says of all training rows before it is trained or restored; collective."""
    found: dict[str, tuple[float, ...]] = {}
    for begin in range(0, len(data), _ROWS_AT_ONCE):
        rows = examples(data.prompts[begin : begin + _ROWS_AT_ONCE])
        means = iter(means_of(policy, shape, sequences_of(rows)))
        found |= {row.id: tuple(next(means) for _ in row.sequences) for row in rows}
        reached(f"the reference scored {len(found)} rows")
    return found
