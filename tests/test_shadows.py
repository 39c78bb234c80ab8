"""What lies in the current directory, or that it is gone, is no surprise to the processes of a run."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_rl.errors import ConfigError
from mcore_rl.imports import python_module
from mcore_rl.launch.first_look import _look_at_function
from mcore_rl.training.faults.exits import typed
from tests.sources import READERS, ROOT, modules

pytestmark = READERS

CHILD = """
import os, subprocess, sys
from mcore_rl.imports import python_module
sys.path.append(os.getcwd())  # as of a process that has found a function of the user's
sys.exit(subprocess.run([*python_module("mcore_rl.rewards"), "0", "0"]).returncode)
"""


@pytest.mark.parametrize("safe", [True, False], ids=["the script", "python -m"])
def test_a_module_with_the_name_of_anothers_is_found_as_the_command_finds_it(
    tmp_path: Path, *, safe: bool
) -> None:
    """The parent starts as `mcore-rl` does, without the current directory on its path, and as -m does."""
    for name in ("types", "random", "resource"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('shadowed')")
    words = [sys.executable, "-P", "-c", CHILD] if safe else [sys.executable, "-m", "mcore_rl.rewards"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert ("process 0, which started this worker, has ended" in done.stderr) == safe, done.stderr
    assert ("shadowed" in done.stderr) == (not safe)


def test_who_has_the_current_directory_first_gives_it_on(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for first, options in (("", []), (str(tmp_path), []), (str(ROOT / "gone"), ["-P"])):
        monkeypatch.setattr(sys, "path", [first, *sys.path])
        assert python_module("a.b") == [sys.executable, *options, "-m", "a.b"]


def test_every_process_of_ours_is_started_so() -> None:
    """SGLang's alone is not: its interpreter is another one."""
    found = {
        file
        for file, tree in modules("mcore_rl").items()
        if any(isinstance(node, ast.Constant) and node.value == "-m" for node in ast.walk(tree))
    }
    assert found == {"mcore_rl/imports.py", "mcore_rl/rollout/processes.py"}


def test_a_module_that_another_one_hides_is_named(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("def made(sample):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    said = r"reward\.function: random \(/.*random\.py\) has no made; random\.py of the current .* rename it"
    with pytest.raises(ConfigError, match=said):
        _look_at_function("reward.function", "random:made", "the sample", keywords=False)
    (tmp_path / "random.py").unlink()
    with pytest.raises(ConfigError, match="did you mean uniform"):
        _look_at_function("reward.function", "random:uniforn", "the sample", keywords=False)


def test_a_current_directory_that_is_gone_is_named(monkeypatch, tmp_path: Path) -> None:
    here = tmp_path / "gone"
    here.mkdir()
    monkeypatch.chdir(here)
    other = FileNotFoundError(2, "No such file or directory", "/of/a/file")
    unnamed = FileNotFoundError(2, "No such file or directory")
    assert typed(unnamed) is unnamed
    here.rmdir()
    with pytest.raises(FileNotFoundError) as raised:
        Path("x").absolute()
    found = typed(raised.value)
    assert isinstance(found, ConfigError)
    assert "the current directory has been removed" in str(found)
    assert "cd to one that is there" in str(found)
    assert typed(other) is other
