"""The scripts of tools/: thin, with the exit codes of the command."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from mcore_rl.convert.command import hf_to_mcore
from mcore_rl.report.compare import main as compare_runs
from tests.sources import ROOT


def tool(name: str, *arguments: object) -> int:
    """The script's exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
    return int(end.value.code or 0)


def test_there_and_back(dense_source: Path, tmp_path: Path, capsys) -> None:
    mcore, back = tmp_path / "mcore", tmp_path / "back"
    assert tool("convert_hf_to_mcore.py", dense_source, mcore, "--tp", 2, "--json") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["direction"] == "hf-to-mcore"
    assert len(list(mcore.glob("*.distcp"))) == 2
    (mcore / "config.json").unlink()
    assert tool("convert_mcore_to_hf.py", mcore, back) == 2
    assert "config.json: not found" in capsys.readouterr().err
    assert tool("convert_mcore_to_hf.py", mcore, back, "--config", dense_source) == 0
    assert tool("verify_checkpoint.py", back, "--against", dense_source) == 0
    assert "equal to" in capsys.readouterr().out


def test_verify_says_what_is_wrong(dense_source: Path, tmp_path: Path, capsys) -> None:
    assert tool("verify_checkpoint.py", dense_source) == 2
    assert "no committed checkpoint" in capsys.readouterr().err
    hf_to_mcore(dense_source, tmp_path / "mcore")
    (tmp_path / "mcore" / "__0_0.distcp").write_bytes(b"")
    assert tool("verify_checkpoint.py", tmp_path / "mcore") == 2


def run_dir(directory: Path, *records: dict) -> Path:
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def test_runs_are_compared_without_their_times(tmp_path: Path, capsys) -> None:
    records = [{"step": i, "loss": 1.0 / (i + 1), "time/step": float(i)} for i in range(3)]
    one = run_dir(tmp_path / "one", *records)
    same = run_dir(tmp_path / "same", *[record | {"time/step": 9.0} for record in records[:2]])
    assert tool("compare_runs.py", one, same) == 0
    assert "2 steps compared, 0 metrics differ" in capsys.readouterr().out
    other = run_dir(tmp_path / "other", records[0], records[1] | {"loss": 0.5000001, "extra": 1.0})
    assert compare_runs([str(one), str(other)]) == 70
    printed = capsys.readouterr().out
    assert "loss: differs in 1 of 2 steps, first 1, by up to 2e-07" in printed
    assert "extra: differs in 1 of 2 steps, first 1, by up to inf" in printed
    assert compare_runs([str(one), str(tmp_path / "none")]) == 2


def test_a_step_that_one_run_lacks_is_seen(tmp_path: Path, capsys) -> None:
    records = [{"step": i, "loss": 1.0} for i in range(4)]
    one = run_dir(tmp_path / "one", *records)
    assert compare_runs([str(one), str(run_dir(tmp_path / "short", *records[:2]))]) == 0
    assert "in one run only: 2 of one and 0 of short" in capsys.readouterr().out
    assert compare_runs([str(one), str(run_dir(tmp_path / "gap", records[0], *records[2:]))]) == 70
    assert "step: differs in 1 of 3 steps, first 1" in capsys.readouterr().out


@pytest.mark.parametrize("rtol", ["nan", "inf", "-1", "1"])
def test_a_tolerance_with_which_nothing_would_differ_is_refused(tmp_path: Path, rtol: str) -> None:
    one, other = (run_dir(tmp_path / str(loss), {"step": 1, "loss": loss}) for loss in (1.0, 2.0))
    assert compare_runs([str(one), str(other), "--rtol", rtol]) == 2
