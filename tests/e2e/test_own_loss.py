"""A loss in a file of the user's own: one run of the command trains by it and shows what it measures."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mcore_rl.__main__ import main
from mcore_rl.log import read_metrics
from mcore_rl.report import write_report
from tests.e2e.conftest import ROOT, Task
from tests.e2e.ranks import Ranks

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]
LOSS = "tests.losses.dppo:total_variation"


def test_a_loss_of_ones_own_trains_and_its_metrics_are_logged_and_shown(
    ranks: Ranks, task: Task, tmp_path: Path
) -> None:
    own = ["--algorithm.loss", LOSS, "--algorithm.params.delta", "0.05"]
    many = ["--rollout.prompts_per_step", "64"]  # a few right answers among them: groups with a signal
    tracked = ["--run.trackers", '["tensorboard"]']
    flags = [*many, "--run.dir", str(tmp_path), "--train.steps", "2", *own, *tracked]
    done = ranks.run("train", "examples/grpo_tiny.toml", *task.rl, *flags, world=2)
    assert done.returncode == 0, done.stderr
    _, *steps = read_metrics(tmp_path / "metrics.jsonl")
    assert len(steps) == 2
    for step in steps:
        assert 0 < step["dppo/masked"] < 1
        assert step["dppo/total_variation"] > 0.05
        assert "ratio/mean" not in step, "that is a metric of the losses that it replaces"
    assert steps[0]["reward/no_signal"] < 1
    assert steps[0]["grad_norm"] > 0
    assert steps[0]["publish/moved_max_abs"] > 0.01, "the servers sample from other weights than before"
    (events,) = (tmp_path / "tensorboard").iterdir()
    shown = EventAccumulator(str(events)).Reload().Scalars("dppo/masked")
    assert [(one.step, one.value) for one in shown] == [
        (step["step"], pytest.approx(step["dppo/masked"])) for step in steps
    ]
    page = write_report([tmp_path]).read_text()
    assert "dppo/masked" in page
    assert "dppo/total_variation" in page


def test_a_parameter_that_the_loss_does_not_have_is_refused(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    flags = ["--run.dir", str(tmp_path / "run"), "--algorithm.loss", LOSS]
    flags += ["--algorithm.params.eps_low", "0.1", "--model.path", str(tmp_path)]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n')
    rows = str(tmp_path / "rows.jsonl")
    flags += ["--data.train", rows, "--data.eval", rows]
    assert main(["train", "examples/grpo_tiny.toml", *flags]) == 2
    assert "algorithm.params.eps_low: grpo has no such parameter" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
