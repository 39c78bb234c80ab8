"""Groups as a few arrays: what a replica's lead hands to its ranks, and replicas to each other.

Eight bytes a token (and its experts, where routing is replayed), and no Python object per token. Prompts
travel by their ids, since every rank has read them; texts do not travel, since rewards have been given.

Legend: N samples, S segments of all of them, R tokens of all segments, M of them trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import numpy.typing as npt

from mcore_rl.types import Group, Prompt, RewardPart, Sample, Segment, Tokens, TurnReward, VersionSpan

Spans = list[tuple[str, int, int]]
Flat = tuple[str, str, float | None, bool, list[Spans]]
Detailed = tuple[str, str, float | None, bool, list[Spans], tuple[RewardPart, ...], tuple[TurnReward, ...]]
_NOTHING = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Columns:
    """Groups and their samples, in order."""

    groups: list[tuple[str, str, int]]
    """(group id, prompt id where it has samples, how many)"""
    samples: list[Flat | Detailed]
    """[N] (id, finish reason, reward, void, of each segment [(version, start, end)]), and parts and turns
    of the reward where it has any"""
    ends: npt.NDArray[np.int64]
    """[4, S] where the tokens, the trained tokens, the context and the rows of experts of each segment end"""
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
    contexts = [_own_context(sample, segment) for sample in samples for segment in sample.segments]
    lengths = [
        (len(s.token_ids), len(s.log_probs), len(context), 0 if s.experts is None else len(s.experts))
        for s, context in zip(segments, contexts, strict=True)
    ]
    return Columns(
        groups=[(group.id, _prompt_id(group), len(group.samples)) for group in groups],
        samples=[_detailed(s) if s.parts or s.turn_rewards else _flat(s) for s in samples],
        ends=np.cumsum(np.array(lengths, np.int64).reshape(-1, 4), axis=0).T,
        tokens=_join([s.token_ids for s in segments], np.int32),
        log_probs=_join([s.log_probs for s in segments], np.float32),
        trained=_join([s.trained for s in segments if len(s.log_probs) < len(s.token_ids)], np.bool_),
        contexts=_join(contexts, np.int32),
        experts=_join_experts([s.experts for s in segments if s.experts is not None]),
    )


def unpack_groups(columns: Columns, prompts: Mapping[str, Prompt]) -> list[Group]:
    """The groups again, without texts; tokens and log-probs are views of the columns.

    Args:
        prompts: id -> prompt, of all that the groups name.
    """
    samples, places = iter(columns.samples), _places(columns)
    return [
        Group(id, tuple(_sample(columns, prompts[prompt], next(samples), places) for _ in range(count)))
        for id, prompt, count in columns.groups
    ]


def _prompt_id(group: Group) -> str:
    return group.samples[0].prompt.id if group.samples else ""


def _own_context(sample: Sample, segment: Segment) -> Tokens:
    """Nothing where it is the prompt, which every rank has."""
    return _NOTHING if segment.context is sample.prompt.token_array else segment.context


def _flat(s: Sample) -> Flat:
    return s.id, s.finish_reason, s.reward, s.void, _spans(s)


def _detailed(s: Sample) -> Detailed:
    return *_flat(s), s.parts, s.turn_rewards


def _spans(sample: Sample) -> list[Spans]:
    return [[(span.version, span.start, span.end) for span in s.versions] for s in sample.segments]


def _slices(ends: npt.NDArray[np.int64]) -> Iterator[slice]:
    return (slice(start, end) for start, end in pairwise([0, *ends.tolist()]))


def _places(columns: Columns) -> Iterator[tuple[slice, slice, slice, slice, slice | None]]:
    """Where each segment's tokens, trained tokens, context, experts and mask (if it has one) are."""
    masks = 0
    for tokens, trained, context, routed in zip(*map(_slices, columns.ends), strict=True):
        length = tokens.stop - tokens.start
        if trained.stop - trained.start == length:
            yield tokens, trained, context, routed, None
        else:
            yield tokens, trained, context, routed, slice(masks, masks + length)
            masks += length


def _sample(columns: Columns, prompt: Prompt, row: tuple, places: Iterator[tuple]) -> Sample:
    id, finish_reason, reward, void, spans = row[:5]
    segments = [
        Segment(
            columns.contexts[context] if context.start < context.stop else prompt.token_array,
            columns.tokens[tokens],
            columns.log_probs[trained],
            tuple([VersionSpan(version, start, end) for version, start, end in of_segment]),
            None if mask is None else columns.trained[mask],
            columns.experts[routed] if routed.start < routed.stop else None,
        )
        for of_segment, (tokens, trained, context, routed, mask) in zip(
            spans, islice(places, len(spans)), strict=True
        )
    ]
    return Sample(id, prompt, tuple(segments), "", finish_reason, reward, void, *row[5:])


def _join_experts(parts: Sequence[npt.NDArray[np.integer]]) -> npt.NDArray[np.integer]:
    return np.concatenate(parts) if parts else np.zeros((0, 0, 0), np.uint8)


def _join(parts: Sequence, dtype: npt.DTypeLike) -> npt.NDArray:
    return np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype, casting="same_kind")
