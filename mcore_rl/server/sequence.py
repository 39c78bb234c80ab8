"""What the engine knows of one response: `Sequence` in Python, and the running ones column-wise in `Rows`.

Legend: R running rows, K stop ids of a row, W width of the output columns.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.nn.functional import pad

from mcore_rl.server.prefixes import Prefix
from mcore_rl.server.sampling import Knobs, counter_uniform

_COPY_SEED_STEP = 0x5851F42D4C957F2D
"""Odd, so that the n copies of one seeded request have n different seeds; copy 0 keeps the request's own."""


def copy_seed(seed: int, copy: int) -> int:
    """int64 seed of copy `copy` of a request with n > 1."""
    bits = (seed + copy * _COPY_SEED_STEP) & ((1 << 64) - 1)
    return bits - (1 << 64) if bits >= 1 << 63 else bits


@dataclass(frozen=True)
class Limits:
    """Sampling parameters as the engine uses them."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_p: float
    min_p: float
    top_k: int
    """0: no limit"""
    stop_ids: frozenset[int]
    """stop_token_ids, with the model's end-of-sequence ids unless ignore_eos"""


@dataclass(frozen=True)
class Wanted:
    """What the reply shows."""

    log_probs: bool = False
    prompt_from: int = -1
    """First prompt position with a log-prob; -1: none."""
    top: int = 0
    """Highest log-probs per scored token."""
    token_ids: tuple[int, ...] = ()
    """Tokens whose log-probs are shown at every scored position."""
    skip_special_tokens: bool = True
    experts: bool = False
    """Which experts every token but the last is sent to."""
    stream_every: int = 0
    """Tokens between two states that are told while it is sampled; 0: none is."""

    @property
    def extras(self) -> bool:
        return self.top > 0 or bool(self.token_ids)


@dataclass
class Details:
    """Extra log-probs of scored tokens, one entry per token: [(log-prob, token id), ...]."""

    top: list[list[tuple[float, int]]] = field(default_factory=list)
    token_ids: list[list[tuple[float, int]]] = field(default_factory=list)


