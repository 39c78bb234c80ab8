"""A name means one thing: no two classes of the library share one. A docstring begins with its subject."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping

from tests.sources import modules, report

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

PRIVATE = frozenset({"Ahead", "Held", "Judge", "Standing", "apart", "ending", "of_all", "settle", "together"})
"""names that only those who gave them understood; the field has a word for each"""


def shared_names(trees: Mapping[str, ast.AST]) -> list[str]:
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path}:{node.lineno}")
    return [f"{name} is {' and '.join(its)}: rename one" for name, its in places.items() if len(its) > 1]


def private_words(path: str, tree: ast.AST) -> list[str]:
    named = (node for node in ast.walk(tree) if isinstance(node, DOCUMENTED[1:]) and node.name in PRIVATE)
    return [f"{path}:{node.lineno}: {node.name} says little: use the field's word" for node in named]


def headless(path: str, tree: ast.AST) -> list[str]:
    """Docstrings that begin with "Of" or "As": what is said of what, a reader has to guess from the name."""
    documented = (node for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    said = ((node, ast.get_docstring(node) or "") for node in documented)
    return [
        f"{path}:{node.body[0].lineno}: begin with the subject, not with {text.split()[0]!r}"
        for node, text in said
        if text.lower().startswith(("of ", "as "))
    ]


def test_no_two_classes_share_a_name() -> None:
    report(shared_names(modules("mcore_rl")))


def test_the_gate_sees_a_shared_name() -> None:
    tree = ast.parse("class Run:\n    pass\n")
    assert len(shared_names({"a.py": tree, "b.py": tree})) == 1
    assert not shared_names({"a.py": tree})


def test_docstrings_begin_with_their_subject() -> None:
    report([problem for path, tree in modules("mcore_rl").items() for problem in headless(path, tree)])


def test_the_gate_sees_a_docstring_without_a_subject() -> None:
    source = 'def tokens():\n    """{} of one step."""\n'
    assert len(headless("a.py", ast.parse(source.format("As those")))) == 1
    assert not headless("a.py", ast.parse(source.format("Tokens")))
    assert not headless("a.py", ast.parse(source.format("Ask for those")))


def test_no_private_word_is_a_name() -> None:
    report([problem for path, tree in modules("mcore_rl").items() for problem in private_words(path, tree)])


def test_the_gate_sees_a_private_word() -> None:
    assert len(private_words("a.py", ast.parse("class Held:\n    def settle(self): ...\n"))) == 2
    assert not private_words("a.py", ast.parse("def gather_ranks(): ...\n"))
