"""Small files, short functions: no file above 500 lines, no function above 80, and most far below."""

from __future__ import annotations

import ast
from statistics import median, quantiles

import pytest

from tests.sources import READERS, ROOT, functions, length, modules, report

pytestmark = READERS

MAX_FILE, MAX_FUNCTION = 500, 80
MEDIAN_FILE, NINE_OF_TEN_FUNCTIONS = 200, 40
MAX_LOSS = 30
WHOLE_FILES = ("preference.py", "distillation.py")
"""whose functions are losses, all of them"""


def oversized(path: str, lines: int, tree: ast.AST) -> list[str]:
    long = [f for f in functions(tree) if length(f) > MAX_FUNCTION]
    return [
        *([f"{path}: {lines} lines, at most {MAX_FILE}: split it"] if lines > MAX_FILE else []),
        *(f"{path}:{f.lineno}: {f.name} has {length(f)} lines, at most {MAX_FUNCTION}" for f in long),
    ]


def losses(path: str, tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The losses of a file: what returns a TokenLoss, or all functions of some files."""
    every = path.endswith(WHOLE_FILES)
    return [
        f
        for f in functions(tree)
        if every or (f.returns is not None and ast.unparse(f.returns) == "TokenLoss")
    ]


def long_losses(path: str, tree: ast.AST) -> list[str]:
    return [
        f"{path}:{f.lineno}: the loss {f.name} has {length(f)} lines, at most {MAX_LOSS}"
        for f in losses(path, tree)
        if length(f) > MAX_LOSS
    ]


def shape(file_lines: list[int], function_lines: list[int]) -> list[str]:
    """What is wrong with the distribution of lengths."""
    problems = []
    if median(file_lines) > MEDIAN_FILE:
        problems.append(f"the median file has {median(file_lines):.0f} lines, at most {MEDIAN_FILE}")
    if (p90 := quantiles(function_lines, n=10)[-1]) > NINE_OF_TEN_FUNCTIONS:
        problems.append(f"one function in ten has over {p90:.0f} lines, at most {NINE_OF_TEN_FUNCTIONS}")
    return problems


def count_lines(path: str) -> int:
    return len((ROOT / path).read_text().splitlines())


def test_no_file_and_no_function_is_too_long() -> None:
    report([p for path, tree in modules().items() for p in oversized(path, count_lines(path), tree)])


def test_most_files_and_functions_are_short() -> None:
    package = modules("mcore_rl")
    files = [n for path in package if (n := count_lines(path))]
    report(shape(files, [length(f) for tree in package.values() for f in functions(tree)]))


def test_a_loss_is_a_screen_at_most() -> None:
    """Whoever looks for a formula reads one function."""
    algo = modules("mcore_rl/algo")
    report([problem for path, tree in algo.items() for problem in long_losses(path, tree)])
    found = {f.name for path, tree in algo.items() for f in losses(path, tree)}
    assert {"ppo", "gspo", "vespo", "dppo_tv", "m2po", "fipo", "dpo", "sampled_reverse_kl"} <= found


@pytest.mark.parametrize(("lines", "found"), [(30, 0), (31, 1)])
def test_the_gate_sees_a_long_loss(lines: int, found: int) -> None:
    body = "    pass\n" * (lines - 1)
    assert len(long_losses("x.py", ast.parse("def mine() -> TokenLoss:\n" + body))) == found
    assert len(long_losses("preference.py", ast.parse("def mine():\n" + body))) == found
    assert not long_losses("x.py", ast.parse("def other():\n" + body))


@pytest.mark.parametrize(("lines", "found"), [(80, 0), (81, 1)])
def test_the_gate_sees_a_long_function(lines: int, found: int) -> None:
    source = "class A:\n    def long(self):\n" + "        pass\n" * (lines - 1)
    assert len(oversized("x.py", 500, ast.parse(source))) == found
    assert len(oversized("x.py", 501, ast.parse(source))) == found + 1


def test_the_gate_sees_a_bad_distribution() -> None:
    assert shape([100, 200, 300], [10] * 19 + [80]) == []
    assert len(shape([100, 201, 300], [10] * 8 + [60] * 2)) == 2
