"""What the packages hand to each other: prompts, samples, groups, packed batches. Frozen.

Legend: T packed tokens, R rows (scored response tokens), B sequences, G samples of one group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # reward functions run in processes that have no use for torch
    import torch

T = TypeVar("T")

Tokens = npt.NDArray[np.int32] | tuple[int, ...]


def _freeze(*arrays: object) -> None:
    """Arrays of numpy become read-only."""
    for array in arrays:
        if isinstance(array, np.ndarray):
            # By position, which numpy's stubs do not know: the keyword takes twice as long.
            array.setflags(False)  # type: ignore[call-arg]


@dataclass(frozen=True)
class Prompt:
    """One line of the prompt file."""

    id: str
    """Unique within the dataset; the key of group statistics."""
    text: str
    """What a person reads; never re-tokenised."""
    token_ids: tuple[int, ...]
    """[P] what the server receives and the trainer trains on."""
    label: Any
    """What the reward function compares with: any value of JSON, as the file has it; empty text where there
    is none."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The other keys of the row."""
    messages: Sequence[Mapping[str, Any]] = ()
    """The conversation that the chat template was given; none where the prompt is text."""

    @property
    def label_text(self) -> str:
        """The label as a response would write it: a string as it is, any other value as JSON."""
        return self.label if isinstance(self.label, str) else json.dumps(self.label, ensure_ascii=False)

    @cached_property
    def token_array(self) -> npt.NDArray[np.int32]:
        """[P] `token_ids`, converted once for all samples and steps."""
        array = np.array(self.token_ids, np.int32)
        _freeze(array)
        return array


