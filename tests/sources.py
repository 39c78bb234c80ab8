"""The project's own files, as the gates on them see it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("mcore_rl", "examples", "tools", "benchmarks", "tests")


@cache  # most gates read the same rooms
def modules(*rooms: str) -> dict[str, ast.Module]:
    """Path relative to the root -> syntax tree, of every Python file under `rooms` (all by default)."""
    found = {room: sorted((ROOT / room).rglob("*.py")) for room in rooms or ROOMS}
    assert all(found.values()), f"rooms without a file: {[room for room, its in found.items() if not its]}"
    files = sorted(file for its in found.values() for file in its)
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text(), str(file)) for file in files}


def length(node: ast.AST) -> int:
    """Lines of a function, decorators not counted."""
    return node.end_lineno - node.lineno + 1


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def report(problems: list[str]) -> None:
    """Fail with one problem a line."""
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)
