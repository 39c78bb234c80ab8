"""docs/cases.md names a test for every case, and each of them exists."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
CASES = {"F": 26, "B": 15, "N": 8, "S": 9, "I": 14, "A": 13}
_ROW = re.compile(r"^\| ([FBNSIA])(\d+) \|.*$", re.MULTILINE)
_TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


def test_every_case_has_tests_that_exist() -> None:
    page = (ROOT / "docs" / "cases.md").read_text()
    rows = list(_ROW.finditer(page))
    assert Counter(row[1] for row in rows) == CASES
    assert len({row[1] + row[2] for row in rows}) == sum(CASES.values())
    assert [row[0][:5] for row in rows if not _TEST.search(row[0])] == []
    assert [named for named in _TEST.findall(page) if not exists(*named)] == []


def test_a_test_that_is_gone_would_be_seen() -> None:
    assert not exists("test_cases.py", "test_of_yesterday")
    assert not exists("test_no_file.py", "test_every_case_has_tests_that_exist")


def exists(file: str, test: str) -> bool:
    """Whether tests/FILE has a function of that name."""
    path = ROOT / "tests" / file
    if not path.is_file():
        return False
    return any(
        isinstance(node, ast.FunctionDef) and node.name == test for node in ast.parse(path.read_text()).body
    )
