"""What servers sample is compared with the weights in training, and what follows where they disagree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.float32_floor import measure, random_model
from benchmarks.reduced_floor import measure as reduced
from mcore_rl.algo.metrics import Quantile
from mcore_rl.config import Config
from mcore_rl.errors import EXIT_RETRYABLE, MismatchError
from mcore_rl.log import read_metrics
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.pool import Pool
from mcore_rl.precision import FP32_TOLERANCES, tolerances
from mcore_rl.training.batch import RolloutBatch, sampled_with, token_sequences
from mcore_rl.training.loop import learn
from mcore_rl.training.mismatch import Notices, differences, means, p999
from mcore_rl.training.model_passes import log_probs
from mcore_rl.training.run import Run
from mcore_rl.types import Prompt, Sample
from tests.training.test_ppo import built_run, config, recorded, weights

__all__ = ["config"]
LAYOUTS = [Layout(tensor=2), Layout(data=2), Layout(context=2)]


def honest(run: Run) -> RolloutBatch:
    """Test_ppo's recorded rollout, as a server with the trainer's weights would have scored it."""
    batch = recorded(run)
    sequences = token_sequences(batch.samples)
    own = log_probs(run.trainer.policy, sequences, run.trainer.shape, run.trainer.temperature)
    samples = [sampled_with(s, scores.copy()) for s, scores in zip(batch.samples, own, strict=True)]
    return replace(batch, samples=tuple(samples))


def spoiled(batch: RolloutBatch) -> tuple[RolloutBatch, list[int]]:
    """One sample whose tokens are all 3, two of which each has the other's response; and which these are."""
    samples = list(batch.samples)
    long = [i for i, sample in enumerate(samples) if len(sample.token_ids) > 2]
    alike, one, other = long[0], long[1], long[-1]
    (segment,) = samples[alike].segments
    wrong = replace(segment, token_ids=(3,) * len(segment.token_ids))
    samples[alike] = replace(samples[alike], segments=(wrong,))
    a, b = samples[one], samples[other]
    (of_a,), (of_b,) = a.segments, b.segments
    samples[one] = replace(a, segments=(replace(of_b, context=of_a.context),))
    samples[other] = replace(b, segments=(replace(of_a, context=of_b.context),))
    return replace(batch, samples=tuple(samples)), [alike, one, other]


def learned(config: Config, layout: Layout, directory: Path, action: str, which: str) -> dict[str, Any]:
    """A step on the `which` of honest, spoiled or left: what it said and how the weights are. For ranks."""
    publish = config.publish.model_copy(update={"mismatch_action": action})
    with built_run(config.model_copy(update={"publish": publish}), layout, directory) as run:
        before, batch = weights(run), honest(run)
        wrong, places = spoiled(batch)
        kept = [i for i in range(len(batch.samples)) if i not in places]
        left = RolloutBatch(tuple(batch.samples[i] for i in kept), tuple(batch.group_ids[i] for i in kept))
        chosen = {"honest": batch, "spoiled": wrong, "left": left}[which]
        found: dict[str, Any] = {"metrics": {}, "error": None}
        try:
            done = learn(run, chosen, 2)
            found |= {"metrics": done.metrics, "work": done.work}
        except MismatchError as error:
            found["error"] = (str(error), error.exit_code, error.shared)
        after = weights(run)
        found["after"] = after
        found["moved"] = max((float((after[n] - before[n]).abs().max()) for n in after), default=0.0)
        return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [pytest.param(one, marks=[] if one.data == 2 else [pytest.mark.slow]) for one in LAYOUTS],
    ids=["tp2", "dp2", "cp2"],
)
def test_wrong_samples_are_dropped_and_the_step_is_that_of_the_others(
    pool2: Pool, config: Config, layout: Layout, tmp_path: Path
) -> None:
    """At every layout alike, on every rank."""
    dropped = pool2.run(learned, config, layout, tmp_path / "drop", "drop", "spoiled", timeout=100.0)
    others = pool2.run(learned, config, layout, tmp_path / "left", "warn", "left", timeout=100.0)
    assert [rank["metrics"]["mismatch/dropped"] for rank in dropped] == [3.0, 3.0]
    assert all(rank["metrics"]["mismatch/p999"] <= 2e-5 for rank in dropped)
    assert dropped[0]["moved"] > 1e-4
    assert dropped[0]["work"] == others[0]["work"], "what was dropped is no work"
    for name, tensor in others[0]["after"].items():
        torch.testing.assert_close(dropped[0]["after"][name], tensor, rtol=1e-4, atol=1e-5)
    assert "mismatch/dropped" not in others[0]["metrics"]
    (event,) = [e for e in read_metrics(tmp_path / "drop" / "events.jsonl") if e["kind"] == "mismatch"]
    assert (event["step"], event["dropped"]) == (2, 3)


