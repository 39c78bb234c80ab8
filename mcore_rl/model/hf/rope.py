"""The rotary embedding that config.json asks for: its kind and numbers, or a refusal by a field's name.

Sources: arXiv 2104.09864 (rotary embeddings), 2306.15595 (linear), 2309.00071 (yarn), 2402.13753 (longrope),
2407.21783 section 3.4.1 (llama3). Defaults are those of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.fields import ROPE_KINDS, check_kinds
from mcore_rl.terminal import listed, quoted


@dataclass(frozen=True)
class Llama3:
    """Slow pairs are stretched, fast ones stay, those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int
    """longest sequence of the pretraining before the stretch"""


@dataclass(frozen=True)
class Linear:
    """Every pair turns `factor` times slower."""

    factor: float


@dataclass(frozen=True)
class Yarn:
    """Pairs of up to `slow` turns in the original context are stretched, those of `fast` and more are not."""

    factor: float
    fast: float
    slow: float
    original_positions: int
    whole_pairs: bool
    """the bounds of the blend are rounded outwards to whole pairs"""
    strength: float = 0.0
    """of the temperature that latent attention has in all channels (mscale_all_dim); 0 for none"""


@dataclass(frozen=True)
class LongRope:
    """A divisor for each pair, that of sequences within the original context."""

    divisors: tuple[float, ...]


@dataclass(frozen=True)
class Rotary:
    """How queries and keys are turned by their position."""

    theta: float
    channels: int
    """channels of a head that are turned, its first ones; the others stay"""
    scaling: Llama3 | Linear | Yarn | LongRope | None = None
    scale: float = 1.0
    """of the turned channels, of queries and of keys"""
    interleaved: bool = False
    """neighbours are a pair, instead of one channel of each half"""
    longest: int | None = None
    """tokens of a sequence up to which this is what the model computes; None for any length"""


_ORIGINAL = "original_max_position_embeddings"
ROPE_FIELDS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}),
    "yarn": frozenset(
        {
            "factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "attention_factor",
            "truncate",
            _ORIGINAL,
        }
    ),
    "longrope": frozenset({"factor", "short_factor", "long_factor", "attention_factor", _ORIGINAL}),
}
"""rope_type -> the fields that it reads"""
_NAMES = {"su": "longrope"}
"""names of published files for a kind"""


def read_rotary(
    hf: Mapping[str, Any],
    head_dim: int,
    where: str,
    *,
    theta: float,
    partial: float | None,
    kinds: Collection[str] = (),
) -> Rotary:
    """The rotary embedding of a config.json whose fields have their types; `where` begins every message.

    Args:
        theta: what transformers takes for an absent rope_theta.
        partial: the same of the share of a head that is turned; None where the family turns whole heads.
        kinds: rope types that the family has; all where none are told.

    Raises:
        ConfigError: an unknown kind, an unknown or contradictory field, or a number out of range.
    """
    rope = _joined(hf, where, theta, kinds or tuple(ROPE_FIELDS))
    kind = rope["rope_type"]
    share = rope.get("partial_rotary_factor")
    if partial is None and share not in (None, 1.0):
        raise ConfigError(f"{where}: partial_rotary_factor = {share} is not supported, only 1.0")
    share = (partial or 1.0) if share is None else share
    channels = int(head_dim * share)
    if channels < 2 or channels % 2:
        raise ConfigError(
            f"{where}: partial_rotary_factor = {share} turns {channels} of a head's {head_dim} channels, and "
            "rotary embeddings turn pairs; correct it, or num_attention_heads"
        )
    theta = float(rope["rope_theta"])
    limit = None
    if kind == "dynamic":
        # Beyond it the frequencies follow from the length of the sequence, so that no cached key stays valid.
        limit = _positive(hf, "max_position_embeddings", where)
    elif kind == "longrope":
        limit = rope[_ORIGINAL]
    scaling = _READ[kind](rope, channels, where) if kind in _READ else None
    return Rotary(theta, channels, scaling, _scale(kind, rope), longest=limit)


