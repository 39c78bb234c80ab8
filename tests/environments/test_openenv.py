"""openenv-core itself, in an environment of its own: its server, its client, and its rewards."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = ROOT / ".venv-openenv" / "bin"


@pytest.mark.slow
@pytest.mark.skipif(not BIN.exists(), reason="openenv-core is not installed; `make openenv` does it")
def test_episodes_on_the_packages_server_are_rollouts_with_its_own_rewards(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [BIN / "python", "-m", "tests.environments.openenv_episodes", out]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    right, wrong, fails, strange, nobody = json.loads(out.read_text())
    assert right["returned"] == {"openenv": [-0.1, 1.0]}
    hint = "\n<s>user:lower<e>\n<s>assistant:"
    assert right["trained"] == f"50<e>{hint}42<e>"
    assert wrong["returned"] == {"openenv": [-0.1, -0.1, -0.1]}
    assert wrong["asked"] == 3
    assert "what the environment cannot do" in fails["returned"]["raised"]
    assert "no object of what to reset with" in strange["returned"]["raised"]
    reason, why = nobody["returned"]
    assert (reason, nobody["asked"]) == ("openenv", 0)
    assert "ConnectionError" in why
