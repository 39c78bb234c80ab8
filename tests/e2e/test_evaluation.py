"""Held-out sets in whole runs: taking turns, beside training, resumed, and in supervised training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mcore_rl.log import read_metrics
from mcore_rl.metric_names import meaning_of

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]
STEPS = 4
ASYNC = ("--rollout.max_staleness", "1", "--algorithm.params.correction", "tis-token")


def config(folder: Path, directory: Path, url: str, **sections: str) -> str:
    """A file with two sets: one sample of each prompt, and four of some."""
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    (directory / "easy.jsonl").write_text("".join(json.dumps(row | {"label": "1"}) + "\n" for row in rows))
    path = directory / "config.toml"
    path.write_text(f"""
[run]
dir = "{directory}/run"
[model]
path = "{folder}/policy"
[data]
train = "{folder}/train.jsonl"
eval = "{folder}/eval.jsonl"
[rollout]
urls = ["{url}"]
max_new_tokens = 4
[optimizer]
lr = 1e-2
[train]
steps = {STEPS}
eval_every = 1
[eval.sets.easy]
path = "{directory}/easy.jsonl"
samples = 6
prompts = 4
temperature = 0.7
top_p = 0.9
pass_at = [1, 6]
majority_at = [3, 6]
""")
    return str(path)


def train(ranks, file: str, *flags: str, world: int = 1) -> list[dict]:
    rl = (
        "--rollout.prompts_per_step",
        "4",
        "--rollout.samples_per_prompt",
        "4",
        "--algorithm.mini_batches",
        "1",
    )
    rl = () if "sft" in flags else (*rl, "--reward.function", "tests.e2e.rewards:brevity")
    done = ranks.run("train", file, *rl, *flags, world=world)
    assert done.returncode == 0, done.stderr
    return read_metrics(Path(file).parent / "run" / "metrics.jsonl")


def of_sets(line: dict) -> dict:
    return {key: value for key, value in line.items() if key.startswith("eval/")}


def records(file: str, step: int, name: str) -> list[dict]:
    path = Path(file).parent / "run" / "eval" / f"step_{step}.{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


EASY = "mcore_rl.rewards.exact:exact_match"


@pytest.fixture(scope="module")
def turns(ranks, folder: Path, server_url: str, tmp_path_factory: pytest.TempPathFactory):
    """A run that takes turns, with its file."""
    file = config(folder, tmp_path_factory.mktemp("turns"), server_url)
    return file, train(ranks, file, "--eval.sets.easy.reward", EASY)


def test_every_set_is_measured_after_every_step_and_all_samples_are_kept(turns) -> None:
    file, lines = turns
    assert [line["eval/version"] for line in lines] == list(range(STEPS + 1))
    assert all(meaning_of(key) for line in lines for key in line if key not in ("step", "non_finite"))
    for line in lines:
        kept = records(file, line["step"], "easy")
        assert (len(kept), line["eval/easy/samples"], line["eval/easy/sampled"]) == (24, 24, 4)
        right = [record["response"].strip() == record["label"] == "1" for record in kept]
        assert [record["reward"] for record in kept] == [float(value) for value in right]
        assert line["eval/easy/accuracy"] == pytest.approx(sum(right) / 24)
        assert line["eval/easy/pass@1"] == pytest.approx(line["eval/easy/accuracy"])
        passed = {record["prompt_id"] for record, value in zip(kept, right, strict=True) if value}
        assert line["eval/easy/pass@6"] == pytest.approx(len(passed) / 4)
        assert line["eval/easy/accuracy/low"] <= line["eval/easy/accuracy"]
        assert len({record["prompt_id"] for record in kept}) == 4
    assert lines[0]["eval/eval/accuracy"] < lines[-1]["eval/eval/accuracy"], "brevity was learned"


def test_two_replicas_measure_what_one_does(ranks, turns, folder, server_url, tmp_path) -> None:
    """Before the first update, where the weights are equal bit by bit."""
    file, lines = turns
    other = config(folder, tmp_path, server_url)
    flags = ("--eval.sets.easy.reward", EASY, "--parallel.data", "2", "--train.steps", "1")
    again = train(ranks, other, *flags, world=2)
    assert of_sets(again[0]) == of_sets(lines[0])
    by_id = [sorted(records(f, 0, "easy"), key=lambda r: r["prompt_id"]) for f in (file, other)]
    assert by_id[0] == by_id[1]


def test_beside_training_an_evaluation_is_in_the_record_of_the_next_step(
    ranks, folder, server_url, tmp_path
) -> None:
    """And a resume asks again for the one that the checkpoint's step had begun."""
    file = config(folder, tmp_path, server_url)
    flags = (*ASYNC, "--eval.sets.easy.reward", EASY, "--checkpoint.every", "1", "--checkpoint.keep", "4")
    lines = train(ranks, file, *flags)
    assert [line.get("eval/version") for line in lines] == [None, 0, 1, 2, 4]
    kept = {step: records(file, step, "easy") for step in (0, 1, 2, 4)}
    (tmp_path / "run" / "eval" / "step_2.easy.jsonl").unlink()
    resumed = train(ranks, file, *flags, "--resume", f"{tmp_path}/run/checkpoints/step_2")
    assert [of_sets(line) for line in resumed[:4]] == [of_sets(line) for line in lines[:4]]
    assert records(file, 2, "easy") == kept[2]


def test_supervised_training_is_evaluated_too(ranks, folder, server_url, tmp_path) -> None:
    file = config(folder, tmp_path, server_url)
    flags = ("--run.kind", "sft", "--supervised.batch_size", "8", "--train.eval_every", "3")
    flags = (*flags, "--optimizer.warmup_steps", "2", "--eval.sets.easy.max_new_tokens", "3")
    flags = (*flags, "--data.validation", str(folder / "eval.jsonl"))
    lines = train(ranks, file, *flags)
    rates = [line["lr/policy"] for line in lines[1:]]
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2]), "no update has the size 0"
    assert [line.get("eval/version") for line in lines] == [0, None, None, 3, 4]
    assert [line.get("weight_version") for line in lines] == ["0", None, None, "3", "4"]
    assert all(meaning_of(key) for line in lines for key in line if key != "step")
    assert records(file, 0, "easy") != records(file, 4, "easy")
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    for line, weights in ((lines[0], folder / "policy"), (lines[4], tmp_path / "run" / "model")):
        assert line["validation/loss"] == pytest.approx(loss_of_labels(weights, rows), abs=1e-4)
    assert abs(lines[0]["validation/loss"] - lines[4]["validation/loss"]) > 1e-2


def loss_of_labels(weights: Path, rows: list[dict]) -> float:
    """Nats per label token, end of sequence included, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(weights)
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32)
    losses = []
    for row in rows:
        prompt, label = (tokenizer.encode(row[key], add_special_tokens=False) for key in ("prompt", "label"))
        ids = torch.tensor([[*prompt, *label, tokenizer.eos_token_id]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        losses += [-log_probs[at, ids[0, at + 1]].item() for at in range(len(prompt) - 1, ids.shape[1] - 1)]
    return sum(losses) / len(losses)
