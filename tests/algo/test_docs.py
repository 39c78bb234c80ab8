"""docs/algorithms.md against the code: the functions, defaults and golden cases it names, and must name."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path

import pytest

import mcore_rl.algo
from benchmarks.learn_algorithms import CONTROL, Learned, line_of
from mcore_rl.__main__ import main
from mcore_rl.algo.algorithms import ALGORITHMS, Algorithm
from mcore_rl.algo.catalog import FORMULAS, KNOWN, as_markdown
from mcore_rl.algo.presets import PRESETS
from mcore_rl.algo.rows import DECLARED, Rows
from mcore_rl.verify.golden.command import _case_names
from mcore_rl.verify.golden.inputs import load

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "algorithms.md").read_text()
MODULES = {
    m.name: importlib.import_module(f"mcore_rl.algo.{m.name}")
    for m in pkgutil.iter_modules(mcore_rl.algo.__path__)
}
GOLDEN_CASES = {f"{file}/{name}" for file, name in _case_names(load(ROOT / "tests" / "golden"))}
PLUMBING = {
    *("algorithms.configure", "algorithms.has_critic"),
    *("parameters.parameters", "parameters.resolve", "parameters.types_of", "parameters.checked"),
    *("parameters.suggest", "rows.declared", "rows.marked_by", "rows.averaged_by", "rows.ahead_by"),
    *("readings.readings", "readings.mark", "readings.shared"),
    *("catalog.rows", "catalog.preset_rows", "catalog.as_markdown", "catalog.describe"),
}
"""public functions that are not mathematics"""


def tables(page: str) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """Header of a table -> its rows, tables of equal header joined."""
    found: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for block in re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE):
        header, _, *rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
            for line in block.splitlines()
        ]
        assert all(len(row) == len(header) for row in rows), block
        found.setdefault(tuple(header), []).extend(dict(zip(header, row, strict=True)) for row in rows)
    return found


def missing_functions(page: str) -> set[str]:
    """`module.name` in backticks that mcore_rl.algo does not have."""
    named = re.findall(rf"`((?:{'|'.join(MODULES)})\.(?!py\b)\w+)`", page)
    fields = {f"rows.{name}" for name in (*Rows.__dataclass_fields__, *dir(Rows), *DECLARED)}
    return {n for n in named if not hasattr(MODULES[n.split(".")[0]], n.split(".")[1]) and n not in fields}


def public_functions() -> set[str]:
    return {
        f"{module}.{name}"
        for module, content in MODULES.items()
        for name, value in vars(content).items()
        if inspect.isfunction(value) and value.__module__ == content.__name__ and not name.startswith("_")
        if f"{module}.{name}" not in PLUMBING
    }


def golden_cases(page: str) -> set[str]:
    return set(
        re.findall(
            r"\b(?:batch|advantages|value_gae|kl_entropy|policy_losses|preference|mismatch|layout|trajectories|distillation|entries)/(?:\w+/)?[\w.-]*\w",
            page,
        )
    )


def defaults(algorithm: Algorithm) -> dict[str, str]:
    settings = {
        name: getattr(algorithm, name)
        for name in ("kl_in_reward", "decoupled", "whiten", "kl_estimator")
        if getattr(algorithm, name) != getattr(Algorithm, name)
    }
    numbers = {**algorithm.loss_params, **algorithm.advantage_params, **settings}
    return {name: str(value) for name, value in numbers.items()}


def test_every_function_named_exists_and_every_function_is_named() -> None:
    assert missing_functions(PAGE) == set()
    assert len(public_functions()) > 30
    assert {name for name in public_functions() if f"`{name}`" not in PAGE} == set()


def test_every_golden_case_is_named_and_every_case_named_exists() -> None:
    assert golden_cases(PAGE) == GOLDEN_CASES


def test_every_formula_has_a_function() -> None:
    rows = tables(PAGE)[("formula", "function", "paper", "golden case")]
    assert len(rows) > 30
    assert all(re.fullmatch(r"(`\w+\.\w+`\s*)+", row["function"]) for row in rows)


def test_the_tables_of_other_names_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert as_markdown() in PAGE
    assert main(["algorithms", "--markdown"]) == 0
    assert capsys.readouterr().out == as_markdown() + "\n"
    assert set(KNOWN) == set(ALGORITHMS)
    assert {algorithm.loss.__name__ for algorithm in ALGORITHMS.values()} == set(FORMULAS)


def test_the_command_says_all_of_one_algorithm_or_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["algorithms", "trl-cispo"]) == 0
    shown = capsys.readouterr().out
    assert "correction=mis-sequence" in shown
    assert "2506.13585" in shown, "and of what it is a preset of"
    assert main(["algorithms"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {line.split(" ")[0] for line in listed} >= {*ALGORITHMS, *PRESETS}
    assert main(["algorithms", "trl-crispo"]) == 2
    assert "did you mean 'trl-cispo'" in capsys.readouterr().err


def test_the_table_of_algorithms_is_ALGORITHMS() -> None:
    rows = tables(PAGE)[("name", "policy loss", "advantage", "aggregation", "defaults", "source")]
    assert [row["name"] for row in rows] == [f"`{name}`" for name in ALGORITHMS]
    for row, algorithm in zip(rows, ALGORITHMS.values(), strict=True):
        assert row["aggregation"] == algorithm.aggregation
        for column, function in (("policy loss", algorithm.loss), ("advantage", algorithm.advantage)):
            module = function.__module__.rpartition(".")[2]
            assert row[column] == f"`{module}.{function.__name__}`"
        assert dict(pair.split("=") for pair in row["defaults"].strip("`").split()) == defaults(algorithm)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("`preference.kto`", "`preference.ktoo`"),
        ("`losses.value_loss`", "`losses`"),
        ("preference/rdpo", ""),
        ("layout/sft_estimate", "layout/sft_guess"),
    ],
)
def test_a_stale_page_is_seen(old: str, new: str) -> None:
    page = PAGE.replace(old, new)
    assert page != PAGE
    unnamed = {name for name in public_functions() if f"`{name}`" not in page}
    assert missing_functions(page) or unnamed or golden_cases(page) != GOLDEN_CASES


def test_a_loss_and_an_advantage_have_at_most_30_lines() -> None:
    functions = {f for entry in ALGORITHMS.values() for f in (entry.loss, entry.advantage)}
    lines = {f.__name__: len(inspect.getsource(inspect.unwrap(f)).splitlines()) for f in functions}
    assert len(lines) > 25
    assert not {name: count for name, count in lines.items() if count > 30}


def test_the_page_has_the_learning_runs_and_says_which_are_not_there() -> None:
    newest = max((ROOT / "benchmarks").glob("learn_algorithms_*.json"))
    runs = json.loads(newest.read_text())["runs"]
    assert newest.name in PAGE
    for name, found in runs.items():
        learned = Learned(*(tuple(found[key]) for key in ("accuracy", "greedy", "reward")))
        assert learned.verdict(name) == found["verdict"] == "ok"
        assert line_of(name, learned) in PAGE
    (said,) = re.findall(r"\| a learning run of (.*?) \|", PAGE) or [""]
    assert {*ALGORITHMS} - {*runs} == {*re.findall(r"`([^`]+)`", said)}
    same, worse = (0.4, 0.4), (0.4, 0.27)
    for three in ((worse, same, same), (same, worse, same), (same, same, worse)):
        assert Learned(*three).verdict("grpo") == "collapsed"
    assert Learned(same, same, same).verdict("grpo") == Learned(worse, same, same).verdict(CONTROL) == "ok"
    assert Learned(same, (0.4, 0.401), same).verdict(CONTROL) == "moved"
