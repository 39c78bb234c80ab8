"""One sample, token by token: what each was, and what the sampler and the trainer said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mcore_rl.dumps.trained import TrainedTokens
from mcore_rl.types import Sample, Segment

Role = Literal["context", "observed", "sampled"]


@dataclass(frozen=True)
class TokenRow:
    """One token; a number is None where nobody has said it."""

    segment: int
    role: Role
    """`context`: before the segment's own tokens; `observed`: among them, and not trained there; `sampled`"""
    id: int
    text: str
    version: str | None = None
    """weight version that sampled it"""
    log_prob: float | None = None
    """by the policy that sampled it"""
    old_log_prob: float | None = None
    """by the trainer, before the step's updates"""
    ratio: float | None = None
    """of importance, in the last update that the token was in"""
    advantage: float | None = None


def token_rows(
    sample: Sample, pieces: Mapping[int, str], trained: TrainedTokens | None = None
) -> list[TokenRow]:
    """All tokens of all segments of the sample, in order.

    Args:
        pieces: token id -> its text.
        trained: what the trainer made of the sample, if anything.
    """
    if trained is not None and len(trained.log_probs) != sample.trained_tokens:
        trained = None  # of another attempt at the step
    found: list[TokenRow] = []
    start = 0
    for number, segment in enumerate(sample.segments):
        end = start + len(segment.log_probs)
        found += _rows(number, segment, pieces, None if trained is None else trained.part(start, end))
        start = end
    return found


def _rows(
    number: int, segment: Segment, pieces: Mapping[int, str], trained: TrainedTokens | None
) -> list[TokenRow]:
    context = [TokenRow(number, "context", int(id), pieces.get(int(id), "")) for id in segment.context]
    mask = np.ones(len(segment.token_ids), bool) if segment.trained is None else segment.trained
    own, place = [], 0
    said = _said(trained, len(segment.log_probs))
    versions = [span.version for span in segment.versions for _ in range(span.start, span.end)]
    for id, is_trained in zip(np.asarray(segment.token_ids).tolist(), mask.tolist(), strict=True):
        text = pieces.get(id, "")
        if not is_trained:
            own.append(TokenRow(number, "observed", id, text))
            continue
        log_prob = float(segment.log_probs[place])
        own.append(TokenRow(number, "sampled", id, text, versions[place], log_prob, *said[place]))
        place += 1
    return context + own


Said = tuple[float | None, float | None, float | None]


def _said(trained: TrainedTokens | None, count: int) -> list[Said]:
    """(old log-prob, ratio, advantage) of each trained token."""
    if trained is None:
        return [(None, None, None)] * count
    columns = (trained.old_log_probs, trained.ratios, trained.advantages)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [(_known(old), _known(ratio), _known(advantage)) for old, ratio, advantage in rows]


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value
