"""The project's own files, as the gates on them see it."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from mcore_rl.imports import uncollected

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("mcore_rl", "examples", "tools", "benchmarks", "tests")


READERS = pytest.mark.xdist_group("sources")
"""of tests that read many trees: one worker parses them"""


def modules(*rooms: str) -> dict[str, ast.Module]:
    """Path relative to the root -> syntax tree, of every Python file under `rooms` (all by default).

    Trees are shared: whoever would change one makes another.
    """
    found = {room: sorted((ROOT / room).rglob("*.py")) for room in rooms or ROOMS}
    assert all(found.values()), f"rooms without a file: {[room for room, its in found.items() if not its]}"
    parsed = _tree.cache_info().currsize
    with uncollected():  # collections that walk the trees took three quarters of the time
        trees = {str(file.relative_to(ROOT)): _tree(file) for its in found.values() for file in its}
    if _tree.cache_info().currsize > parsed:
        gc.collect()
        gc.freeze()
    return dict(sorted(trees.items()))


@cache  # most gates read the same rooms
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def length(node: ast.AST) -> int:
    """Lines of a function, decorators not counted."""
    return node.end_lineno - node.lineno + 1


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def report(problems: list[str]) -> None:
    """Fail with one problem a line."""
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
