"""A dumped step trains to the same bits without servers, nearly the same at another layout: real ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mcore_rl.__main__ import main
from mcore_rl.checkpoint import find
from mcore_rl.dumps.directory import dumped_steps, groups_file, read_step, trained_file
from mcore_rl.dumps.rollouts import Words, dump_bytes
from mcore_rl.dumps.trained import read_trained
from mcore_rl.log import read_metrics
from mcore_rl.metric_names import MEASURED
from mcore_rl.rollout.processes import Embedded, LocalServer
from mcore_rl.types import Sample, Segment, VersionSpan
from tests.checkpoint.support import stored
from tests.e2e.test_ours import grpo

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]
OF_SERVERS = ("publish/", "eval/", "rollout/", "weight_version", "data/", "sampling/")
SETTINGS = ("--reward.function", "tests.e2e.rewards:brevity", "--train.steps", "2")


@pytest.fixture(scope="module")
def live(ranks, folder, server_url, tmp_path_factory) -> Path:
    """A run of two steps that keeps both."""
    directory = tmp_path_factory.mktemp("live") / "run"
    done = ranks.run(*grpo(folder, directory, *SETTINGS, "--rollout.dump", "1", url=server_url))
    assert done.returncode == 0, done.stderr
    return directory


def from_dumps(folder: Path, directory: Path, source: Path, *flags: str) -> list[str]:
    """The same run without a server: the address is nobody's."""
    return grpo(folder, directory, *SETTINGS, "--rollouts", str(source), *flags, url="http://127.0.0.1:1")


def learned(directory: Path) -> list[dict]:
    """The metrics of steps, without what servers and clocks say."""
    lines = [line for line in read_metrics(directory / "metrics.jsonl") if line["step"]]
    unlike = (*MEASURED, *OF_SERVERS)
    return [{key: value for key, value in line.items() if not key.startswith(unlike)} for line in lines]


def differing(one: Path, other: Path, step: int = 2) -> dict[str, float]:
    """Tensor -> largest difference, of those of two checkpoints that are not bitwise equal."""
    a, b = (stored(path / "checkpoints" / f"step_{step}") for path in (one, other))
    assert a.keys() == b.keys()
    unlike = [key for key in a if not torch.equal(a[key], b[key])]
    return {key: (a[key].double() - b[key].double()).abs().max().item() for key in unlike}


def test_a_dumped_step_trains_to_the_same_bits_without_a_server(ranks, folder, live, tmp_path) -> None:
    """And keeps what its own trainer makes of it; a resume trains the steps that are left."""
    again = tmp_path / "again"
    done = ranks.run(*from_dumps(folder, again, live, "--rollout.dump", "2"))
    assert done.returncode == 0, done.stderr
    assert "trains on the rollouts of 2 steps" in done.stderr
    assert differing(live, again) == {}
    assert learned(live) == learned(again)
    assert dumped_steps(again / "rollouts") == [2]
    for file in (groups_file, trained_file):
        with np.load(file(live / "rollouts", 2)) as one, np.load(file(again / "rollouts", 2)) as other:
            arrays = [name for name in one if name != "document"]
            assert all(np.array_equal(one[name], other[name], equal_nan=True) for name in arrays)

    branch = tmp_path / "branch"
    checkpoint = str(live / "checkpoints" / "step_1")
    done = ranks.run(*from_dumps(folder, branch, live / "rollouts", "--resume", checkpoint))
    assert done.returncode == 0, done.stderr
    assert differing(live, branch) == {}
    done = ranks.run(*from_dumps(folder, branch, live, "--resume", "latest"))
    assert (done.returncode, "nothing to do" in done.stderr) == (0, True)


