"""`mcore-rl eval`: of a directory of weights, of a run, of its checkpoint; cut off, and gone on with."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification

from mcore_rl.directories import is_ours
from mcore_rl.log import read_metrics
from tests.e2e.conftest import ENVIRONMENT, ROOT, command
from tests.e2e.test_evaluation import EASY, config, train

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]


def results(directory: Path) -> dict:
    return json.loads((directory / "results.json").read_text())


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(ranks, folder, server_url, tmp_path_factory) -> Path:
    """A run of one step with a checkpoint, whose published weights were evaluated."""
    file = config(folder, tmp_path_factory.mktemp("trained"), server_url)
    train(ranks, file, "--eval.sets.easy.reward", EASY, "--train.steps", "1", "--checkpoint.every", "1")
    directory = Path(file).parent / "run"
    published = ranks.run("eval", str(directory))
    assert published.returncode == 0, published.stderr
    assert "easy  4/4 prompts  accuracy" in published.stderr
    assert "eval  5/5 prompts  reward" in published.stderr, "of a function that may give anything"
    return directory


def test_a_run_s_weights_and_its_checkpoint_answer_alike(ranks, trained) -> None:
    """The published weights need no conversion, the checkpoint of the same step does."""
    one = trained / "evaluations" / "step_1"
    assert is_ours(one, "evaluation")
    saved = ranks.run("eval", str(trained), "--checkpoint", "latest", "--out", str(trained.parent / "again"))
    assert saved.returncode == 0, saved.stderr
    again = trained.parent / "again"
    assert results(one)["sets"] == results(again)["sets"]
    assert [lines(d / "easy.jsonl") for d in (one,)] == [lines(d / "easy.jsonl") for d in (again,)]
    assert len(lines(one / "easy.jsonl")) == 24
    assert not (again / "model").exists()
    logged = read_metrics(trained / "metrics.jsonl")[-1]
    assert results(one)["sets"]["eval"]["eval/eval/prompts"] == logged["eval/eval/prompts"]


def test_an_evaluation_that_was_cut_off_goes_on_with_what_it_has(ranks, trained, tmp_path) -> None:
    out = tmp_path / "out"
    flags = ("--out", str(out), "--eval.sets.easy.prompts", "3")
    assert ranks.run("eval", str(trained), *flags).returncode == 0
    whole, found = lines(out / "easy.jsonl"), results(out)
    kept = [record | {"response": "mine"} for record in whole[:6]]
    cut = "".join(json.dumps(record) + "\n" for record in [*kept, *whole[6:8]])
    (out / "easy.partial.jsonl").write_text(cut + json.dumps(whole[8])[:30])
    (out / "easy.jsonl").unlink()
    (out / "results.json").unlink()
    done = ranks.run("eval", str(trained), *flags)
    assert done.returncode == 0, done.stderr
    assert lines(out / "easy.jsonl") == [*kept, *whole[6:]], (
        "of the first prompt what there was, the rest anew"
    )
    assert results(out) == found
    assert not (out / "easy.partial.jsonl").exists()
    assert "4/4" not in done.stderr
    again = ranks.run("eval", str(trained), *flags)
    assert (again.returncode, again.stderr) == (0, ""), "what has ended is shown and not sampled"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--checkpoint", "nowhere"), "nowhere is no committed checkpoint"),
        (("--checkpoint", "previous"), "holds 1 committed checkpoints"),
        (("--run.seed", "7"), "holds an evaluation of other seed; name another directory with --out"),
        (("--eval.sets.easy.samples", "7"), "holds an evaluation of other sets"),
        (("--out", "{run}"), "is marked as of the kind 'run'"),
        (("--eval.sets.easy.path", "gone.jsonl"), "gone.jsonl"),
        (("--eval.sets.easy.answer", "nowhere:f"), "eval.sets.easy.answer: cannot import nowhere"),
        (("--eval.sets.easy.pass_at", "[9]"), "9 of 6 samples"),
        (("--bogus", "1"), "--bogus is not of the form"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_a_server_is_asked(ranks, trained, flags, message) -> None:
    done = ranks.run("eval", str(trained), *(flag.format(run=trained) for flag in flags))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_directory_that_is_no_run_and_a_config_without_sets_are_refused(ranks, folder, tmp_path) -> None:
    assert "is no run directory" in ranks.run("eval", str(tmp_path)).stderr
    plain = tmp_path / "plain.toml"
    plain.write_text(
        f'[run]\ndir = "{tmp_path}/r"\n[model]\npath = "{folder}/model"\n[data]\n'
        f'train = "{folder}/train.jsonl"\n[train]\nsteps = 1\n'
    )
    done = ranks.run("eval", str(plain))
    assert (done.returncode, "no held-out set" in done.stderr) == (2, True)
    done = ranks.run("eval", str(plain), "--data.eval", f"{folder}/eval.jsonl")
    assert (done.returncode, "holds no weights" in done.stderr) == (2, True)
    scored = ("--data.eval", f"{folder}/eval.jsonl", "--model.path", f"{folder}/policy")
    done = ranks.run("eval", str(plain), *scored, "--reward.model", "rm")
    assert (done.returncode, "rm" in done.stderr, "Traceback" in done.stderr) == (2, True, False)


def test_a_set_is_scored_by_a_reward_model_in_the_command_itself(ranks, folder, server_url, tmp_path) -> None:
    """With the score of transformers' classifier, over the tokens that were sampled."""
    path, sizes = tmp_path / "judge", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    policy = json.loads((folder / "policy" / "config.json").read_text())
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_labels": 1}
    judge = Qwen3ForSequenceClassification(
        Qwen3Config(vocab_size=policy["vocab_size"], initializer_range=0.2, pad_token_id=0, **sizes, **heads)
    )
    judge.save_pretrained(path)
    for file in (folder / "policy").glob("*token*"):
        shutil.copy(file, path)
    file = config(folder, tmp_path, server_url)
    flags = ("--reward.model", str(path), "--eval.sets.easy.reward", EASY, "--train.eval_samples", "3")
    done = ranks.run("eval", file, *flags)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "run" / "evaluations" / "policy"
    tokenizer, records = AutoTokenizer.from_pretrained(path), lines(out / "eval.jsonl")
    assert len(records) == 3
    for record in records:
        ends = [tokenizer.eos_token] if record["finish_reason"] == "stop" else []
        text = "".join([record["prompt"], record["response"], *ends])
        ids = tokenizer.encode(text, add_special_tokens=False)
        with torch.no_grad():
            assert record["reward"] == pytest.approx(judge(torch.tensor([ids])).logits.item(), abs=1e-4)
    found = results(out)["sets"]
    assert found["eval"]["eval/eval/reward"] == pytest.approx(sum(r["reward"] for r in records) / 3)
    assert "eval/easy/accuracy" in found["easy"]


