"""Tokens of a rollout that are older than the bound: context of what came later, and not trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mcore_rl.types import Group, Sample, Segment, TurnReward, VersionSpan

_VOID = ("stale", "all its tokens are older than rollout.max_staleness")


def without_stale_tokens(group: Group, oldest: int) -> Group:
    """The group, of which no token that a version before `oldest` sampled is trained.

    A sample that has no other is void. The reward of a turn that ends with such a token came before all that
    is trained, and goes with it.
    """
    return replace(group, samples=tuple(_sample(one, oldest) for one in group.samples))


def stale_tokens(before: Group, after: Group) -> int:
    """How many tokens of `before` are not trained in `after`."""
    return _trained(before) - _trained(after)


def _trained(group: Group) -> int:
    return sum(one.trained_tokens for one in group.samples if not one.void)


def _sample(sample: Sample, oldest: int) -> Sample:
    kept = [_kept(segment, oldest) for segment in sample.segments]
    if sample.void or all(one.all() for one in kept):
        return sample
    whole = np.concatenate(kept)
    pairs = zip(sample.segments, kept, strict=True)
    segments = tuple(_segment(segment, mask) for segment, mask in pairs if mask.any())
    if not segments:
        return replace(sample, reward=None, parts=(), turn_rewards=(), void=True, failure=_VOID)
    places = np.cumsum(whole) - 1
    turns = tuple(TurnReward(int(places[at]), reward) for at, reward in sample.turn_rewards if whole[at])
    return replace(sample, segments=segments, turn_rewards=turns)


def _kept(segment: Segment, oldest: int) -> np.ndarray:
    """[m] of the trained tokens, those that may be."""
    mask = np.zeros(len(segment.log_probs), np.bool_)
    for span in segment.versions:
        mask[span.start : span.end] = int(span.version) >= oldest
    return mask


def _segment(segment: Segment, kept: np.ndarray) -> Segment:
    if kept.all():
        return segment
    trained = np.ones(len(segment.token_ids), np.bool_) if segment.trained is None else segment.trained.copy()
    trained[np.flatnonzero(trained)] = kept
    counts = np.concatenate([[0], np.cumsum(kept)])
    spans = [VersionSpan(s.version, int(counts[s.start]), int(counts[s.end])) for s in segment.versions]
    return replace(
        segment,
        log_probs=np.asarray(segment.log_probs, np.float32)[kept],
        trained=trained,
        versions=tuple(span for span in spans if span.end > span.start),
    )
