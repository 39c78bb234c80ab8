""".ci/run says what ran, what failed, and what could not run and why; pip's own words decide."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sources import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

PIP = f"@{sys.executable} -m pip --isolated install --dry-run --quiet --no-index --no-build-isolation"
TOOLS = ("sh", "grep", "ls")

OLDER = 'case "$2" in *sys.exit*) exit 1 ;; *) echo "Python 3.11.7, megatron-core 0.16.1" ;; esac'
NEWER = "exit 0"
FOUND, ABSENT = "echo python3.12", "exit 1"
MADE, PASSES, FAILS = "@true", "@true", "@exit 3"
CASES = {
    "all pass": (FOUND, MADE, PASSES, 0, "make test-lane: passed in"),
    "the lane fails": (FOUND, MADE, FAILS, 1, "make test-lane: FAILED in"),
    "no Python": (ABSENT, MADE, PASSES, 0, "make test-lane: NOT RUN: no Python 3.12 to 3.14"),
    "not offered": (FOUND, f"{PIP} numpy==99", FAILS, 0, "NOT RUN: its packages cannot be had: ERROR: No"),
    "no end": (FOUND, "@sleep 60", FAILS, 0, "NOT RUN: its packages were not installed within 2 s"),
    "our fault": (FOUND, f"{PIP} .", PASSES, 1, "make test-lane: FAILED: .venv-lane cannot be installed"),
}
"""name -> (what .ci/lane-python does, how the environment is made, its tests, exit code, words at the end)"""


OTHERS = (("test-sglang", ".venv-sglang"), ("test-real", "runs/real"))


def checkout(directory: Path, found: str, made: str, tests: str, venv: str = OLDER) -> None:
    """The real .ci/run beside a Makefile whose targets do what is asked, and a package that pip refuses.

    `venv` answers what .ci/run asks the Python of .venv: whether it is 3.12 or newer.
    """
    script(directory / ".venv" / "bin" / "python", venv)
    script(directory / ".venv-lane" / "bin" / "python", f'exec {sys.executable} "$@"')
    script(directory / ".ci" / "lane-python", found)
    shutil.copy(ROOT / ".ci" / "run", directory / ".ci")
    rules = {"test": "@true", "setup-lane": made, "test-lane": tests}
    rules |= {"sglang-cpu": made, "test-sglang": tests, "real-model": made, "test-real": tests}
    lines = [f"{target}:\n\t{recipe}\n" for target, recipe in rules.items()]
    (directory / "Makefile").write_text(f".PHONY: {' '.join(rules)}\n" + "".join(lines))
    (directory / "pyproject.toml").write_text("[project\n")


def script(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def run(program: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    return subprocess.run(
        ["sh", program], env=inherited | environment, capture_output=True, text=True, timeout=90, check=False
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if PIP in CASES[name][1] else []) for name in CASES]
)
def test_what_it_says_and_when_it_is_red(name: str, tmp_path: Path) -> None:
    found, made, tests, code, words = CASES[name]
    checkout(tmp_path, found, made, tests)
    done = run(tmp_path / ".ci" / "run", INSTALL_SECONDS="2" if name == "no end" else "60")
    assert words in done.stdout
    assert "make test: passed in" in done.stdout
    for tier, environment in OTHERS if found == FOUND else ():  # the other optional tiers end the same way
        assert words.replace("test-lane", tier).replace(".venv-lane", environment) in done.stdout
    assert "s (Python 3.11.7, megatron-core 0.16.1)" in done.stdout
    assert done.returncode == code


def test_a_tier_has_its_time_and_is_not_begun_without_it(tmp_path: Path) -> None:
    checkout(tmp_path, FOUND, MADE, "@sleep 60")
    slow = run(tmp_path / ".ci" / "run", TIER_SECONDS="1")
    assert slow.stdout.count("FAILED in ") == 3
    assert slow.returncode == 1
    late = run(tmp_path / ".ci" / "run", TIER_SECONDS="10", LIMIT_SECONDS="9")
    assert late.stdout.count(" s are left of 9, and it may need 10") == 3
    assert late.returncode == 0


def test_one_lane_is_not_run_twice(tmp_path: Path) -> None:
    checkout(tmp_path, FOUND, MADE, PASSES, venv=NEWER)
    done = run(tmp_path / ".ci" / "run")
    assert "make test-lane: NOT RUN: make test itself ran on Python 3.12 or newer" in done.stdout
    assert done.returncode == 0


def test_a_python_is_taken_where_it_is_new_enough(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or pytest.skip(f"needs {tool}"))
    nothing = {"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path)}
    assert run(ROOT / ".ci" / "lane-python", **nothing).returncode != 0
    given = run(ROOT / ".ci" / "lane-python", PYTHON=sys.executable, **nothing)
    assert given.stdout.strip() == (sys.executable if sys.version_info >= (3, 12) else "")
    on_path = tmp_path / "bin" / "python3.12"
    script(on_path, "exit 0")  # the version check's answer of an interpreter that is new enough
    assert run(ROOT / ".ci" / "lane-python", **nothing).stdout.strip() == str(on_path)


@pytest.mark.xdist_group("together")
@pytest.mark.parametrize("number", range(2))
def test_groups_of_tests_stay_together(request: pytest.FixtureRequest, number: int) -> None:
    """Else every worker builds what a group shares: pytest 9.2 with pytest-xdist 3.8 does so in silence."""
    if request.config.getoption("loadgroup", None):
        assert request.node.nodeid.endswith("@together")
