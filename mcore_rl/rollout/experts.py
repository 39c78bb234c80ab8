"""The experts that a server's tokens were sent to, as SGLang returns them (`return_routed_experts`)."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_rl.types import ExpertLayers


def parse_experts(encoded: str, of: ExpertLayers, tokens: int) -> npt.NDArray[np.integer]:
    """[tokens, layers, K] from base64 of int32; uint8 where that is enough, 0 in dense layers.

    Args:
        tokens: all of a sequence but the last, which the server has sampled and not read.

    Raises:
        ValueError: the size is another, or a token of a layer with experts has one that the model has not, or
            one twice.
    """
    raw = base64.b64decode(encoded, validate=True)
    shape = (tokens, len(of.sparse), of.per_token)
    if len(raw) != 4 * int(np.prod(shape)):
        raise ValueError(f"routed_experts: {len(raw)} bytes, not those of int32 {list(shape)}")
    experts = np.frombuffer(raw, "<i4").reshape(shape)
    check_experts(experts, of)
    kept = np.where(np.array(of.sparse)[:, None], experts, 0)
    return kept.astype(np.uint8 if of.experts <= 256 else np.int16)


def check_experts(experts: npt.NDArray[np.integer], of: ExpertLayers) -> None:
    """Raises ValueError where the model's routers cannot have chosen these, [tokens, layers, K]."""
    if experts.shape[1:] != (len(of.sparse), of.per_token):
        raise ValueError(
            f"routed_experts: {list(experts.shape)}, not [..., {len(of.sparse)}, {of.per_token}]"
        )
    chosen = np.sort(experts[:, np.array(of.sparse)], axis=-1)
    if chosen.size and not 0 <= chosen.min() <= chosen.max() < of.experts:
        raise ValueError(f"routed_experts: {chosen.min()} to {chosen.max()}, of {of.experts} experts")
    if (chosen[..., 1:] == chosen[..., :-1]).any():
        raise ValueError("routed_experts: a token has an expert twice")


def encode_experts(experts: npt.NDArray[np.integer]) -> str:
    """What `parse_experts` reads."""
    return base64.b64encode(experts.astype("<i4").tobytes()).decode()


def to_json(array: npt.NDArray[Any]) -> dict[str, Any]:
    """For a checkpoint or a dump: an array in the type that it has."""
    raw = array.astype(array.dtype.newbyteorder("<")).tobytes()
    return {
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "base64": base64.b64encode(raw).decode(),
    }


def from_json(saved: Mapping[str, Any]) -> npt.NDArray[Any]:
    """The array of `to_json`."""
    dtype = np.dtype(saved["dtype"])
    flat = np.frombuffer(base64.b64decode(saved["base64"]), dtype.newbyteorder("<"))
    return flat.reshape(saved["shape"]).astype(dtype)
