"""Groups as a few arrays: what a replica's lead hands to its ranks, and replicas to each other.

Eight bytes a token, and no Python object per token. Prompts travel by their ids, since every rank has read
them; texts do not travel, since rewards have been given.

Legend: N samples, R tokens of all of them, n_i of sample i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mcore_rl.types import Group, Prompt, Sample, VersionSpan


@dataclass(frozen=True)
class Columns:
    """Groups and their samples, in order."""

    groups: list[tuple[str, str, int]]
    """(group id, prompt id where it has samples, how many)"""
    samples: list[tuple[str, str, float | None, list[tuple[str, int, int]]]]
    """[N] (id, finish reason, reward, [(version, start, end)])"""
    ends: npt.NDArray[np.int64]
    """[N] where the tokens of each sample end"""
    tokens: npt.NDArray[np.int32]
    """[R]"""
    log_probs: npt.NDArray[np.float32]
    """[R]"""


def pack_groups(groups: Sequence[Group]) -> Columns:
    """The columns of scored groups."""
    samples = [sample for group in groups for sample in group.samples]
    return Columns(
        groups=[(group.id, _prompt_id(group), len(group.samples)) for group in groups],
        samples=[
            (s.id, s.finish_reason, s.reward, [(span.version, span.start, span.end) for span in s.versions])
            for s in samples
        ],
        ends=np.cumsum([len(s.token_ids) for s in samples], dtype=np.int64),
        tokens=_join([s.token_ids for s in samples], np.int32),
        log_probs=_join([s.log_probs for s in samples], np.float32),
    )


def unpack_groups(columns: Columns, prompts: Mapping[str, Prompt]) -> list[Group]:
    """The groups again, without texts; tokens and log-probs are views of the columns.

    Args:
        prompts: id -> prompt, of all that the groups name.
    """
    bounds = pairwise([0, *columns.ends.tolist()])
    rest = iter(zip(columns.samples, bounds, strict=True))
    return [
        Group(id, tuple(_sample(columns, prompts[prompt], *next(rest)) for _ in range(count)))
        for id, prompt, count in columns.groups
    ]


def _prompt_id(group: Group) -> str:
    return group.samples[0].prompt.id if group.samples else ""


def _sample(columns: Columns, prompt: Prompt, row: tuple, bounds: tuple[int, int]) -> Sample:
    id, finish_reason, reward, spans = row
    mine = slice(*bounds)
    return Sample(
        id=id,
        prompt=prompt,
        token_ids=columns.tokens[mine],
        log_probs=columns.log_probs[mine],
        text="",
        finish_reason=finish_reason,
        versions=tuple(VersionSpan(*span) for span in spans),
        reward=reward,
    )


def _join(parts: Sequence, dtype: npt.DTypeLike) -> npt.NDArray:
    return np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype, casting="same_kind")
