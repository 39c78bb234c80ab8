"""Whole runs whose baseline is asked of servers, kept from step to step, or taken of another forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_rl.checkpoint import find
from mcore_rl.log import read_metrics
from mcore_rl.types import Sample
from tests.e2e.ranks import Ranks

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]


def by_length(sample: Sample) -> float:
    """What differs between a greedy answer and a sampled one, and between two steps."""
    return len(sample.token_ids) + 0.01 * (sum(sample.token_ids) % 97)


def run(ranks: Ranks, folder: Path, directory: Path, url: str, name: str, *flags: str, world: int = 1):
    done = ranks.run(
        *("train", "examples/grpo_tiny.toml", "--run.dir", str(directory), "--parallel.tensor", "1"),
        *("--model.path", f"{folder}/policy", "--data.train", f"{folder}/train.jsonl"),
        *("--data.eval", f"{folder}/eval.jsonl", "--train.eval_every", "0", "--train.eval_samples", "1"),
        *("--rollout.urls", f'["{url}"]', "--rollout.max_new_tokens", "6", "--optimizer.warmup_steps", "0"),
        *("--rollout.prompts_per_step", "2", "--rollout.samples_per_prompt", "2"),
        *("--reward.function", "tests.e2e.test_baselines:by_length", "--algorithm.name", name, *flags),
        world=world,
    )
    assert done.returncode == 0, done.stderr
    return [line for line in read_metrics(directory / "metrics.jsonl") if line["step"]]


def test_remax_asks_for_a_greedy_answer_to_every_prompt(
    ranks: Ranks, folder: Path, server_url: str, tmp_path: Path
) -> None:
    """On two replicas, each of which asks for its own."""
    for world in (1, 2):
        directory = tmp_path / str(world)
        lines = run(ranks, folder, directory, server_url, "remax", "--train.steps", "2", world=world)
        assert [line["samples"] for line in lines] == [4, 4], "the greedy answers are not trained"
        baselines = [line["baseline/mean"] for line in lines]
        assert all(value > 0 for value in baselines)
        assert baselines[0] != pytest.approx(lines[0]["reward/mean"]), "nor is it the mean of the group"


def test_the_means_of_roles_go_on_after_a_resume(
    ranks: Ranks, folder: Path, server_url: str, tmp_path: Path
) -> None:
    flags = ("--checkpoint.every", "1", "--algorithm.params.decay", "0.5")
    lines = run(ranks, folder, tmp_path, server_url, "rae", "--train.steps", "2", *flags)
    first, second = (line["reward/mean"] for line in lines)
    assert [line["baseline/mean"] for line in lines] == [0, pytest.approx(0.5 * first, rel=1e-6)]
    state = find(tmp_path / "checkpoints", "latest").document["state"]["roles"]
    assert state == {"": pytest.approx(0.25 * first + 0.5 * second, rel=1e-6)}
    lines = run(
        ranks, folder, tmp_path, server_url, "rae", "--train.steps", "3", *flags, "--resume", "latest"
    )
    assert lines[-1]["baseline/mean"] == pytest.approx(state[""], rel=1e-6)


def test_otb_and_a_critic_that_looks_behind_the_end_train(
    ranks: Ranks, folder: Path, server_url: str, tmp_path: Path
) -> None:
    (line,) = run(ranks, folder, tmp_path / "otb", server_url, "otb", "--train.steps", "1")
    assert line["grad_norm"] > 0
    given = ("--train.steps", "1", "--algorithm.params.bootstrap", "true")
    (line,) = run(ranks, folder, tmp_path / "ppo", server_url, "ppo", *given)
    assert line["grad_norm/critic"] > 0
