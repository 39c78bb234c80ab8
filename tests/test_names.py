"""A name means one thing: no two classes of the library share one. A docstring begins with its subject."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Mapping

from mcore_rl.config import Config
from tests.sources import READERS, modules, report

pytestmark = READERS

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

PRIVATE = frozenset({"Ahead", "Held", "Judge", "Standing", "apart", "ending", "of_all", "settle", "together"})
"""names that only those who gave them understood; the field has a word for each"""


DOTTED = re.compile(r"(?<![\w./-])[a-z_]+(?:\.[A-Za-z]\w+)+(?![\w/])(?!\.\w)")
FILES = (".html", ".json", ".jsonl", ".npz", ".py", ".safetensors", ".toml")
VARIABLES = frozenset({"server"})
"""what a dotted name may begin with although a package has that name"""
KEYS = frozenset(
    f"{section}.{key}"
    for section, field in Config.model_fields.items()
    for key in getattr(field.annotation, "model_fields", ())
)


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


def names_of(tree: ast.Module) -> frozenset[str]:
    """What a module defines, methods and fields of its classes included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED[1:]):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return frozenset(found)


def dead_references(path: str, tree: ast.AST, defined: Mapping[str, frozenset[str]]) -> list[str]:
    """Docstrings that name `package.module.name` where there is none; `defined`: module -> its names.

    Keys of the configuration and files look alike: they are left.
    """
    packages = {name.partition(".")[0] for name in defined} - VARIABLES
    said = (n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
    problems = []
    for node in said:
        for found in DOTTED.findall(str(node.value.value)):
            parts = found.split(".")
            if parts[0] not in packages or found in KEYS or found.endswith(FILES):
                continue
            prefixes = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
            module = next((name for name in prefixes if name in defined), "")
            if not module or not set(parts[module.count(".") + 1 :]) <= defined[module]:
                problems.append(f"{path}:{node.lineno}: there is no {found}")
    return problems


def defined_in_library() -> dict[str, frozenset[str]]:
    named = {
        path.removeprefix("mcore_rl/").removesuffix(".py"): tree for path, tree in modules("mcore_rl").items()
    }
    return {name.removesuffix("/__init__").replace("/", "."): names_of(tree) for name, tree in named.items()}


def test_docstrings_name_modules_that_exist() -> None:
    defined = defined_in_library()
    report(
        [
            problem
            for path, tree in modules("mcore_rl").items()
            for problem in dead_references(path, tree, defined)
        ]
    )


def test_the_gate_sees_a_dead_reference() -> None:
    defined = {"algo": frozenset[str](), "algo.losses": frozenset({"ppo"})}
    for text, dead in (
        ("See algo.losses.ppo.", 0),
        ("See algo.losses.", 0),
        ("See algo.returns.", 1),
        ("See algo.losses.grpo.", 1),
        ("Read torch.nn.", 0),
    ):
        assert len(dead_references("a.py", ast.parse(f'"""{text}"""\n'), defined)) == dead, text


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
