"""Which lines of JSON look wrong as bytes, many at a time: what is cheap to see without reading them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import numpy as np
import numpy.typing as npt

_LINE_FEED, _RETURN, _SPACE_BAR, _OPEN, _CLOSE = b"\n\r {}"


def look_wrong(
    data: bytes, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], keys: Sequence[bytes]
) -> npt.NDArray[np.bool_]:
    """[lines] whether a line of `data` is no object at first sight, not UTF-8, or lacks one of the keys.

    A line that looks wrong may be right: a key may be written with escapes. At most the first line of all
    that are not UTF-8 is named.

    Args:
        starts, ends: of each line, which is not blank.
        keys: in quotes, as a line has them.
    """
    wrong = _no_objects(data, starts, ends) | _undecodable(data, starts)
    places = starts.tolist(), ends.tolist()
    for key in keys:
        wrong |= np.fromiter(map(data.find, repeat(key), *places), np.int64, len(starts)) < 0
    return wrong


def _no_objects(
    data: bytes, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """[lines] whether one does not stand between { and }, or holds a control character."""
    characters = np.frombuffer(data, np.uint8)
    last = ends - 1
    last = last - (characters[last] == _RETURN)  # lines of Windows
    wrong = (characters[starts] != _OPEN) | (characters[np.maximum(last, 0)] != _CLOSE)
    control = np.flatnonzero((characters < _SPACE_BAR) & (characters != _LINE_FEED) & (characters != _RETURN))
    wrong[np.searchsorted(starts, control, side="right") - 1] = True
    return wrong


def _undecodable(data: bytes, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """[lines] True for the first that is not UTF-8."""
    wrong = np.zeros(len(starts), np.bool_)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        wrong[np.searchsorted(starts, error.start, side="right") - 1] = True
    return wrong
