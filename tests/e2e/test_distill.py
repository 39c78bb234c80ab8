"""Distillation in whole runs: rows and samples, one teacher and several, resumed, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from examples.arithmetic import main as write_arithmetic
from mcore_rl.log import read_metrics
from mcore_rl.metric_names import meaning_of
from tests.e2e.test_kinds import learned, weights

pytestmark = pytest.mark.slow
STEPS = 4


@pytest.fixture(scope="module")
def folder(ranks, tmp_path_factory) -> Path:
    """A student of hidden size 64 and a teacher of 128, trained a little, with rows for both."""
    made = tmp_path_factory.mktemp("distill")
    for name, hidden in (("student", "64"), ("large", "128")):
        sizes = ["--train", "80", "--eval", "16", "--layers", "2", "--hidden", hidden]
        assert write_arithmetic([str(made / name), *sizes]) == 0
    rows = [json.loads(line) for line in (made / "large" / "train.jsonl").read_text().splitlines()]
    named = ({**row, "of": {"teacher": "large" if i % 3 else "other"}} for i, row in enumerate(rows))
    (made / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    teach(ranks, made, "teacher", 0)
    return made


def teach(ranks, made: Path, name: str, seed: int) -> None:
    """A model of some supervised steps, in `name`/model."""
    config = made / f"{name}.toml"
    config.write_text(f"""
[run]
dir = "{made}/{name}"
kind = "sft"
seed = {seed}
[model]
path = "{made}/large/model"
random_init = true
[data]
train = "{made}/large/train.jsonl"
[train]
steps = 12
tokens_per_micro_batch = 256
[supervised]
batch_size = 32
[optimizer]
lr = 3e-3
""")
    done = ranks.run("train", str(config))
    assert done.returncode == 0, done.stderr


def run(ranks, folder: Path, directory: Path, *flags: str, world: int = 1, code: int = 0) -> list[dict]:
    config = directory / "config.toml"
    config.write_text(f"""
[run]
dir = "{directory}/run"
kind = "distill"
[model]
path = "{folder}/student/model"
random_init = true
[data]
train = "{folder}/named.jsonl"
[train]
steps = {STEPS}
tokens_per_micro_batch = 128
[distill]
teachers = {{large = "{folder}/teacher/model"}}
[optimizer]
lr = 3e-3
""")
    done = ranks.run("train", str(config), *flags, world=world)
    assert done.returncode == code, done.stderr
    return [{"stderr": done.stderr}] if code else read_metrics(directory / "run" / "metrics.jsonl")


def rows(folder: Path) -> tuple[str, ...]:
    return ("--supervised.batch_size", "16", "--data.validation", f"{folder}/large/eval.jsonl")


def test_rows_of_two_teachers_at_two_ranks_and_a_resumed_run_is_the_same(ranks, folder, tmp_path) -> None:
    teachers = f'{{large = "{folder}/teacher/model", other = "{folder}/teacher/model"}}'
    flags = ("--distill.teachers", teachers, "--distill.teacher_key", "of.teacher")
    flags = (*flags, "--supervised.batch_size", "16", "--data.validation", f"{folder}/named.jsonl")
    flags = (*flags, "--parallel.tensor", "2", "--residency.teacher", "offloaded", "--checkpoint.every", "2")
    lines = run(ranks, folder, tmp_path, *flags, world=2)
    assert lines[-1]["validation/loss"] < lines[0]["validation/loss"] - 0.05
    assert all(meaning_of(name) for line in lines for name in line if name != "step")
    whole = weights(tmp_path)
    again = run(ranks, folder, tmp_path, *flags, "--resume", f"{tmp_path}/run/checkpoints/step_2", world=2)
    assert learned(again) == learned(lines)
    assert weights(tmp_path) == whole
    (tmp_path / "one").mkdir()
    flags = ("--supervised.batch_size", "16", "--data.validation", f"{folder}/named.jsonl")
    one = run(ranks, folder, tmp_path / "one", *flags)
    for two_teachers, one_teacher in zip(lines, one, strict=True):
        for name in ("loss/policy", "validation/loss", "grad_norm"):
            assert two_teachers.get(name) == pytest.approx(one_teacher.get(name), rel=1e-4), name


def test_adapters_are_taught(ranks, folder, tmp_path) -> None:
    flags = (*rows(folder), "--lora.rank", "8", "--lora.alpha", "16", "--optimizer.lr", "2e-2")
    lines = run(ranks, folder, tmp_path, *flags)
    assert lines[-1]["validation/loss"] < lines[0]["validation/loss"] - 0.05


@pytest.mark.parametrize("divergence", ["sampled", pytest.param("reverse", marks=pytest.mark.learn)])
def test_what_the_student_samples(ranks, folder, tmp_path, divergence) -> None:
    flags = ("--distill.on_policy", "true", "--distill.divergence", divergence)
    flags = (*flags, "--rollout.prompts_per_step", "8", "--rollout.samples_per_prompt", "2")
    flags = (
        *flags,
        "--rollout.max_new_tokens",
        "6",
        "--rollout.threads",
        "1",
        "--data.max_prompt_tokens",
        "8",
    )
    flags = (*flags, "--checkpoint.every", "2")
    lines = run(ranks, folder, tmp_path, *flags)
    assert lines[0]["weight_version"] == "0"
    assert [line["samples"] for line in lines[1:]] == [16] * STEPS
    assert lines[1]["loss/policy"] > 0.5, "a random student is far from its teacher"
    assert all(meaning_of(name) for line in lines for name in line if name != "step")
    whole = weights(tmp_path)
    again = run(ranks, folder, tmp_path, *flags, "--resume", f"{tmp_path}/run/checkpoints/step_2")
    assert [line["loss/policy"] for line in again[1:]] == [line["loss/policy"] for line in lines[1:]]
    assert weights(tmp_path) == whole


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--distill.teachers", "{}"), r"distill\.teachers: required"),
        (("--distill.divergence", "sampled"), r"distill\.divergence: .*on_policy = true"),
        (("--distill.teachers", '{a = "missing"}'), r"missing/config\.json: not found"),
        (("--distill.teachers", '{a = "TEACHER", b = "TEACHER"}'), r"distill\.teacher_key: required"),
        (
            ("--distill.teachers", '{a = "TEACHER", b = "TEACHER"}', "--distill.teacher_key", "of.teacher"),
            r"named\.jsonl:1:of\.teacher: .*other.*; expected one of a, b",
        ),
        (
            ("--distill.teachers", '{a = "TEACHER", b = "TEACHER"}', "--distill.teacher_key", "who"),
            r"named\.jsonl:1:who: missing",
        ),
    ],
)
def test_what_is_refused(ranks, folder, tmp_path, flags, message) -> None:
    given = [flag.replace("TEACHER", f"{folder}/teacher/model") for flag in flags]
    (said,) = run(ranks, folder, tmp_path, *rows(folder), *given, code=2)
    assert "Traceback" not in said["stderr"]
    assert re.search(message, said["stderr"]), said["stderr"]


def test_another_vocabulary_is_named(ranks, folder, tmp_path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in (folder / "teacher" / "model").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokens = tokenizer["model"]["vocab"]
    tokens["7"], tokens["8"] = tokens["8"], tokens["7"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    flags = ("--distill.teachers", f'{{large = "{other}"}}')
    (said,) = run(ranks, folder, tmp_path, *rows(folder), *flags, code=2)
    assert re.search(r"distill\.teachers\.large: .*2 tokens, such as .7., .8.", said["stderr"]), said[
        "stderr"
    ]
