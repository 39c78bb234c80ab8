"""Groups as a few arrays: what a replica's lead hands to its ranks, and replicas to each other.

Eight bytes a token (and its experts, where routing is replayed), and no Python object per token. Prompts
travel by their ids, since every rank has read them; texts do not travel, since rewards have been given.

Legend: N samples, S segments of all of them, V version spans of all segments, R tokens of all segments, M of
them trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise, repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_rl.types import Group, Prompt, RewardPart, Sample, Segment, TurnReward, VersionSpan, join_arrays

Flat = tuple[str, str, float | None, bool, int]
Detailed = tuple[str, str, float | None, bool, int, tuple[RewardPart, ...], tuple[TurnReward, ...]]
_NOTHING = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Columns:
    """Groups and their samples, in order."""

    groups: list[tuple[str, str, int]]
    """(group id, prompt id where it has samples, how many)"""
    samples: list[Flat | Detailed]
    """[N] (id, finish reason, reward, void, how many segments), and parts and turns of the reward where it
    has any"""
    ends: npt.NDArray[np.int64]
    """[6, S] where each segment's context, tokens, log-probs, version spans, mask and rows of experts end"""
    versions: list[str]
    """[V]"""
    spans: npt.NDArray[np.int64]
    """[2, V] the first trained token of each version span, and the one after its last"""
    tokens: npt.NDArray[np.int32]
    """[R]"""
    log_probs: npt.NDArray[np.float32]
    """[M]"""
    trained: npt.NDArray[np.bool_]
    """which tokens are trained, of the segments that do not train all of theirs"""
    contexts: npt.NDArray[np.int32]
    """those that are not the prompt"""
    experts: npt.NDArray[np.integer]
    """[rows, layers, K] one after another; a segment without has none"""


def pack_groups(groups: Sequence[Group]) -> Columns:
    """The columns of scored groups."""
    samples = [sample for group in groups for sample in group.samples]
    segments = [segment for sample in samples for segment in sample.segments]
    contexts = [
        _NOTHING if segment.context is prompt else segment.context
        for sample in samples
        for prompt in (sample.prompt.token_array,)  # which every rank has
        for segment in sample.segments
    ]
    tokens, log_probs = [s.token_ids for s in segments], [s.log_probs for s in segments]
    lengths = np.zeros((6, len(segments)), np.int64)
    lengths[:3] = [list(map(len, arrays)) for arrays in (contexts, tokens, log_probs)]
    lengths[3] = [len(s.versions) for s in segments]
    masks = [segments[i].trained for i in np.flatnonzero(lengths[2] < lengths[1])]
    lengths[4] = np.where(lengths[2] < lengths[1], lengths[1], 0)
    experts = [s.experts for s in segments if s.experts is not None]
    if experts:
        lengths[5] = [0 if s.experts is None else len(s.experts) for s in segments]
    spans = [span for s in segments for span in s.versions]
    versions, starts, stops = zip(*spans, strict=True) if spans else ((), (), ())
    return Columns(
        groups=[(group.id, _prompt_id(group), len(group.samples)) for group in groups],
        samples=[
            _detailed(s)
            if s.parts or s.turn_rewards
            else (s.id, s.finish_reason, s.reward, s.void, len(s.segments))
            for s in samples
        ],
        ends=np.cumsum(lengths, axis=1),
        versions=list(versions),
        spans=np.array((starts, stops), np.int64),
        tokens=join_arrays(tokens, np.int32),
        log_probs=join_arrays(log_probs, np.float32),
        trained=join_arrays(masks, np.bool_),
        contexts=join_arrays([context for context in contexts if context is not _NOTHING], np.int32),
        experts=_join_experts(experts),
    )


def unpack_groups(columns: Columns, prompts: Mapping[str, Prompt]) -> list[Group]:
    """The groups again, without texts; tokens and log-probs are views of the columns.

    Args:
        prompts: id -> prompt, of all that the groups name.
    """
    of_samples = [prompts[prompt] for _, prompt, count in columns.groups for _ in range(count)]
    segments = _segments(columns, of_samples)
    rows: Iterator[tuple[Any, ...]] = iter(columns.samples)
    samples = iter([_sample(p, segments, *row) for p, row in zip(of_samples, rows, strict=True)])
    return [Group(id, tuple(islice(samples, count))) for id, _, count in columns.groups]


def _prompt_id(group: Group) -> str:
    return group.samples[0].prompt.id if group.samples else ""


def _segments(columns: Columns, of_samples: Sequence[Prompt]) -> Iterator[Segment]:
    """Every segment, in their order; of the prompt of its sample, where it has no context of its own."""
    rows = zip(columns.versions, *columns.spans.tolist(), strict=True)
    spans = tuple(map(partial(tuple.__new__, VersionSpan), rows))  # a VersionSpan for each, in C
    arrays = (columns.contexts, columns.tokens, columns.log_probs, spans, columns.trained, columns.experts)
    absent = (None, columns.tokens[:0], columns.log_probs[:0], (), None, None)
    own, *rest = map(_cut, arrays, columns.ends.tolist(), absent)
    counts = [row[4] for row in columns.samples]
    contexts = [p.token_array for p, count in zip(of_samples, counts, strict=True) for _ in range(count)]
    if len(columns.contexts):
        contexts = [of if its is None else its for its, of in zip(own, contexts, strict=True)]
    return map(Segment, contexts, *rest)


def _cut(array: Any, ends: list[int], absent: Any) -> Iterator[Any]:
    if len(array) == 0:
        return repeat(absent, len(ends))
    return (array[start:end] if start < end else absent for start, end in pairwise([0, *ends]))


def _detailed(s: Sample) -> Detailed:
    return s.id, s.finish_reason, s.reward, s.void, len(s.segments), s.parts, s.turn_rewards


def _sample(
    prompt: Prompt,
    segments: Iterator[Segment],
    id: str,
    finish_reason: str,
    reward: float | None,
    void: bool,
    count: int,
    parts: tuple[RewardPart, ...] = (),
    turn_rewards: tuple[TurnReward, ...] = (),
) -> Sample:
    own = tuple(islice(segments, count))
    return Sample(id, prompt, own, "", finish_reason, reward, void, parts, turn_rewards)


def _join_experts(parts: Sequence[npt.NDArray[np.integer]]) -> npt.NDArray[np.integer]:
    return np.concatenate(parts) if parts else np.zeros((0, 0, 0), np.uint8)
