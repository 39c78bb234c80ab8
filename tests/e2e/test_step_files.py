"""How many files a GSPO step enters: a thought that is cut in two is two files for whoever reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.ranks import Ranks
from tests.e2e.step_files import STEP
from tests.e2e.test_ours import grpo

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]
AT_MOST = 62


def test_a_gspo_step_enters_few_files(ranks: Ranks, folder: Path, server_url: str, tmp_path: Path) -> None:
    flags = ["--train.steps", "1", "--checkpoint.every", "0", "--algorithm.name", "gspo"]
    out = tmp_path / "files.json"
    done = ranks.run(*grpo(folder, tmp_path / "run", *flags, url=server_url), STEP_FILES=str(out))
    assert done.returncode == 0, done.stderr
    files = json.loads(out.read_text())
    assert {*STEP, "rollout/client.py", "algo/losses.py", "parallel/head/passes.py"} <= files.keys()
    assert "training/publish.py" not in files, "that is after the step"
    assert len(files) <= AT_MOST, "\n".join(sorted(files))
