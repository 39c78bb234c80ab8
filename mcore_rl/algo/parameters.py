"""The keyword arguments of losses and advantages: their types, ranges and defaults."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mcore_rl.errors import ConfigError
from mcore_rl.terminal import quoted

Param = float | int | str | bool | None

_LARGEST = 1e6
_RANGES: Mapping[str, tuple[float, float]] = {
    "eps_low": (0.0, 1.0),
    "dual_clip": (1.0, _LARGEST),
    "tau_pos": (1e-3, _LARGEST),
    "tau_neg": (1e-3, _LARGEST),
    "gamma": (0.0, 1.0),
    "lam": (0.0, 1.0),
    "alpha": (0.0, 1.0),
    "lam_critic": (0.0, 1.0),
    "decay": (0.0, 1.0),
    "half_life": (1e-3, _LARGEST),
    "weight_low": (0.0, 1.0),
    "weight_high": (1.0, _LARGEST),
    "length_factor": (1e-6, _LARGEST),
    "fraction": (0.0, 1.0),
    "k": (1, _LARGEST),
    "kl_cap": (1e-6, _LARGEST),
    "kl_target": (1e-6, _LARGEST),
    "kl_horizon": (1.0, _LARGEST),
}
"""Inclusive ranges of parameters; all others run from 0 to _LARGEST."""


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only parameters of a loss or an advantage, by name."""
    every = inspect.signature(function).parameters.values()
    return {p.name: p for p in every if p.kind is inspect.Parameter.KEYWORD_ONLY}


def resolve(function: Callable[..., Any], params: Mapping[str, Param]) -> dict[str, Param]:
    """Every keyword argument of `function`: that of `params`, or its default."""
    return {name: params.get(name, p.default) for name, p in parameters(function).items()}


def types_of(function: Callable[..., Any]) -> dict[str, Any]:
    """name -> annotation of every keyword-only parameter; the type of its default where there is none."""
    found = {}
    for name, parameter in parameters(function).items():
        found[name] = hint = _hint(function, parameter)
        options = get_args(hint) if get_origin(hint) is not Literal else (str,)
        if not any(kind in (float, int, bool, str) for kind in (hint, *options)):
            called = getattr(function, "__name__", type(function).__name__)
            raise ConfigError(
                f"algorithm.params.{name}: {called} does not say that it is a number, a word or "
                "true or false; annotate the parameter (name: float = 1.0)"
            )
    return found


def _hint(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """The annotation of one parameter; the type of its default where it has none that can be resolved.

    Each is resolved by itself, since others may name what is imported for type checkers only. A partial and
    an object that is called have the annotations of the function behind them.
    """
    if parameter.annotation is parameter.empty:
        return type(parameter.default)
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function):
        function = function.__init__ if isinstance(function, type) else type(function).__call__
    names = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        return get_type_hints(SimpleNamespace(__annotations__={"it": parameter.annotation}), names)["it"]
    except (NameError, AttributeError, TypeError, SyntaxError):
        return type(parameter.default)


def checked(place: str, expected: Any, value: object) -> Any:
    """`value` if it is of the `expected` type and in range, whole numbers widened to float."""
    options = get_args(expected)
    if get_origin(expected) is Literal:
        if value not in options or isinstance(value, bool):
            raise ConfigError(f"{place}: {quoted(value)} is not one of {', '.join(map(str, options))}")
        return value
    kinds = options or (expected,)
    if any(kind in kinds and isinstance(value, kind) for kind in (bool, str, type(None))):
        return value
    if not {int, float} & set(kinds):
        raise ConfigError(f"{place}: {quoted(value)} is not {'true or false' if bool in kinds else 'a text'}")
    low, high = _RANGES.get(place.rpartition(".")[2], (0.0, _LARGEST))
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
        if float in kinds:
            return float(value)
        if value == int(value):
            return int(value)
    raise ConfigError(
        f"{place}: {quoted(value)} is not a {'whole ' * (float not in kinds)}number from {low:g} to {high:g}"
    )


def suggest(name: str, known: Mapping[str, Any]) -> str:
    """What to add to a message about an unknown `name`: the nearest known one, or all."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
