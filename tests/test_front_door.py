"""The public names of the package, and what importing them costs."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import mcore_rl
from examples.arithmetic import main as write_arithmetic
from mcore_rl import errors
from mcore_rl.errors import McoreRLError
from tests.launched import ENVIRONMENT
from tests.sources import ROOT


@pytest.mark.parametrize("name", mcore_rl.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(mcore_rl, name).__name__ == name
    assert name in dir(mcore_rl)


def test_every_typed_error_is_public() -> None:
    typed = {name for name, x in vars(errors).items() if isinstance(x, type) and issubclass(x, McoreRLError)}
    assert "StorageError" in typed
    assert typed <= set(mcore_rl.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        getattr(mcore_rl, "Trainer")  # noqa: B009  as a user would meet it


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import mcore_rl", "torch"),
        ("from mcore_rl import load_config, RewardFn, Sample", "torch"),
        ("import mcore_rl.plan.command", "megatron"),
    ],
)
def test_a_name_loads_only_what_it_needs(statement: str, absent: str) -> None:
    program = f"import sys\n{statement}\nprint({absent!r} in sys.modules)"
    words = [sys.executable, "-c", program]
    assert subprocess.run(words, capture_output=True, text=True, check=True, timeout=100).stdout == "False\n"


def cpu_seconds(*words: str) -> tuple[float, str]:
    """CPU-seconds of Python with these words, the least of two, and what it said on stderr."""
    found = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, timeout=200, check=False, cwd=ROOT
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found), ended.stderr


def test_a_wrong_key_is_said_before_anything_heavy_is_imported() -> None:
    took, said = cpu_seconds("-m", "mcore_rl", "train", "examples/gspo_tiny.toml", "--parallel.tensr", "2")
    assert "did you mean parallel.tensor?" in said
    assert took < 0.6


def test_a_plan_does_not_wait_for_megatron() -> None:
    took, said = cpu_seconds("-m", "mcore_rl", "plan", "examples/gspo_70b.toml", "--gpus", "64")
    assert not said
    assert took < 3.5


def test_the_clock_sees_an_import_of_megatron() -> None:
    assert cpu_seconds("-c", "import mcore_rl.parallel.mesh")[0] > 0.6


ONE_RANK = """
import json, sys, time
from mcore_rl.__main__ import main
code = main(sys.argv[1:])
heavy = {name for name in ("torch._dynamo", "torch._inductor", "wandb") if name in sys.modules}
print(json.dumps([code, time.process_time(), sorted(heavy)]))
"""


@pytest.mark.slow
def test_a_rank_trains_its_first_step_after_six_cpu_seconds(tmp_path: Path) -> None:
    assert write_arithmetic([str(tmp_path / "data"), "--seed", "0"]) == 0
    lines = (tmp_path / "data/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:64]))
    config = (ROOT / "examples/gspo_tiny.toml").read_text()
    kept = [line for line in config.splitlines() if not line.startswith(("eval", "warmup_steps"))]
    (tmp_path / "run.toml").write_text("\n".join(kept))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [
        *(sys.executable, "-c", ONE_RANK, "train", f"{tmp_path}/run.toml", "--run.dir", f"{tmp_path}/run"),
        *("--data.train", f"{tmp_path}/few.jsonl", "--model.path", f"{tmp_path}/data/model"),
        *("--model.random_init", "true", "--parallel.tensor", "1", "--train.steps", "1"),
        *("--rollout.prompts_per_step", "16", "--rollout.threads", "1"),
    ]
    ended = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | rank,
    )
    assert ended.returncode == 0, ended.stderr
    code, took, heavy = json.loads(ended.stdout.splitlines()[-1])
    assert code == 0, ended.stderr
    assert heavy == []
    assert took <= 6
