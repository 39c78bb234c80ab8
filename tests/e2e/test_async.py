"""Generation beside training: a whole run with rollout.max_staleness = 1, resumed with samples in flight."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from examples.arithmetic import main as write_task
from mcore_rl.checkpoint import find
from mcore_rl.dumps.directory import read_step
from mcore_rl.log import read_metrics
from mcore_rl.metric_names import meaning_of
from mcore_rl.rollout.experts import from_json
from mcore_rl.rollout.processes import Embedded, LocalServer
from mcore_rl.types import Sample
from tests.e2e.conftest import Task
from tests.e2e.ranks import Ranks

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]
STEPS, PROMPTS, EACH, EXTRA = 4, 8, 4, 2
SHOWN = "samples/step_3.jsonl"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The arithmetic problems and a model of random weights, which a server can start on."""
    made = Task(tmp_path_factory.mktemp("task"))
    assert write_task([f"{made.root}/data", "--seed", "0"]) == 0
    model = made.root / "data" / "model"
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    policy.float().save_pretrained(model)
    return made


@pytest.fixture(scope="module")
def served(task: Task) -> Iterator[list[str]]:
    """Flags of runs that share a server; tests/e2e/test_routing.py has a run with its own."""
    log = task.root / "server.log"
    with LocalServer(task.root / "data" / "model", Embedded(threads=1), log_file=log) as server:
        yield ["--rollout.urls", f'["{server.url}"]']


def gspo(task: Task, directory: Path, *flags: str) -> list[str]:
    """Long responses of random weights, so that a publish meets them half generated."""
    return [
        *("train", "examples/gspo_tiny.toml", *task.data, "--run.dir", str(directory)),
        *("--data.eval", f"{task.root}/data/eval.jsonl", "--train.eval_samples", "8"),
        *("--train.eval_every", "0", "--reward.function", "tests.e2e.rewards:brevity"),
        *("--model.random_init", "true", "--model.path", f"{task.root}/data/model"),
        *("--parallel.tensor", "1", "--train.steps", str(STEPS), "--checkpoint.every", "2"),
        *("--rollout.prompts_per_step", str(PROMPTS), "--rollout.samples_per_prompt", str(EACH)),
        *("--rollout.max_new_tokens", "48", "--optimizer.warmup_steps", "0"),
        *("--rollout.max_staleness", "1", "--algorithm.params.correction", "tis-token", *flags),
    ]


