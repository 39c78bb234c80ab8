"""Which layers see a window of the last tokens only, and the second rotary embedding that some of them have.

A window of W tokens is the token itself and the W - 1 before it, as transformers counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.fields import shown
from mcore_rl.terminal import listed

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Windows:
    """The window of a model and the layers that have it."""

    size: int = 0
    """tokens that a query sees, its own among them; 0 where no layer has a window"""
    layers: tuple[bool, ...] = ()
    """[layers] True where attention has the window; () where no layer has"""

    def of(self, layer: int) -> int | None:
        """The window of `layer` (from 0); None where it sees everything before it."""
        return self.size if self.layers and self.layers[layer] else None


NO_WINDOWS = Windows()


def _later(hf: Mapping[str, Any], layer: int) -> bool:
    return layer >= hf.get("max_window_layers", 28)


def _earlier_even(hf: Mapping[str, Any], layer: int) -> bool:
    return layer % 2 == 0 and layer < hf.get("max_window_layers", 28)


def _unturned(hf: Mapping[str, Any], layer: int) -> bool:
    turned = hf.get("no_rope_layers")
    return (layer + 1) % hf["no_rope_layer_interval"] == 0 if turned is None else not turned[layer]


PATTERNS: Mapping[str, Callable[[Mapping[str, Any], int], bool]] = {
    "all": lambda hf, layer: True,
    "later": _later,
    "earlier even": _earlier_even,
    "unturned": _unturned,
    "even": lambda hf, layer: layer % 2 == 0,
    "three of four": lambda hf, layer: (layer + 1) % 4 != 0,
    "by pattern": lambda hf, layer: (layer + 1) % hf.get("sliding_window_pattern", 6) != 0,
}
"""name -> whether a layer has the window where config.json does not tell `layer_types`"""


def read_windows(hf: Mapping[str, Any], pattern: str, where: str, *, switched: bool) -> Windows:
    """The windows of a config.json whose fields have their types; `where` begins every message.

    Args:
        pattern: key of PATTERNS; "" for a family that has no windows.
        switched: the family has `use_sliding_window`, and no window where that is false.

    Raises:
        ConfigError: layer_types of another kind, of another number, or that contradict the window.
    """
    layers, kinds = hf["num_hidden_layers"], hf.get("layer_types", [])
    _check_kinds_of_layers(kinds, layers, where, windows=bool(pattern))
    size = hf.get("sliding_window") if pattern else None
    on = size is not None and (not switched or hf.get("use_sliding_window", False))
    if on and size == 0:
        with_switch = " with use_sliding_window = true" if switched else ""
        raise ConfigError(
            f"{where}: sliding_window = 0 is not supported{with_switch}, only 1 and more, or null"
        )
    if kinds and pattern != "all":
        windowed = tuple(kind == SLIDING for kind in kinds)
        if any(windowed) and not on:
            why = "use_sliding_window = false" if switched and size is not None else "sliding_window = null"
            raise ConfigError(
                f"{where}: layer_types names {SLIDING}, and {why}; correct the one that is wrong"
            )
    else:
        windowed = tuple(on and PATTERNS[pattern](hf, layer) for layer in range(layers))
        if kinds and any((kind == SLIDING) != on for kind in kinds):
            raise ConfigError(
                f"{where}: layer_types = {shown(kinds)} contradict sliding_window = {shown(size)}, which is "
                f"of all layers of {hf['model_type']!r}; correct the one that is wrong"
            )
        if not kinds and pattern not in ("", "all") and not switched and size is None:
            raise ConfigError(f"{where}: sliding_window = null is not supported with {hf['model_type']!r}")
    return Windows(size or 0, windowed) if any(windowed) else NO_WINDOWS


def _check_kinds_of_layers(kinds: list[str], layers: int, where: str, *, windows: bool) -> None:
    known = (FULL, SLIDING) if windows else (FULL,)
    others = sorted(set(kinds) - set(known))
    if others:
        raise ConfigError(
            f"{where}: layer_types {listed(others)} are not supported, only {' and '.join(known)}"
        )
    if kinds and len(kinds) != layers:
        raise ConfigError(
            f"{where}: layer_types names {len(kinds)} layers, num_hidden_layers is {layers}; correct the one "
            "that is wrong"
        )


def two_ropes(
    hf: Mapping[str, Any], where: str, theta: float, local_theta: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields with the rotary parameters of layers without window, and with those of layers with one.

    transformers 5 writes `rope_parameters` with one object for each kind of layer; before, `rope_theta` and
    `rope_scaling` were of the layers without window, `rope_local_base_freq` of the others.

    Args:
        theta: what transformers takes for an absent theta of layers without window.
        local_theta: the same of layers with one.

    Raises:
        ConfigError: `rope_parameters` has another form, or numbers that transformers would read over.
    """
    rope = hf.get("rope_parameters", {})
    others = sorted(rope.keys() - {FULL, SLIDING})
    wrong = [kind for kind in (FULL, SLIDING) if not isinstance(rope.get(kind) or {}, dict)]
    if others or wrong:
        raise ConfigError(
            f"{where}: rope_parameters of {hf['model_type']!r} is one object for {FULL} and one for "
            f"{SLIDING}; {listed(others + wrong)} is none of them"
        )
    full, local = (dict(rope.get(kind) or {}) for kind in (FULL, SLIDING))
    base = hf.get("rope_local_base_freq", local_theta)
    told = hf.get("rope_theta")
    if theta == local_theta and told not in (None, theta) and "rope_theta" not in local:
        raise ConfigError(
            f"{where}: rope_theta = {shown(told)} is not supported outside of rope_parameters, only {theta}: "
            f"transformers takes it for {FULL} alone; write rope_parameters with both"
        )
    scaling = hf.get("rope_scaling", {}) | ({} if told is None else {"rope_theta": told})
    if any(full.get(name, value) != value for name, value in scaling.items()):
        raise ConfigError(f"{where}: rope_parameters contradicts rope_scaling or rope_theta; keep one")
    rest = {name: value for name, value in hf.items() if name not in ("rope_theta", "rope_scaling")}
    full = {"rope_theta": theta} | full | scaling
    return {**rest, "rope_parameters": full}, {**rest, "rope_parameters": {"rope_theta": base} | local}
