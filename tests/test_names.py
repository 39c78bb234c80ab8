"""A name means one thing: no two classes of the library share one."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping

from tests.sources import modules, report


def shared_names(trees: Mapping[str, ast.AST]) -> list[str]:
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path}:{node.lineno}")
    return [f"{name} is {' and '.join(its)}: rename one" for name, its in places.items() if len(its) > 1]


def test_no_two_classes_share_a_name() -> None:
    report(shared_names(modules("mcore_rl")))


def test_the_gate_sees_a_shared_name() -> None:
    tree = ast.parse("class Run:\n    pass\n")
    assert len(shared_names({"a.py": tree, "b.py": tree})) == 1
    assert not shared_names({"a.py": tree})