def test_it_trains_at_another_layout_to_nearly_the_same(ranks, folder, live, tmp_path) -> None:
    layout = ("--parallel.tensor", "2", "--parallel.data", "2")
    done = ranks.run(*from_dumps(folder, tmp_path / "run", live, *layout), world=4)
    assert done.returncode == 0, done.stderr
    for line, wanted in zip(learned(tmp_path / "run"), learned(live), strict=True):
        for key in ("reward/mean", "tokens", "samples"):
            assert line[key] == wanted[key]
        for key in ("loss/policy", "grad_norm", "kl/rollout", "entropy"):
            assert line[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-5)


def test_what_the_trainer_kept_is_what_it_trained(live) -> None:
    """Against the dump's own log-probs and rewards: in the first mini-batch every ratio is 1."""
    dump = read_step(live / "rollouts", 1)
    trained = read_trained(trained_file(live / "rollouts", 1))
    samples = {s.id: s for group in dump.groups for s in group.samples}
    assert trained.keys() == samples.keys()
    for group in dump.groups:
        rewards = np.array([s.reward for s in group.samples])
        for sample in group.samples:
            its = trained[sample.id]
            assert np.abs(its.old_log_probs - sample.log_probs).max() < 2e-5
            wanted = (sample.reward - rewards.mean()) / (rewards.std(ddof=1) or 1)
            assert its.advantages == pytest.approx(wanted, abs=1e-5)
    ratios = np.concatenate([its.ratios for its in trained.values()])
    assert np.isfinite(ratios).all()
    assert 0.2 < (ratios == 1).mean() < 0.9, "of two mini-batches, the first has not moved"
    (line,) = [line for line in read_metrics(live / "metrics.jsonl") if line["step"] == 1]
    assert line["ratio/max"] == pytest.approx(ratios.max(), abs=1e-6)
    assert line["ratio/min"] == pytest.approx(ratios.min(), abs=1e-6)


def test_a_run_that_cannot_train_on_a_dump_says_why_before_it_trains(
    ranks, folder, live, tmp_path, capsys
) -> None:
    refused = {
        ("--rollout.temperature", "0.5"): "was sampled at temperature 1",
        ("--data.train", str(folder / "none.jsonl")): "none.jsonl",
        ("--run.dir", str(live)): "lies in run.dir",
    }
    for number, (flags, why) in enumerate(refused.items()):
        done = ranks.run(*from_dumps(folder, tmp_path / f"run{number}", live, *flags))
        assert done.returncode == 2, done.stderr
        assert why in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / f"run{number}" / "checkpoints" / "step_1").exists()
    assert find(live / "checkpoints", "latest").step == 2
    assert main(["samples", str(live)]) == 0
    assert "step 2: 16 samples" in capsys.readouterr().out


def sampled(folder: Path, directory: Path, *flags: str, url: str) -> list[str]:
    """The command that samples the two steps without a trainer."""
    command = grpo(folder, directory, *SETTINGS, *flags, url=url)
    return ["rollout", *command[1:]]


def test_a_command_samples_what_a_run_would_and_goes_on_where_it_was_ended(
    ranks, folder, live, tmp_path
) -> None:
    directory = tmp_path / "sampled"
    with LocalServer(folder / "policy", Embedded(threads=1), log_file=tmp_path / "log") as server:
        done = ranks.run(*sampled(folder, directory, "--train.steps", "1", url=server.url))
        assert done.returncode == 0, done.stderr
        done = ranks.run(*sampled(folder, directory, url=server.url))
        assert done.returncode == 0, done.stderr
        assert "goes on after step 1" in done.stderr
        assert dumped_steps(directory / "rollouts") == [1, 2]
        first = groups_file(live / "rollouts", 1), groups_file(directory / "rollouts", 1)
        with np.load(first[0]) as one, np.load(first[1]) as other:
            for name in ("tokens", "prompt_tokens", "ends"):
                assert np.array_equal(one[name], other[name])
        for wanted, group in zip(
            *(read_step(d / "rollouts", 1).groups for d in (live, directory)), strict=True
        ):
            assert [(s.id, s.reward) for s in group.samples] == [(s.id, s.reward) for s in wanted.samples]
        second = {g.id.partition("@")[0] for g in read_step(directory / "rollouts", 2).groups}
        assert second == {g.id.partition("@")[0] for g in read_step(live / "rollouts", 2).groups}
        refused = {
            ("--rollout.temperature", "0.5"): "other values of ['rollout.temperature']",
            ("--run.dir", str(live)): "holds a training run",
        }
        for flags, why in refused.items():
            done = ranks.run(*sampled(folder, directory, *flags, url=server.url))
            assert (done.returncode, why in done.stderr) == (2, True), done.stderr
        done = ranks.run(*sampled(folder, directory, url=server.url))
        assert (done.returncode, "nothing to do" in done.stderr) == (0, True)
    refused = ranks.run(*grpo(folder, directory, *SETTINGS, url="http://127.0.0.1:1"))
    assert (refused.returncode, "holds rollouts" in refused.stderr) == (2, True), refused.stderr
    stale = ranks.run(*from_dumps(folder, tmp_path / "run", directory))
    assert (stale.returncode, "1 versions older" in stale.stderr) == (2, True), stale.stderr
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [], "nothing was trained before"
    assert [line["step"] for line in read_metrics(directory / "metrics.jsonl")] == [1, 2]