class VersionSpan(NamedTuple):
    """Trained tokens [start, end) of a segment were sampled from weight version `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True)
class ExpertLayers:
    """What a mixture-of-experts model can choose from."""

    experts: int
    per_token: int
    """K, experts of each token"""
    sparse: tuple[bool, ...]
    """[layers] True where the MLP is a mixture"""


@dataclass(frozen=True)
class Segment:
    """One training sequence of a sample: a context, and what followed it there.

    The policy sampled some of the tokens that followed. The others are observations, such as a tool's answer,
    or were sampled in an earlier segment, which trains them. m of n tokens are trained here.
    """

    context: Tokens
    """[P >= 1] token ids before them; nothing of it is trained here."""
    token_ids: Tokens
    """[n] token ids that followed, the stop tokens that were sampled included."""
    log_probs: npt.NDArray[np.float32] | tuple[float, ...]
    """[m] log-probability of each under the sampling policy at its temperature, before top-p and top-k."""
    versions: tuple[VersionSpan, ...]
    """Weight version of every trained token, in order, covering [0, m)."""
    trained: npt.NDArray[np.bool_] | None = None
    """[n] which tokens are trained here, m of them; None: all."""
    experts: npt.NDArray[np.integer] | None = None
    """[P+n-1, layers, K] experts of every token but the last, where routing is replayed."""

    def __post_init__(self) -> None:
        """Its arrays become read-only: what writes into one gets an error, and trains no other tokens."""
        _freeze(self.context, self.token_ids, self.log_probs, self.trained, self.experts)


TAKEN_PARTS = frozenset({"mean", "std", "no_signal"})
"""names that no part of a reward has: of other metrics below `reward/`"""


class RewardPart(NamedTuple):
    """One of several rewards of a sample: its reward is the sum of weight x value over its parts."""

    name: str
    """as in the metric `reward/<name>`"""
    value: float
    """before the weight; the sum over the turns, where it was given per turn"""
    weight: float


class TurnReward(NamedTuple):
    """A reward of one turn, at the token that ends it."""

    token: int
    """its place among the trained tokens of the sample, in [0, m)"""
    reward: float
    """after the weights of its parts"""


@dataclass(frozen=True)
class Sample:
    """One attempt at a prompt (a rollout), as it was sampled; it counts once, whatever segments it has."""

    id: str
    """`<group id>/<index in the group>`; unique within a rollout batch."""
    prompt: Prompt
    segments: tuple[Segment, ...]
    """In the order in which they were sampled; one, where there is one response to the prompt."""
    text: str
    """Decoded response: for rewards; empty once they are given."""
    finish_reason: str
    """`stop`, `length` or `abort`."""
    reward: float | None = None
    """Finite, set by the reward function; the sum over parts or turns, where there are any."""
    void: bool = False
    """Its environment or its grader failed: it has no part in its group, the batch, a count or the loss."""
    parts: tuple[RewardPart, ...] = ()
    """What its reward is the weighted sum of; none, where the function gave one number or turns."""
    turn_rewards: tuple[TurnReward, ...] = ()
    """Where its reward lies, in the order of the tokens; none: all of it at the last trained token."""
    failure: tuple[str, str] | None = None
    """Why its environment made it void, a reason and more words; None once that is counted."""

    @classmethod
    def of_response(
        cls,
        id: str,
        prompt: Prompt,
        token_ids: Tokens,
        log_probs: npt.NDArray[np.float32] | tuple[float, ...],
        text: str,
        finish_reason: str,
        versions: tuple[VersionSpan, ...],
        reward: float | None = None,
        experts: npt.NDArray[np.integer] | None = None,
    ) -> Sample:
        """One response to the prompt, every token of which was sampled."""
        segment = Segment(prompt.token_array, token_ids, log_probs, versions, experts=experts)
        return cls(id, prompt, (segment,), text, finish_reason, reward)

    @property
    def token_ids(self) -> Tokens:
        """[m] the trained tokens of all segments, one after another."""
        if len(self.segments) == 1 and self.segments[0].trained is None:
            return self.segments[0].token_ids
        return self._joined[0]

    @property
    def log_probs(self) -> npt.NDArray[np.float32] | tuple[float, ...]:
        """[m] their log-probabilities under the sampling policy."""
        return self.segments[0].log_probs if len(self.segments) == 1 else self._joined[1]

    @cached_property
    def _joined(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        tokens = join_arrays([_trained(segment) for segment in self.segments], np.int32)
        log_probs = join_arrays([segment.log_probs for segment in self.segments], np.float32)
        _freeze(tokens, log_probs)
        return tokens, log_probs

    @property
    def trained_tokens(self) -> int:
        """m, over all segments."""
        return sum(len(segment.log_probs) for segment in self.segments)

    @property
    def truncated(self) -> bool:
        """True when the response met its token limit rather than a stop token."""
        return self.finish_reason == "length"


def _trained(segment: Segment) -> Tokens:
    return segment.token_ids if segment.trained is None else np.asarray(segment.token_ids)[segment.trained]


def join_arrays(parts: Sequence[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """[sum of n_i] arrays or tuples of numbers, one after another as `dtype`."""
    return np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype, casting="same_kind")


@dataclass(frozen=True)
class Group:
    """All samples of one prompt in one step; statistics are keyed by `id`, never by position."""

    id: str
    """`<prompt id>@<rollout step>`"""
    samples: tuple[Sample, ...]
    """[G] may be unequal across groups when samples were aborted."""


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: whole sequences (prompt + response) packed end to end, THD.

    Where samples share their prompt, all but the first of them are packed without it (`begins`).

    Row r scores `targets[r]` from the hidden state of packed token `rows[r]` (the token before it).
    """

    tokens: torch.Tensor
    """[T] int64"""
    position_ids: torch.Tensor
    """[T] int64 places in the whole sequence, which starts at 0"""
    cu_seqlens: torch.Tensor
    """[B+1] int32, padded sequence boundaries in [0, T]; a sequence's padding lies at its end"""
    max_seqlen: int
    """longest padded sequence, prompt included"""
    rows: torch.Tensor
    """[R] int64 into [0, T)"""
    targets: torch.Tensor
    """[R] int64 token ids in [0, V)"""
    sequence: torch.Tensor
    """[R] int64 into [0, B): which sequence of this micro-batch the row belongs to"""
    fields: Mapping[str, torch.Tensor]
    """name -> [R]: what the loss needs per row (advantage, old_log_prob, weight, ...)"""
    experts: torch.Tensor | None = None
    """[T, layers, K] int16 experts of every token, -1 where the router chooses; None: it always does"""
    live: torch.Tensor | None = None
    """[T] bool, False for padding; None: not told"""
    begins: torch.Tensor | None = None
    """[B] int64 packed token that a sequence begins with: one of another sequence, where it has the same
    prompt, of which only that other one has tokens here; None: all sequences have their own"""

    @property
    def num_sequences(self) -> int:
        """B"""
        return self.cu_seqlens.numel() - 1
