"""verifiers itself, in an environment of its own: its client of OpenAI's API is older than the tests' own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".venv-verifiers" / "bin"
_UV = {"extra-index-url": "UV_INDEX", "index-url": "UV_DEFAULT_INDEX", "find-links": "UV_FIND_LINKS"}


def indexes() -> dict[str, str]:
    """Where pip finds packages, told to uv, which verifiers starts its agents' programs with."""
    said = subprocess.run([BIN / "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    found = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for line in said.splitlines():
        key, _, value = line.partition("=")
        if name := _UV.get(key.rpartition(".")[2]):
            found[name] = value.strip("'")
    return found


@pytest.mark.slow
@pytest.mark.skipif(not BIN.exists(), reason="verifiers is not installed; `make verifiers` does it")
def test_episodes_of_the_package_are_rollouts_with_its_own_rewards(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    env = os.environ | indexes()
    env |= {"PATH": f"{BIN}:{env['PATH']}", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
    command = [BIN / "python", "-m", "tests.environments.verifiers_episodes", out]
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert [row["prompt"] for row in found["rows"]] == [
        [{"role": "user", "content": f"{n}+{n}?"}] for n in (2, 3, 4)
    ]
    for one, said, right in zip(
        found["episodes"], ("It is 4.", "It is 5.", "8"), (2.0, 0.0, 2.0), strict=True
    ):
        assert one["returned"] == {"correct": right, "length": pytest.approx(-0.01 * len(said))}
        assert (one["trained"], one["turns"]) == (f"{said}<e>", 1)