def read_to_the_end(terminal: int, heard: list[bytes]) -> None:
    """What a terminal shows until nobody writes to it any more."""
    with suppress(OSError):
        while data := os.read(terminal, 1 << 16):
            heard.append(data)


def test_a_config_is_evaluated_by_a_server_of_its_own_which_ends_with_the_command(folder, tmp_path) -> None:
    """On a terminal, whose last line says what is being done.

    And SIGTERM leaves what was sampled: the reward is so slow that it comes before the end.
    """
    file = config(folder, tmp_path, "http://127.0.0.1:1")
    slow = (
        "--eval.sets.easy.reward",
        EASY,
        "--reward.function",
        "tests.e2e.rewards:slow",
        "--rollout.urls",
        "[]",
        "--rollout.threads",
        "1",
    )
    reading, writing = os.openpty()
    running = subprocess.Popen(
        command("eval", file, *slow),
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"TERM": "xterm"},
        stderr=writing,
    )
    os.close(writing)
    heard: list[bytes] = []
    reader = threading.Thread(target=read_to_the_end, args=(reading, heard), daemon=True)
    reader.start()
    out = tmp_path / "run" / "evaluations" / "policy"
    partial, deadline = out / "eval.partial.jsonl", time.monotonic() + 120
    while not partial.exists():
        assert time.monotonic() < deadline, b"".join(heard)
        assert running.poll() is None, b"".join(heard)
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    running.wait(60)
    reader.join(60)
    os.close(reading)
    said = b"".join(heard).decode()
    assert running.returncode == 75, said
    assert re.search(r"\r\x1b\[2K\[\.{20}\]  starting 1 servers \d+ s\r", said), said
    assert re.search(r"eval  \d/5 prompts", said), said
    assert len(lines(partial)) < 5
    assert not (out / "results.json").exists()
    group = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in "".join(row for row in group.splitlines() if "mcore_rl.server" in row)
