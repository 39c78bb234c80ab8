"""Whole runs that replace groups of equal rewards: in turns and beside training, at one and two replicas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mcore_rl.checkpoint import find
from mcore_rl.dumps.directory import read_step, trained_file
from mcore_rl.dumps.trained import read_trained
from mcore_rl.log import read_metrics
from mcore_rl.metric_names import meaning_of
from mcore_rl.types import Sample
from tests.e2e.ranks import Ranks

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]
STEPS, PROMPTS, EACH = 4, 4, 4
BESIDE = ("--rollout.max_staleness", "1", "--algorithm.params.correction", "tis-token")


def grpo(folder: Path, directory: Path, url: str, *flags: str) -> list[str]:
    return [
        *("train", "examples/grpo_tiny.toml", "--run.dir", str(directory), "--parallel.tensor", "1"),
        *("--model.path", f"{folder}/policy", "--data.train", f"{folder}/train.jsonl"),
        *("--data.eval", f"{folder}/eval.jsonl", "--train.eval_every", "0", "--train.eval_samples", "1"),
        *("--rollout.urls", f'["{url}"]', "--rollout.max_new_tokens", "8", "--train.steps", str(STEPS)),
        *("--rollout.prompts_per_step", str(PROMPTS), "--rollout.samples_per_prompt", str(EACH)),
        *("--optimizer.warmup_steps", "0", "--rollout.dynamic_sampling", "4"),
        *("--reward.function", "tests.e2e.rewards:by_label", *flags),
    ]


def expected(folder: Path) -> tuple[list[list[str]], list[int]]:
    """Of each step, the prompts that it trains and how many it samples: the cursor's order, as it stands."""
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    order = np.argsort(np.random.PCG64([0, 0]).random_raw(len(lines)), kind="stable")
    trained: list[list[str]] = [[]]
    sampled = [0]
    for line in (lines[i] for i in order):
        if len(trained[-1]) == PROMPTS:
            trained.append([])
            sampled.append(0)
        sampled[-1] += 1
        if int(line["label"]) % 3:
            trained[-1].append(line["prompt"])
    return trained[:STEPS], sampled[:STEPS]


def check(folder: Path, directory: Path) -> None:
    """No prompt is lost, repeated or trained in another step, whatever became of the run."""
    trained, sampled = expected(folder)
    assert sum(sampled) > STEPS * PROMPTS, "groups were replaced"
    shown = [(directory / f"samples/step_{step}.jsonl").read_text() for step in range(1, STEPS + 1)]
    found = [sorted(json.loads(line)["prompt"] for line in one.splitlines()) for one in shown]
    assert found == [sorted(prompts) for prompts in trained]
    lines = read_metrics(directory / "metrics.jsonl")[1:]
    for line, groups in zip(lines, sampled, strict=True):
        assert (line["samples"], line["aborted"], line["void"]) == (PROMPTS * EACH, 0, 0)
        assert (line["reward/no_signal"], line["reward/mean"]) == (0, 0.5)
        assert (line["sampling/groups"], line["sampling/dropped"]) == (groups, groups - PROMPTS)
        assert line["sampling/refill_rate"] == (groups - PROMPTS) / groups
        assert line["sampling/reward"] == 0.5 * PROMPTS / groups
        assert [name for name in line if meaning_of(name) is None] == ["step"]
    if "async/asked" in lines[-1]:
        for number, line in enumerate(lines, 1):
            gone = sum(value for key, value in line.items() if key.startswith("async/discarded_"))
            assert line["async/discarded_no_signal"] == gone
            assert gone == (sum(sampled[:number]) - number * PROMPTS) * EACH
            assert line["async/asked"] == line["async/trained"] + gone + line["async/in_flight"]
            assert line["staleness/max"] <= 1


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_step_trains_the_next_prompts_with_a_signal(
    ranks: Ranks, folder: Path, server_url: str, tmp_path: Path, replicas: int
) -> None:
    done = ranks.run(*grpo(folder, tmp_path, server_url), world=replicas)
    assert done.returncode == 0, done.stderr
    check(folder, tmp_path)


