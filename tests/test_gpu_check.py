"""tools/gpu_check.sh, rehearsed on a CPU: the code of the minutes on a GPU, with tiny shapes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_record import Record
from tests.e2e.ranks import Ranks
from tests.sources import ROOT

ABSENT = ("megatron", "jaxtyping", "transformers", "pydantic", "transformer_engine", "liger_kernel")
"""what a bare GPU machine lacks"""


def checked(out: Path, stages: str, **environment: str) -> int:
    command = ["bash", "tools/gpu_check.sh", "--rehearse", str(out), *stages.split()]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | environment
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, timeout=400, check=False)
    sys.stderr.write(done.stderr.decode()[-3000:])
    return done.returncode


def found(out: Path, stage: str) -> dict[str, Any]:
    (path,) = out.glob(f"gpu_{stage}_20*.json")
    return json.loads(path.read_text())


@pytest.mark.slow
def test_stage_1_needs_torch_alone_and_a_failed_stage_ends_no_other(tmp_path: Path) -> None:
    """Where Megatron and the rest cannot be imported, stage 2 fails, and stage 1 behind it measures all."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name.partition('.')[0] in {ABSENT!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    assert checked(tmp_path / "out", "2 1", PYTHONPATH=str(tmp_path)) == 1
    head = found(tmp_path / "out", "head")
    assert not list((tmp_path / "out").glob("gpu_step*"))
    assert head["errors"] == {}
    measured = head["measured"]
    assert measured["imported Megatron"] is False
    exact = measured["against float64"]
    assert exact["gradient"] < 0.02
    assert exact["log_prob"] < measured["control: at another temperature"]
    forms = {name.partition(" ")[2] for name in measured if name.startswith("64x32x512")}
    assert forms >= {"fused", "recompute", "score", "torch.compile", "MiB beside dL/dhidden"}


@pytest.mark.slow
@pytest.mark.xdist_group("e2e")
def test_stages_2_and_3_train(tmp_path: Path, ranks: Ranks) -> None:
    """What the script would start, by processes that need not import it all."""
    asked = tmp_path / "asked"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {asked}\n')
    python.chmod(0o755)
    assert checked(tmp_path, "2 3", PYTHON=str(python)) == 0
    commands = [line.split() for line in asked.read_text().splitlines()]
    assert [words[:2] for words in commands] == [["-m", "benchmarks.gpu_step"]] * 2
    for words in commands:
        done = ranks.run("benchmarks/gpu_step.py", *words[2:], world=0)
        assert done.returncode == 0, done.stderr
    for stage in ("step_portable", "step_engine"):
        answer = found(tmp_path, stage)
        assert answer["errors"] == {}
        step = answer["measured"]["bf16 step"]
        assert step["tokens_per_second"] > 0
        assert step["grad_norm"] > 0
        assert answer["measured"]["bf16 copies"]["mib"] > 0
    assert "needs a GPU" in found(tmp_path, "step_engine")["skipped"]["fp8"]


def test_a_failed_measurement_is_written_and_the_next_one_runs(tmp_path: Path) -> None:
    record = Record("x", tmp_path, rehearsal=True)
    assert record.measure("first", lambda: 1 / 0) is None
    assert record.measure("second", lambda: 7) == 7
    written = found(tmp_path, "x")
    assert written["errors"] == {"first": "ZeroDivisionError: division by zero"}
    assert written["measured"] == {"second": 7}
    assert record.failed == ["first"]


def test_no_record_is_written_over(tmp_path: Path) -> None:
    """Neither by a rehearsal of the same day, nor by a second run, nor by one that is killed as it writes."""
    real = [Record("x", tmp_path, rehearsal=False) for _ in range(2)]
    real[0].measure("speed", lambda: 7)
    rehearsed = Record("x", tmp_path, rehearsal=True)
    assert len({record.path for record in (*real, rehearsed)}) == 3
    assert rehearsed.path.stem.endswith("_rehearsal")
    real[0].found["measured"]["more"] = object()
    with pytest.raises(TypeError):  # it ends inside the write
        real[0]._write()
    assert json.loads(real[0].path.read_text())["measured"] == {"speed": 7}


@pytest.mark.parametrize("arguments", ["1 2", "--help", "OUT 1 4", "OUT/file/below 1"])
def test_what_cannot_work_is_refused_before_any_stage(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = arguments.replace("OUT", str(tmp_path)).split()
    done = subprocess.run(
        ["bash", "tools/gpu_check.sh", *words], cwd=ROOT, env=os.environ | {"PYTHON": "false"}, check=False
    )
    assert done.returncode == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_stage_too(number: int, status: int, tmp_path: Path) -> None:
    stage = tmp_path / "python"
    stage.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/pid.part\nmv {tmp_path}/pid.part {tmp_path}/pid\nsleep 300\n"
    )
    stage.chmod(0o755)
    script = subprocess.Popen(
        ["bash", "tools/gpu_check.sh", str(tmp_path), "1", "2"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": str(stage)},
        # Where tests are started in the background it is ignored, and bash cannot trap it then.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    for _ in range(600):
        if (tmp_path / "pid").exists():
            break
        time.sleep(0.05)
    began = int((tmp_path / "pid").read_text())
    script.send_signal(number)
    assert script.wait(timeout=30) == status
    with pytest.raises(ProcessLookupError):
        os.kill(began, 0)
    assert int((tmp_path / "pid").read_text()) == began, "no other stage began"
