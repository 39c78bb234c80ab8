"""Whether what a dump holds can have been sampled: the rules of a server's reply, for whole trajectories."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from mcore_rl.rollout.columns import Columns
from mcore_rl.rollout.reply import FINISH_REASONS, LARGEST_LOG_PROB
from mcore_rl.terminal import quoted
from mcore_rl.types import Group, Sample, Segment


def check_columns(columns: Columns) -> None:
    """Raises ValueError for arrays of which one cannot be cut into the samples that the rows name."""
    ends, segments = columns.ends, sum(row[4] for row in columns.samples)
    if ends.shape != (6, segments):
        raise ValueError(f"ends of shape {list(ends.shape)} for {segments} segments")
    lengths = np.diff(ends, axis=1, prepend=0)
    arrays = (columns.contexts, columns.tokens, columns.log_probs, columns.versions, columns.trained)
    sizes = [*map(len, arrays), len(columns.experts)]
    if (lengths < 0).any() or lengths.sum(axis=1).tolist() != sizes:
        raise ValueError("ends that do not cover the tokens")
    _, tokens, trained, _, masks, _ = lengths
    if (masks != np.where(trained < tokens, tokens, 0)).any():
        raise ValueError("masks of other segments")
    if columns.spans.shape != (2, len(columns.versions)):
        raise ValueError("weight versions of other tokens")
    if sum(count for *_, count in columns.groups) != len(columns.samples):
        raise ValueError("groups of other samples")
    if min(columns.tokens.min(initial=0), columns.contexts.min(initial=0)) < 0:
        raise ValueError("a negative token id")
    if not (columns.log_probs <= LARGEST_LOG_PROB).all() or np.isinf(columns.log_probs).any():
        raise ValueError("a log-probability that is none, finite and at most 0")


def check_groups(groups: Sequence[Group]) -> None:
    """Raises ValueError for a sample that no run can have kept."""
    samples = [sample for group in groups for sample in group.samples]
    for name, ids in (("group", [group.id for group in groups]), ("sample", [s.id for s in samples])):
        if len(set(ids)) != len(ids) or not all(isinstance(id, str) for id in ids):
            raise ValueError(f"two {name}s of one id, or an id that is no text")
    for sample in samples:
        _check_sample(sample)


def _check_sample(sample: Sample) -> None:
    where = f"sample {quoted(sample.id)}"
    if sample.finish_reason not in FINISH_REASONS or type(sample.void) is not bool or not sample.segments:
        raise ValueError(f"{where}: it ended by {quoted(sample.finish_reason)}, or has no segment")
    unscored = sample.reward is None and sample.void
    if not unscored and not (type(sample.reward) is float and math.isfinite(sample.reward)):
        raise ValueError(f"{where}: its reward is {quoted(sample.reward)}")
    _check_reward(sample, where)
    for segment in sample.segments:
        _check_segment(segment, where)


def _check_reward(sample: Sample, where: str) -> None:
    """Parts and turns are numbers of this sample, which its reward is the sum of."""
    numbers = [x for part in sample.parts for x in (part.value, part.weight)]
    numbers += [turn.reward for turn in sample.turn_rewards]
    places = [turn.token for turn in sample.turn_rewards]
    inside = all(type(place) is int and 0 <= place < sample.trained_tokens for place in places)
    if (
        not all(type(x) is float and math.isfinite(x) for x in numbers)
        or not inside
        or places != sorted(places)
    ):
        raise ValueError(f"{where}: parts or turns of its reward are none")
    if not all(isinstance(part.name, str) for part in sample.parts):
        raise ValueError(f"{where}: a part of its reward has no name")


def _check_segment(segment: Segment, where: str) -> None:
    tokens, trained, context = len(segment.token_ids), len(segment.log_probs), len(segment.context)
    if segment.trained is not None and int(np.sum(segment.trained)) != trained:
        raise ValueError(f"{where}: a mask of other tokens")
    edges = [0, *(span.end for span in segment.versions)]
    starts = [span.start for span in segment.versions]
    numbers = all(re.fullmatch(r"[0-9]{1,18}", span.version) for span in segment.versions)
    if starts != edges[:-1] or edges != sorted(edges) or edges[-1] != trained or not numbers:
        raise ValueError(f"{where}: weight versions of other tokens")
    if segment.experts is not None and len(segment.experts) != context + tokens - 1:
        raise ValueError(f"{where}: experts of other tokens")
