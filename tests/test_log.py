"""The run's log: valid JSON whatever is logged, cut lines survived, resume exact to the step."""

import json
import time

import numpy as np
import pytest
import torch

from mcore_rl.errors import DataError
from mcore_rl.log import Progress, StepLog, Timers, append_event, clock, read_metrics
from mcore_rl.metric_names import held_out_word


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


def steps(run_dir):
    return [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")]


def test_scalars_of_every_kind_become_json(run_dir):
    log = StepLog(run_dir)
    metrics = {
        "a": np.float32(0.5),
        "b": torch.tensor(2),
        "c": np.int64(3),
        "d": True,
        "weight_version": "7",
        "é": 1,
    }
    log.write(3, metrics)
    expected = {"step": 3, "a": 0.5, "b": 2, "c": 3, "d": True, "weight_version": "7", "é": 1}
    assert read_metrics(run_dir / "metrics.jsonl") == [expected]


def test_numbers_that_json_lacks_are_null_and_named(run_dir):
    StepLog(run_dir).write(
        0, {"loss/policy": float("nan"), "ratio/max": torch.tensor(float("inf")), "ok": 1.0}
    )
    (line,) = (run_dir / "metrics.jsonl").read_text().splitlines()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads(line, parse_constant=refuse)
    assert record["loss/policy"] is None
    assert record["non_finite"] == ["loss/policy", "ratio/max"]
    assert record["ok"] == 1.0


@pytest.mark.parametrize("value", [torch.ones(2), np.zeros(1), [1], {"a": 1}, object()])
def test_what_is_no_scalar_is_a_bug_of_the_caller_and_writes_nothing(run_dir, value):
    log = StepLog(run_dir)
    with pytest.raises(TypeError, match="metric loss is a"):
        log.write(0, {"loss": value})
    assert steps(run_dir) == []


@pytest.mark.parametrize("name", ["step", "non_finite"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_metric_cannot_take_the_name_of_what_the_log_writes(run_dir, name, rank):
    log = StepLog(run_dir, rank=rank)
    with pytest.raises(ValueError, match=f"a metric is called '{name}', which the log writes"):
        log.write(5, {"a": 1.0, name: 77.0})
    assert rank or steps(run_dir) == []


def test_only_rank_0_writes(run_dir):
    log = StepLog(run_dir, rank=1)
    log.write(0, {"a": 1})
    log.event("saved")
    assert not run_dir.exists()


def test_the_reader_leaves_a_cut_line_out_at_every_length(run_dir):
    log = StepLog(run_dir)
    for step in range(3):
        log.write(step, {"a": step})
    path = run_dir / "metrics.jsonl"
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in range(1, len(last)):
        path.write_bytes(whole[:-cut])
        assert steps(run_dir) == [0, 1]


@pytest.mark.parametrize("cut", [0, 1, 5])
def test_a_resumed_log_goes_on_after_its_step(run_dir, cut):
    log = StepLog(run_dir)
    for step in range(5):
        log.write(step, {"a": step})
    path = run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: -cut or None])
    resumed = StepLog(run_dir, resume_step=2)
    assert steps(run_dir) == [0, 1, 2]
    resumed.write(3, {"a": 33})
    assert read_metrics(path)[-1] == {"step": 3, "a": 33}
    assert path.read_bytes().count(b"\n") == 4


def test_a_new_log_replaces_an_old_one_and_keeps_events(run_dir):
    first = StepLog(run_dir)
    first.write(0, {})
    first.event("saved", step=0)
    StepLog(run_dir)
    assert steps(run_dir) == []
    (event,) = read_metrics(run_dir / "events.jsonl")
    assert (event["kind"], event["step"]) == ("saved", 0)
    assert abs(event["time"] - time.time()) < 60


def test_an_event_after_a_cut_line_is_still_readable(run_dir):
    append_event(run_dir, "start", rank=0)
    path = run_dir / "events.jsonl"
    path.write_bytes(path.read_bytes() + b'{"time": 1, "ki')
    append_event(run_dir, "exit", code=70)
    append_event(run_dir, "exit", code=2)
    assert [event["kind"] for event in read_metrics(path)] == ["start", "exit", "exit"]


def test_a_missing_log_is_named(run_dir):
    with pytest.raises(DataError, match=r"metrics.jsonl: No such file"):
        read_metrics(run_dir / "metrics.jsonl")


def test_timers_add_up_and_start_anew(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def spend(timers, phase, seconds):
        with timers(phase):
            now[0] += seconds

    timers = Timers()
    spend(timers, "rollout", 2)
    spend(timers, "train", 3)
    spend(timers, "train", 1)
    now[0] += 0.5
    assert timers.collect() == {"time/rollout": 2, "time/train": 4, "time/step": 6.5}
    with pytest.raises(TypeError):
        spend(timers, "train", None)
    assert timers.collect() == {"time/train": 0, "time/step": 0}


def test_a_phase_inside_another_counts_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    timers = Timers()
    with timers("eval"):
        for inner in ("rollout", "reward"):
            with timers(inner):
                now[0] += 2
        now[0] += 1
    with timers("rollout"):
        now[0] += 3
    assert timers.collect() == {"time/eval": 5, "time/rollout": 3, "time/step": 8}


def test_the_line_of_progress():
    progress = Progress(60)
    metrics = {"reward/mean": 0.71234, "loss/policy": -0.00213, "time/step": 1.0, "grad_norm": 3}
    progress.line(11, metrics)
    line = progress.line(12, {**metrics, "time/step": 2.0, "eval/held_out/accuracy": 0.5})
    assert line == (
        "step 12/60  reward 0.7123  loss -0.00213  held_out accuracy 0.500  1.5 s/step  time left 1:12"
    )
    pairs = {"loss/reward_model": 0.3, "preference/accuracy": 0.75, "preference/margin": 1.0}
    held_out = {"validation/loss": 0.4, "validation/accuracy": 0.625, "validation/margin": 0.5}
    line = Progress(4).line(3, {**pairs, **held_out, "time/step": 1.0})
    assert line == (
        "step 3/4  loss 0.3  accuracy 0.75  validation loss 0.400  validation accuracy 0.625  "
        "1.0 s/step  time left 0:01"
    )


def test_a_held_out_mean_is_called_an_accuracy_only_of_right_and_wrong():
    """By the function that is named, so that the first line of a run says what the last does."""
    boxed, mine = "mcore_rl.rewards.answers:boxed_match", "mine:score"
    tools = "mcore_rl.environments.tools:call_tools"
    assert held_out_word(boxed) == held_out_word(boxed, tools) == "accuracy"
    assert {held_out_word(mine), held_out_word(None), held_out_word(boxed, "mine:play")} == {"reward"}
    words = {"sums": held_out_word(boxed), "tone": held_out_word(mine)}
    means = {"eval/sums/accuracy": 0.0, "eval/tone/accuracy": 1.0, "eval/tone/accuracy/low": 1.0}
    line = Progress(4, words=words).line(0, {**means, "validation/accuracy": 0.5, "time/step": 1.0})
    assert line == "step 0/4  sums accuracy 0.000  tone reward 1.000  validation accuracy 0.500"


def test_what_comes_before_the_first_step_and_evaluations_are_no_pace():
    progress = Progress(10, eval_every=4)
    first = {"time/step": 100.0, "time/eval": 30.0}
    assert progress.line(0, first) == "", "nothing was measured"
    assert progress.left == "step 0/10"
    # 9 steps of 2 s, and the evaluations after steps 4, 8 and 10
    assert progress.line(1, {"time/step": 2.0}).endswith("2.0 s/step  time left 1:48")
    assert progress.line(4, {"time/step": 32.0, "time/eval": 30.0}).endswith("2.0 s/step  time left 1:12")
    assert progress.line(10, {"time/step": 32.0, "time/eval": 30.0}).endswith("time left 0:00")


def test_clock():
    assert [clock(s) for s in (-1, 0.4, 59.6, 92, 7500)] == ["0:00", "0:00", "1:00", "1:32", "2:05:00"]