def test_a_killed_run_beside_training_goes_on_at_another_layout_with_the_same_tokens(
    ranks: Ranks, folder: Path, server_url: str, tmp_path: Path
) -> None:
    """Killed in the second step, whose refill takes samples that were asked for the third; resumed by two.

    With a learning rate of 0 every version samples alike, so that which one served when is of no account:
    what is trained then follows from the seeds alone.
    """
    flags = (*BESIDE, "--checkpoint.every", "1", "--reward.function", "tests.e2e.rewards:killed")
    flags += ("--checkpoint.background", "false", "--optimizer.lr", "0", "--rollout.dump", "1")
    directory, whole, witness = tmp_path / "run", tmp_path / "whole", tmp_path / "witness"
    train = grpo(folder, directory, server_url, *flags)
    killed = ranks.run(*train, TEST_WITNESS=str(witness))
    assert killed.returncode == -9, killed.stderr
    assert len(read_metrics(directory / "metrics.jsonl")) == 2
    saved = find(directory / "checkpoints", "latest").document["state"]["ahead"]["groups"]
    assert saved, "samples are in flight"
    witness.touch()
    done = ranks.run(*train, "--resume", "latest", world=2, TEST_WITNESS=str(witness))
    assert done.returncode == 0, done.stderr
    check(folder, directory)
    uninterrupted = grpo(folder, whole, server_url, *flags)
    done = ranks.run(*uninterrupted, TEST_WITNESS=str(witness))
    assert done.returncode == 0, done.stderr
    for step in range(1, STEPS + 1):
        assert_trained_alike(whole / "rollouts", directory / "rollouts", step)


def assert_trained_alike(one: Path, other: Path, step: int) -> None:
    """The same samples, and the same of each in the updates."""
    wanted, found = ({s.id: s for g in read_step(at, step).groups for s in g.samples} for at in (one, other))
    assert_same_tokens(wanted, found)
    first = next(iter(wanted))
    (segment,) = found[first].segments
    last = int(segment.token_ids[-1]) ^ 1
    changed = replace(segment, token_ids=np.array([*segment.token_ids[:-1], last], np.int32))
    with pytest.raises(AssertionError):  # the control: the last token of one sample
        assert_same_tokens(wanted, {**found, first: replace(found[first], segments=(changed,))})
    its, again = (read_trained(trained_file(at, step)) for at in (one, other))
    assert again.keys() == its.keys() == wanted.keys()
    for id, sample in wanted.items():
        assert len(its[id].log_probs) == sample.trained_tokens
        for name in ("log_probs", "old_log_probs", "advantages"):
            np.testing.assert_allclose(getattr(again[id], name), getattr(its[id], name), atol=2e-5)


def assert_same_tokens(wanted: Mapping[str, Sample], found: Mapping[str, Sample]) -> None:
    """Token ids, contexts and masks of every sample, and rewards; log-probs but for rounding."""
    assert found.keys() == wanted.keys()
    for id, sample in wanted.items():
        assert found[id].reward == sample.reward
        for a, b in zip(found[id].segments, sample.segments, strict=True):
            assert (a.trained is None) == (b.trained is None)
            assert np.array_equal(a.context, b.context)
            assert np.array_equal(a.token_ids, b.token_ids)
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=2e-5)


@pytest.mark.parametrize("flags", [(), BESIDE], ids=["in turns", "beside training"])
def test_a_run_of_hopeless_prompts_ends_and_says_the_rate(
    ranks: Ranks, folder: Path, server_url: str, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    nothing = ("--reward.function", "tests.e2e.rewards:nothing", *flags)
    done = ranks.run(*grpo(folder, tmp_path, server_url, *nothing), world=2)
    assert done.returncode == 2, done.stderr
    assert "NoSignalError: step 1: 16 of 16 groups had no signal (100.0%)" in done.stderr
    assert "the rewards of 16 were all equal, of 16 all 0. rollout.dynamic_sampling allows 16" in done.stderr
    assert "Traceback" not in done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0]


def test_a_curriculum_chooses_alike_after_a_resume_at_another_layout(
    ranks: Ranks, folder: Path, server_url: str, tmp_path: Path
) -> None:
    """With responses of one token, hardly one of which is in the loss: a mini-batch may have none."""
    flags = ("--data.curriculum", "tests.e2e.rewards:half", "--rollout.max_new_tokens", "1")
    flags += ("--rollout.prompts_per_step", "2", "--train.steps", "3", "--checkpoint.every", "1")
    train = grpo(folder, tmp_path / "run", server_url, *flags, "--algorithm.overlong_filter", "true")
    done = ranks.run(*train, world=2)
    assert done.returncode == 0, done.stderr
    shown = [(tmp_path / f"run/samples/step_{step}.jsonl") for step in (1, 2, 3)]
    prompts = [[json.loads(line)["prompt"] for line in one.read_text().splitlines()] for one in shown]
    assert len({prompt for its in prompts for prompt in its}) == 6, "none is sampled twice"
    before = read_metrics(tmp_path / "run/metrics.jsonl")
    assert before[1]["truncated"] > 0.5
    shown[2].unlink()
    again = ranks.run(*train, "--resume", "previous")
    assert again.returncode == 0, again.stderr
    assert [json.loads(line)["prompt"] for line in shown[2].read_text().splitlines()] == prompts[2]
    after = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["sampling/groups"] for line in after[1:]] == [line["sampling/groups"] for line in before[1:]]