def _joined(hf: Mapping[str, Any], where: str, default: float, kinds: Collection[str]) -> dict[str, Any]:
    """One dictionary of rope_theta and rope_scaling of transformers 4, or of rope_parameters of 5."""
    theta, old, new = hf.get("rope_theta"), hf.get("rope_scaling", {}), hf.get("rope_parameters", {})
    for name, parameters in (("rope_scaling", old), ("rope_parameters", new)):
        check_kinds(parameters, ROPE_KINDS, f"{where}: {name}")
    rope = {"rope_theta": default if theta is None else theta} | old | new
    differ = any(name not in new or new[name] != value for name, value in old.items())
    if (old and new and differ) or theta not in (None, rope.get("rope_theta")):
        raise ConfigError(f"{where}: rope_parameters contradicts rope_scaling or rope_theta; keep one")
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = _NAMES.get(kind or "default", kind or "default")
    if kind not in kinds:
        raise ConfigError(
            f"{where}: rope_type {quoted(kind)} is not supported, only {', '.join(map(repr, kinds))}"
        )
    outside = {name: hf[name] for name in ("partial_rotary_factor", _ORIGINAL) if hf.get(name) is not None}
    for name, value in outside.items():
        if rope.get(name, value) != value:
            raise ConfigError(
                f"{where}: {name} = {value} contradicts the one beside rope_type {kind!r}; keep one"
            )
    wanted = ROPE_FIELDS[kind] | {"partial_rotary_factor"}
    rope = {name: value for name, value in outside.items() if name in wanted} | rope
    unknown = {n for n in rope.keys() - wanted - {"rope_theta", "rope_type", "type"} if rope[n] is not None}
    if unknown:
        raise ConfigError(
            f"{where}: rope fields {listed(sorted(unknown))} are not supported with rope_type {quoted(kind)}"
        )
    return _complete(rope | {"rope_type": kind}, hf, where)


def _complete(rope: dict[str, Any], hf: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`rope` without nulls, with the factor and the original length that follow from others."""
    rope = {name: value for name, value in rope.items() if value is not None}
    kind = rope["rope_type"]
    if kind in ("yarn", "longrope"):
        rope.setdefault(_ORIGINAL, hf.get("max_position_embeddings"))
        if rope[_ORIGINAL] is None:
            raise ConfigError(f"{where}: field {_ORIGINAL!r} is missing, and rope_type {kind!r} reads it")
        if kind == "longrope" and "factor" not in rope:
            rope["factor"] = _positive(hf, "max_position_embeddings", where) / rope[_ORIGINAL]
    return rope


def _positive(hf: Mapping[str, Any], name: str, where: str) -> int:
    if hf.get(name) is None:
        raise ConfigError(f"{where}: field {name!r} is missing, and the rotary scaling reads it")
    return hf[name]


def _scale(kind: str, rope: Mapping[str, Any]) -> float:
    """What turned channels are multiplied by: the root of attention's temperature."""
    if "attention_factor" in rope:
        return float(rope["attention_factor"])
    factor = rope.get("factor", 1.0)
    if kind == "yarn":
        over, under = rope.get("mscale"), rope.get("mscale_all_dim")
        return yarn_scale(factor, over) / yarn_scale(factor, under) if over and under else yarn_scale(factor)
    if kind == "longrope" and factor > 1:
        return math.sqrt(1 + math.log(factor) / math.log(rope[_ORIGINAL]))
    return 1.0


def yarn_scale(factor: float, strength: float = 1.0) -> float:
    """The scale of a stretch by `factor`, arXiv 2309.00071 equation 22; `strength` is DeepSeek's."""
    return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0


def _llama3(rope: Mapping[str, Any], channels: int, where: str) -> Llama3:
    scaling = Llama3(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_positions=rope[_ORIGINAL],
    )
    if not 0 < scaling.low_freq_factor < scaling.high_freq_factor or scaling.factor < 1:
        raise ConfigError(f"{where}: rope scaling needs 0 < low_freq_factor < high_freq_factor, factor >= 1")
    return scaling


def _linear(rope: Mapping[str, Any], channels: int, where: str) -> Linear:
    return Linear(float(rope["factor"]))


def _yarn(rope: Mapping[str, Any], channels: int, where: str) -> Yarn:
    fast, slow = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)
    if fast < slow or rope["rope_theta"] <= 1:
        raise ConfigError(f"{where}: rope_type 'yarn' needs beta_fast >= beta_slow and rope_theta > 1")
    whole, strength = rope.get("truncate", True), float(rope.get("mscale_all_dim", 0.0))
    return Yarn(float(rope["factor"]), fast, slow, rope[_ORIGINAL], whole, strength)


def _longrope(rope: Mapping[str, Any], channels: int, where: str) -> LongRope:
    for name in ("short_factor", "long_factor"):
        if len(rope[name]) != channels // 2:
            raise ConfigError(
                f"{where}: {name} has {len(rope[name])} numbers, but by hidden_size / num_attention_heads, "
                f"head_dim and partial_rotary_factor {channels // 2} pairs turn; fetch the file again"
            )
    return LongRope(tuple(map(float, rope["short_factor"])))


_READ = {"llama3": _llama3, "linear": _linear, "yarn": _yarn, "longrope": _longrope}