@pytest.mark.slow
def test_a_wrong_sample_ends_the_run_before_any_weight_moves(
    pool2: Pool, config: Config, tmp_path: Path
) -> None:
    """With "stop"; the control is "warn", under which they do."""
    stopped = pool2.run(
        learned, config, Layout(tensor=2), tmp_path / "stop", "stop", "spoiled", timeout=100.0
    )
    for rank in stopped:
        message, code, shared = rank["error"]
        assert "step 2: the servers' log-probs differ" in message
        assert (code, shared) == (EXIT_RETRYABLE, True)
        assert rank["moved"] == 0
    warned = pool2.run(learned, config, Layout(tensor=2), tmp_path / "warn", "warn", "spoiled", timeout=100.0)
    assert warned[0]["moved"] > 1e-4
    assert warned[0]["metrics"]["mismatch/p999"] > 100 * config.publish.tolerance_p999
    sound = pool2.run(learned, config, Layout(data=2), tmp_path / "sound", "stop", "honest", timeout=100.0)
    assert sound[0]["error"] is None
    assert sound[0]["moved"] > 1e-4


@pytest.mark.parametrize("layers", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_the_limit_lies_between_two_sound_engines_and_a_version_too_old(layers: int) -> None:
    """The version is one step of Adam away, at a learning rate of 1e-6."""
    torch.manual_seed(0)
    found = measure(random_model(layers, hidden=128, vocab=1024), sequences=2, tokens=256)
    limit = FP32_TOLERANCES.p999
    assert max(found["rounding"], found["engines"]) < limit / 1.5
    assert found["version"] > 5 * limit


@pytest.mark.parametrize("layers", [3, 12])
def test_below_float32_the_limits_follow_the_depth(layers: int) -> None:
    """Sound engines are within; so is one step of Adam, which rounding hides, and other weights are not."""
    torch.manual_seed(0)
    model = random_model(layers, hidden=128, vocab=512)
    found, limit = reduced(model, sequences=2, tokens=128), tolerances("bf16", layers)
    engines = 2**0.5 * found["bf16 p999"]
    assert limit.p999 / 4 < engines < limit.p999
    assert 2**0.5 * found["bf16 max"] < limit.largest
    assert 0 < found["changed"] < 0.2
    assert 0 < found["version p999"] < limit.p999
    assert found["other p999"] > 2 * limit.largest


def sample(scores: list[float]) -> Sample:
    prompt = Prompt("p", "", (1,), "")
    return Sample.of_response("p@1/0", prompt, (2,) * len(scores), tuple(scores), "", "stop", ())


def test_only_tokens_of_equal_weights_are_compared() -> None:
    samples = [sample([-1.0, -2.0, -3.0]), sample([-1.0]), sample([])]
    old = [np.array([-1.0, -9.0, -3.5], np.float32), np.array([-7.0], np.float32), np.zeros(0, np.float32)]
    gaps = differences(samples, old, [np.array([0, 1, 0]), np.array([1]), np.zeros(0)])
    assert [gap.tolist() for gap in gaps] == [[0, 0.5], [], []]
    assert means(gaps).tolist() == [0.25, 0, 0]
    assert p999(gaps) == 0.5
    every = differences(samples, old, None)
    assert means(every).tolist() == [2.5, 6, 0]
    assert p999([]) == 0


@pytest.mark.parametrize(
    ("tokens", "wrong", "seen"),
    [(1, 1, True), (60, 1, True), (600, 1, False), (600, 2, True), (5000, 5, False), (5000, 6, True)],
)
def test_one_token_of_many_is_no_mismatch_and_two_are(tokens: int, wrong: int, seen: bool) -> None:
    """The 99.9 % quantile of less than 1000 tokens is not their maximum, in the log as in the decision."""
    gap = np.full(tokens, 1e-5)
    gap[:wrong] = 1.0
    metric = Quantile(torch.from_numpy(gap), fraction=0.999)
    logged = metric.value(metric.reduce_rows(torch.from_numpy(gap), torch.ones(tokens, dtype=torch.bool)))
    assert (p999([gap[:3], gap[3:]]) > 1e-4) == (logged > 1e-4) == seen


def test_a_log_prob_of_the_trainer_that_is_not_finite_is_no_fault_of_a_server() -> None:
    """All samples would be dropped; the training step names it as what it is."""
    gaps = differences([sample([-1.0, -2.0])], [np.array([np.nan, -2.0], np.float32)], None)
    assert means(gaps).tolist() == [0]


def test_a_long_mismatch_is_said_ever_more_rarely(capsys: pytest.CaptureFixture[str]) -> None:
    notices = Notices()
    for step in range(1, 101):
        notices.say(f"step {step}: other weights")
    said = capsys.readouterr().err.splitlines()
    assert [int(line.split()[3].rstrip(":")) for line in said] == [1, 2, 4, 8, 16, 32, 64]
    assert said[0] == "mcore-rl: warning: step 1: other weights (so far in 1 steps of this run)"