def test_trajectories_of_a_dump_are_trained_segment_by_segment(ranks, folder, live, tmp_path) -> None:
    """A sample in two segments with an observation between, and a void one that has no part in the step."""
    dump = read_step(live / "rollouts", 1)
    groups = [list(group.samples) for group in dump.groups]
    cut = next(i for i, s in enumerate(groups[0]) if len(s.token_ids) > 2)
    groups[0][cut], groups[1][0] = in_two(groups[0][cut]), replace(groups[1][0], void=True, reward=None)
    made = [replace(g, samples=tuple(its)) for g, its in zip(dump.groups, groups, strict=True)]
    directory = tmp_path / "made" / "rollouts"
    directory.mkdir(parents=True)
    words = Words(lambda ids: "", dump.pieces.__getitem__)
    content = dump_bytes(1, made, temperature=1.0, cursor={}, words=words)
    groups_file(directory, 1).write_bytes(content)
    flags = ("--rollout.dump", "1", "--parallel.tensor", "2")
    done = ranks.run(*from_dumps(folder, tmp_path / "run", directory, *flags), world=2)
    assert done.returncode == 0, done.stderr
    assert "step 1: the dump's log-probs differ" in done.stderr, "they are those of other contexts"
    (line,) = learned(tmp_path / "run")
    alive = [s for g in made for s in g.samples if not s.void]
    assert (line["samples"], line["tokens"]) == (15, sum(s.trained_tokens for s in alive))
    trained = read_trained(trained_file(tmp_path / "run" / "rollouts", 1))
    assert trained.keys() == {s.id for s in alive}
    (kept,) = (
        s
        for g in read_step(tmp_path / "run" / "rollouts", 1).groups
        for s in g.samples
        if len(s.segments) == 2
    )
    own = trained[kept.id]
    assert np.isfinite(own.log_probs).all()
    before = read_trained(trained_file(live / "rollouts", 1))[kept.id]
    first = len(kept.segments[0].log_probs)
    assert own.old_log_probs[:first] == pytest.approx(before.old_log_probs[:first], abs=1e-4)
    assert np.abs(own.old_log_probs[first:] - before.old_log_probs[first:-1]).max() > 1e-3, "another context"


def in_two(sample: Sample) -> Sample:
    """Its first token in one segment; its others behind another context, the last of them an observation."""
    (whole,) = sample.segments
    one = replace(
        whole,
        token_ids=whole.token_ids[:1],
        log_probs=whole.log_probs[:1],
        versions=(VersionSpan("0", 0, 1),),
    )
    count = len(whole.token_ids) - 2
    mask = np.array([True] * count + [False])
    spans = (VersionSpan("0", 0, count),)
    two = Segment(whole.context[:1], whole.token_ids[1:], whole.log_probs[1:-1], spans, mask)
    return replace(sample, segments=(one, two))