@dataclass(eq=False)
class Sequence:
    """One response in the making. Compared and hashed by identity."""

    rid: str
    """The request's id, shared by its n copies: what /abort_request names."""
    id: str
    prompt: list[int]
    limits: Limits
    seed: int
    """int64"""
    wanted: Wanted = Wanted()
    session: str = ""
    """Responses of one name go on from each other's keys and values; empty: nothing is kept of it."""
    created: float = field(default_factory=time.monotonic)

    output_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    """One for each of output_ids; both are complete only while the sequence is not running."""
    prompt_log_probs: list[float] = field(default_factory=list)
    """Log-probs of prompt[1:], untempered; empty unless wanted."""
    prompt_details: Details = field(default_factory=Details)
    output_details: Details = field(default_factory=Details)
    marks: list[tuple[str, int]] = field(default_factory=list)
    """(weight version, first output position sampled from it)"""
    num_cached: int = 0
    """Prompt tokens whose keys and values came from another sequence: of the same prompt or session."""
    prefix: Prefix | None = None
    """Where the first `restored` of its tokens are copied from when it is admitted."""
    restored: int = 0
    epoch: int = 0
    """Of the weights that computed its keys and values, as the engine counts them."""
    num_retractions: int = 0
    finish_reason: dict[str, object] | None = None
    final_version: str = ""
    experts: str = ""
    """The experts in the form of the reply; empty unless wanted."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output_ids

    @property
    def reserved(self) -> int:
        """Longest this sequence can become, in tokens."""
        return len(self.prompt) + self.limits.max_new_tokens

    def mark(self, version: str, position: int) -> None:
        """From output `position` on, tokens come from `version`."""
        if self.marks and self.marks[-1][1] == position:
            self.marks.pop()
        if not self.marks or self.marks[-1][0] != version:
            self.marks.append((version, position))

    def spans(self) -> list[tuple[str, int, int]]:
        """(version, start, end) in order, covering [0, len(output_ids))."""
        ends = [start for _, start in self.marks[1:]] + [len(self.output_ids)]
        return [
            (name, start, end) for (name, start), end in zip(self.marks, ends, strict=True) if end > start
        ]


@dataclass
class RunningSequences:
    """The running sequences, one tensor per property: a decode step touches no Python object per row."""

    token: Tensor
    """[R] int64: the token to feed next"""
    position: Tensor
    """[R] int64: its position"""
    generated: Tensor
    """[R] int64: output tokens so far; also the counter of the seeded draw"""
    max_new: Tensor
    min_new: Tensor
    """[R] int64"""
    seed: Tensor
    top_k: Tensor
    """[R] int64"""
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    """[R] float32"""
    stop_ids: Tensor
    """[R, K] int64, padded with -1"""
    output_ids: Tensor
    """[R, W] int64, [:, :generated] valid"""
    log_probs: Tensor
    """[R, W] float32"""

    def __len__(self) -> int:
        return self.token.shape[0]

    def knobs(self) -> Knobs:
        """Sampling parameters of the next draw."""
        uniform = counter_uniform(self.seed, self.generated)
        return Knobs(self.temperature, self.top_p, self.min_p, self.top_k, uniform)

    def append(self, tokens: Tensor, log_probs: Tensor) -> Tensor:
        """Records one token [R] per row and returns which rows met a stop id: [R] bool."""
        if int(self.generated.max()) == self.output_ids.shape[1]:
            grow = max(16, self.output_ids.shape[1])
            self.output_ids, self.log_probs = pad(self.output_ids, (0, grow)), pad(self.log_probs, (0, grow))
        column = self.generated[:, None]
        self.output_ids.scatter_(1, column, tokens[:, None])
        self.log_probs.scatter_(1, column, log_probs[:, None])
        self.token, self.position, self.generated = tokens, self.position + 1, self.generated + 1
        return (tokens[:, None] == self.stop_ids).any(1)

    def take(self, index: Tensor) -> RunningSequences:
        """Rows `index` [n], in that order."""
        return RunningSequences(*(getattr(self, f.name)[index] for f in fields(self)))

    def join(self, other: RunningSequences) -> RunningSequences:
        """The rows of both, padded to the wider columns."""
        return RunningSequences(
            *(
                _cat(getattr(self, f.name), getattr(other, f.name), fill=-1 * (f.name == "stop_ids"))
                for f in fields(self)
            )
        )


def _cat(a: Tensor, b: Tensor, fill: int) -> Tensor:
    if a.dim() == 2:
        width = max(a.shape[1], b.shape[1])
        a, b = (pad(x, (0, width - x.shape[1]), value=fill) for x in (a, b))
    return torch.cat([a, b])


def _padded(rows: list[list[int]] | list[list[float]], fill: int, dtype: torch.dtype) -> Tensor:
    width = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype).view(
        len(rows), width
    )


def build_rows(sequences: list[Sequence], device: torch.device) -> RunningSequences:
    """Rows for sequences whose tokens except the last one are in the cache."""

    def column(values: list[int] | list[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    limits = [s.limits for s in sequences]
    rows = RunningSequences(
        token=column([s.output_ids[-1] if s.output_ids else s.prompt[-1] for s in sequences]),
        position=column([len(s.prompt) + len(s.output_ids) - 1 for s in sequences]),
        generated=column([len(s.output_ids) for s in sequences]),
        max_new=column([x.max_new_tokens for x in limits]),
        min_new=column([x.min_new_tokens for x in limits]),
        seed=column([s.seed for s in sequences]),
        top_k=column([x.top_k for x in limits]),
        temperature=column([x.temperature for x in limits], torch.float32),
        top_p=column([x.top_p for x in limits], torch.float32),
        min_p=column([x.min_p for x in limits], torch.float32),
        stop_ids=_padded([sorted(x.stop_ids) for x in limits], -1, torch.int64),
        output_ids=_padded([s.output_ids for s in sequences], 0, torch.int64),
        log_probs=_padded([s.log_probs for s in sequences], 0, torch.float32),
    )
    return RunningSequences(*(getattr(rows, f.name).to(device) for f in fields(rows)))
