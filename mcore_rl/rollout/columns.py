"""Groups as a few arrays: what a replica's lead hands to its ranks, and replicas to each other.

Eight bytes a token (and its experts, where routing is replayed), and no Python object per token. Prompts
travel by their ids, since every rank has read them; texts do not travel, since rewards have been given.

Legend: N samples, S segments of all of them, V version spans of all segments, R tokens of all segments, M of
them trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    masks = [s.trained if len(s.log_probs) < len(s.token_ids) else None for s in segments]
    lengths = (
        [len(context) for context in contexts],
        [len(s.token_ids) for s in segments],
        [len(s.log_probs) for s in segments],
        [len(s.versions) for s in segments],
        [0 if mask is None else len(mask) for mask in masks],
        [0 if s.experts is None else len(s.experts) for s in segments],
    )
    spans = [span for s in segments for span in s.versions]
    return Columns(
        groups=[(group.id, _prompt_id(group), len(group.samples)) for group in groups],
        samples=[_detailed(s) if s.parts or s.turn_rewards else _flat(s) for s in samples],
        ends=np.cumsum(np.array(lengths, np.int64), axis=1),
        versions=[span.version for span in spans],
        spans=np.array([[span.start for span in spans], [span.end for span in spans]], np.int64),
        tokens=join_arrays([s.token_ids for s in segments], np.int32),
        log_probs=join_arrays([s.log_probs for s in segments], np.float32),
        trained=join_arrays([mask for mask in masks if mask is not None], np.bool_),
        contexts=join_arrays(contexts, np.int32),
        experts=_join_experts([s.experts for s in segments if s.experts is not None]),
    )


def unpack_groups(columns: Columns, prompts: Mapping[str, Prompt]) -> list[Group]:
    """The groups again, without texts; tokens and log-probs are views of the columns.

    Args:
        prompts: id -> prompt, of all that the groups name.
    """
    samples: Iterator[tuple[Any, ...]] = iter(columns.samples)
    segments = _segments(columns)
    return [
        Group(id, tuple(_sample(prompts[prompt], segments, *next(samples)) for _ in range(count)))
        for id, prompt, count in columns.groups
    ]


def _prompt_id(group: Group) -> str:
    return group.samples[0].prompt.id if group.samples else ""


def _segments(columns: Columns) -> Iterator[tuple]:
    """The fields of every segment, in their order; no context where it is the prompt."""
    spans = tuple(map(VersionSpan, columns.versions, *columns.spans.tolist()))
    arrays = (columns.contexts, columns.tokens, columns.log_probs, spans, columns.trained, columns.experts)
    absent = (None, columns.tokens[:0], columns.log_probs[:0], (), None, None)
    return zip(*map(_cut, arrays, columns.ends.tolist(), absent), strict=True)


def _cut(array: Any, ends: list[int], absent: Any) -> Iterator[Any]:
    if len(array) == 0:
        return repeat(absent, len(ends))
    return (array[start:end] if start < end else absent for start, end in pairwise([0, *ends]))


def _flat(s: Sample) -> Flat:
    return s.id, s.finish_reason, s.reward, s.void, len(s.segments)


def _detailed(s: Sample) -> Detailed:
    return *_flat(s), s.parts, s.turn_rewards


def _sample(
    prompt: Prompt,
    segments: Iterator[tuple],
    id: str,
    finish_reason: str,
    reward: float | None,
    void: bool,
    count: int,
    parts: tuple[RewardPart, ...] = (),
    turn_rewards: tuple[TurnReward, ...] = (),
) -> Sample:
    own = tuple(
        [
            Segment(prompt.token_array if context is None else context, *rest)
            for context, *rest in islice(segments, count)
        ]
    )
    return Sample(id, prompt, own, "", finish_reason, reward, void, parts, turn_rewards)


def _join_experts(parts: Sequence[npt.NDArray[np.integer]]) -> npt.NDArray[np.integer]:
    return np.concatenate(parts) if parts else np.zeros((0, 0, 0), np.uint8)
