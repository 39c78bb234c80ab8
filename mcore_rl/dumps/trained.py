"""What the trainer made of a dumped step, token by token: a second file beside its groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_rl.dumps.archive import archive_bytes, malformed, read_archive

KIND = "trained tokens of mcore_rl, version 1"
_COLUMNS = ("old_log_probs", "log_probs", "advantages")
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TrainedTokens:
    """The trained tokens of one sample, or of all samples one after another; NaN where nobody computed it."""

    old_log_probs: Floats
    """[m] by the policy before the step's updates, or in the first of them"""
    log_probs: Floats
    """[m] by the policy in the last update that the token was in"""
    advantages: Floats
    """[m]"""

    @property
    def ratios(self) -> Floats:
        """[m] importance ratio of each token in its last update."""
        with np.errstate(over="ignore"):
            return np.exp(self.log_probs - self.old_log_probs)

    def part(self, start: int, end: int) -> TrainedTokens:
        """The tokens [start, end)."""
        return TrainedTokens(*(getattr(self, name)[start:end] for name in _COLUMNS))


def trained_bytes(ids: Sequence[str], ends: Sequence[int], tokens: TrainedTokens) -> bytes:
    """The file that `read_trained` reads: samples by their ids, and where the tokens of each end."""
    arrays = {name: getattr(tokens, name) for name in _COLUMNS}
    document = {"kind": KIND, "ids": list(ids)}
    return archive_bytes(document, {**arrays, "ends": np.array(ends, np.int64)})


def read_trained(path: Path) -> Mapping[str, TrainedTokens]:
    """Sample id -> what the trainer made of it; nothing where the step was not trained, or not to its end.

    Raises:
        DataError: something else wrote the file, or it is damaged.
    """
    if not path.exists():
        return {}
    document, arrays = read_archive(path, KIND)
    try:
        return _by_sample(document["ids"], arrays)
    except (LookupError, TypeError, ValueError) as error:
        raise malformed(path, error) from error


def _by_sample(ids: Any, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, TrainedTokens]:
    columns, ends = [arrays[name] for name in _COLUMNS], arrays["ends"]
    if any(column.dtype != np.float32 or column.ndim != 1 for column in columns) or ends.dtype != np.int64:
        raise ValueError("columns of another type")
    edges = [0, *ends.tolist()]
    if edges != sorted(edges) or any(len(column) != edges[-1] for column in columns):
        raise ValueError("columns of other tokens")
    tokens = TrainedTokens(*columns)
    parts = [tokens.part(start, end) for start, end in pairwise(edges)]
    found = dict(zip(ids, parts, strict=True))
    if not all(isinstance(id, str) for id in found):
        raise ValueError("a sample without an id")
    return found
