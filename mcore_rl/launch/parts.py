"""The parts that a reward function returns, read off its text where they stand there: it is not run.

A function is known where each of its `return`s is a number, `Void(...)` or a dict whose keys are texts. Of
any other one nothing is said; the parts of the first rewards are looked at, before anything is trained.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from difflib import get_close_matches

from mcore_rl.config import Config
from mcore_rl.errors import ConfigError
from mcore_rl.terminal import joined, short

_NUMBERS = {"float", "int", "bool"}
_NONE = {"Void"}
"""what is called for no reward"""


def weighed(config: Config) -> Iterator[tuple[str, dict[str, str]]]:
    """(`module:function`, {its part -> the part's name in reward.weights}) of what weights are given for."""
    r = config.reward
    if config.run.kind != "rl" or r.model is not None or config.environment.function is not None:
        return  # an environment may say parts of its own
    if not r.weights:
        return
    if not r.functions:
        yield r.function, {part: part for part in r.weights}
    for name, one in r.functions.items():
        own = {part.partition("/")[2]: part for part in r.weights if part.startswith(f"{name}/")}
        if own:
            yield one.function, own


def check_weights(name: str, tree: ast.Module, weights: dict[str, str], place: str) -> None:
    """Raises ConfigError for a weight of a part that the function is seen not to return."""
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    function = [node for node in found if node.name == name.partition(":")[2]]
    parts = returned_parts(function[-1]) if function else None
    for part, key in weights.items():
        if parts is None or part in parts:
            continue
        close = get_close_matches(part, parts, n=1)
        whole = {its: key.removesuffix(part) + its for its in parts}
        its = f"its parts are {joined(sorted(whole.values()))}" if parts else "it returns no parts"
        remedy = f"did you mean {whole[close[0]]}?" if close else "correct the name, or return the part"
        raise ConfigError(
            f"reward.weights: {name} has no part {short(key)}, whose weight would have no effect ({place}:"
            f"{function[-1].lineno}); {its}: {remedy}"
        )


def returned_parts(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str] | None:
    """Every part that it may return; None where that cannot be read off it."""
    if function.decorator_list:
        return None
    parts: set[str] = set()
    waiting: list[ast.AST] = [*function.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Return) and node.value is not None:
            its = _parts(node.value)
            if its is None:
                return None
            parts |= its
    return parts


def _parts(value: ast.expr) -> set[str] | None:
    """The parts of what is returned; None where it may be anything."""
    match value:
        case ast.Dict(keys=keys):
            names = [key.value for key in keys if isinstance(key, ast.Constant)]
            texts = {name for name in names if isinstance(name, str)}
            return texts if len(texts) == len(keys) else None
        case ast.Constant() | ast.Compare():
            return set()
        case ast.Call(func=ast.Name(id=called)) if called in _NUMBERS | _NONE:
            return set()
        case ast.IfExp(body=one, orelse=other):
            both = [_parts(one), _parts(other)]
            return None if None in both else {part for parts in both for part in parts or ()}
    return None