@pytest.fixture(scope="module")
def whole(ranks: Ranks, task: Task, served: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of all steps; who changes it takes a copy."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    done = ranks.run(*gspo(task, directory, *served))
    assert done.returncode == 0, done.stderr
    return directory


def check(lines: list[dict]) -> None:
    """What was asked was trained, discarded or is in flight; what was trained is at most one version old."""
    for line in lines:
        discarded = sum(value for key, value in line.items() if key.startswith("async/discarded_"))
        assert line["async/asked"] == line["async/trained"] + discarded + line["async/in_flight"]
        assert line["async/trained"] == line["step"] * PROMPTS * EACH
        assert (line["samples"], line["aborted"]) == (PROMPTS * EACH, 0)
        assert line["staleness/max"] <= 1
        assert all(math.isfinite(line[f"behaviour/{name}"]) for name in ("k1", "k3", "ess", "max_abs"))
        assert line.get("mismatch/p999", 0.0) <= 2e-5, "tokens of older weights said to be of these"
        assert line["publish/probe_max_abs"] <= 2e-4
    assert [name for name in lines[-1] if meaning_of(name) is None] == ["step"]
    assert lines[0]["async/asked"] == 2 * PROMPTS * EACH
    assert lines[0]["staleness/max"] == 0
    assert all(line["staleness/mean"] > 0 for line in lines[1:]), "generation runs beside training"
    assert max(line["behaviour/max_abs"] for line in lines[1:]) > 1e-3, "the control: older weights sampled"


def test_no_token_is_older_than_the_bound_and_the_counts_add_up(
    ranks: Ranks, task: Task, served: list[str], whole: Path, tmp_path: Path
) -> None:
    """And a resume, at another bound of over-sampling and two replicas, has the prompts of the whole run."""
    again = tmp_path / "again"
    lines = read_metrics(whole / "metrics.jsonl")[1:]
    check(lines)
    assert lines[-1]["async/in_flight"] == 0, "nothing is asked for steps that will not come"
    saved = find(whole / "checkpoints", "previous").document["state"]["ahead"]["groups"]
    assert [group["id"].endswith("@3") for group in saved] == [True] * PROMPTS

    shutil.copytree(whole, again)
    (again / SHOWN).unlink()
    flags = ("--resume", "previous", "--parallel.data", "2", "--rollout.over_sampling", str(EXTRA))
    done = ranks.run(*gspo(task, again, *served, *flags), world=2)
    assert done.returncode == 0, done.stderr
    resumed = read_metrics(again / "metrics.jsonl")[1:]
    assert resumed[:2] == lines[:2]
    check(resumed)
    assert resumed[-1]["async/asked"] == lines[-1]["async/asked"] + EXTRA * EACH
    late = resumed[-1]["async/discarded_unfinished"] + resumed[-1]["async/discarded_stale"]
    assert late == EXTRA * EACH, "the last step leaves them"
    assert len(prompts(again)) == PROMPTS


def prompts(directory: Path) -> list[str]:
    """Prompts of the samples of the third step."""
    return [json.loads(line)["prompt"] for line in (directory / SHOWN).read_text().splitlines()]


def test_a_run_goes_on_under_another_bound_where_nothing_is_in_flight(
    ranks: Ranks, task: Task, served: list[str], whole: Path, tmp_path: Path
) -> None:
    """Asynchronous, then taking turns, then asynchronous again; with groups in flight it is refused."""
    directory, turns = tmp_path / "run", ("--rollout.max_staleness", "0")
    shutil.copytree(whole, directory)
    refused = ranks.run(*gspo(task, directory, *served, *turns, "--resume", "previous"))
    assert refused.returncode == 2
    assert f"holds {PROMPTS} groups of samples in flight" in refused.stderr

    more = (*served, "--checkpoint.every", "1", "--resume", "latest", "--train.steps")
    second = ranks.run(*gspo(task, directory, *more, str(STEPS + 1), *turns))
    assert second.returncode == 0, second.stderr
    third = ranks.run(*gspo(task, directory, *more, str(STEPS + 3)))
    assert third.returncode == 0, third.stderr
    lines = read_metrics(directory / "metrics.jsonl")[STEPS:]
    assert [line["step"] for line in lines] == [STEPS, STEPS + 1, STEPS + 2, STEPS + 3]
    assert ["async/asked" in line for line in lines] == [True, False, True, True]
    trained = [line.get("async/trained") for line in lines]
    each = PROMPTS * EACH
    assert trained == [STEPS * each, None, (STEPS + 2) * each, (STEPS + 3) * each]


def test_rollouts_of_several_turns_train_what_was_sampled_beside_training(
    ranks: Ranks, task: Task, served: list[str], tmp_path: Path
) -> None:
    """Their log-probs are the trainer's on every segment; a resume and a dump have the same samples."""
    directory, again = tmp_path / "run", tmp_path / "again"
    flags = [
        *(*served, "--train.steps", "3", "--checkpoint.every", "1", "--rollout.dump", "1"),
        *("--environment.function", "tests.e2e.environments:AsksAgain", "--environment.args.turns", "3"),
        *("--environment.args.pause", "0.4"),
        *("--environment.max_tokens", "64", "--data.max_prompt_tokens", "32"),
    ]
    done = ranks.run(*gspo(task, directory, *flags))
    assert done.returncode == 0, done.stderr
    lines = read_metrics(directory / "metrics.jsonl")[1:]
    for line in lines:
        assert line.get("mismatch/p999", 0.0) <= 2e-5, "tokens in another context than when sampled"
        assert (line["environment/turns"], line["environment/segments"]) == (3.0, 2.0)
        assert line["environment/rewritten"] == 0
        assert (line["samples"], line["void"]) == (PROMPTS * EACH, 0)
        assert line["staleness/max"] <= 1
        assert {"reward/digits", "reward/brief"} <= line.keys()
    assert [name for name in lines[-1] if meaning_of(name) is None] == ["step"]
    assert lines[-1]["staleness/mean"] > 0, "generation runs beside training"
    assert "mismatch/p999" in lines[0], "the control: there are tokens to compare"

    saved = find(directory / "checkpoints", "previous").document["state"]["ahead"]["groups"]
    assert len(saved) == PROMPTS
    finished = [sample for group in saved for sample in group["replies"] or ()]
    assert all(len(sample["segments"]) == 2 for sample in finished)
    played = {id: one for group in saved for id, one in group.get("played", {}).items()}
    begun = {id: one["turns"] for id, one in played.items() if "turns" in one}  # how many is the machine's
    shutil.copytree(directory, again)
    resumed = ranks.run(*gspo(task, again, *flags, "--resume", "previous"))
    assert resumed.returncode == 0, resumed.stderr
    assert read_metrics(again / "metrics.jsonl")[1:3] == lines[:2]
    first = read_metrics(again / "metrics.jsonl")[3]
    unfinished = sum(group["replies"] is None for group in saved)
    names = [f"environment/{name}" for name in ("resumed", "begun_again")]
    void = unfinished * EACH - len(played)
    assert [first[name] for name in names] == [len(played), void]
    assert first["async/discarded_void"] == void, "what they had sampled, and is sampled again"
    assert first["async/asked"] == lines[-1]["async/asked"] + void
    assert first["async/asked"] == first["async/trained"] + void + first["async/in_flight"]
    assert not any(name in line for line in lines for name in names)
    ids = [sorted(sample.id for sample in dumped(one, 3)) for one in (directory, again)]
    assert ids[0] == ids[1]
    trained = {sample.id: sample for sample in dumped(again, 3)}
    for id, turns in begun.items():
        tokens = np.concatenate([part.token_ids for part in trained[id].segments]).tolist()
        for turn in turns:
            said = from_json(turn["reply"]["token_ids"]).tolist()
            assert any(tokens[at : at + len(said)] == said for at in range(len(tokens))), (
                "it is sampled again"
            )
    for sample in finished:
        tokens = [part.token_ids.tolist() for part in trained[sample["id"]].segments]
        assert tokens == [from_json(part["token_ids"]).tolist() for part in sample["segments"]]


def dumped(directory: Path, step: int) -> list[Sample]:
    """The samples of a step that was kept."""
    return [sample for group in read_step(directory / "rollouts", step).groups for sample in group.samples]
