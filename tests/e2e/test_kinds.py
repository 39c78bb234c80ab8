"""Training without rollouts in whole runs: conversations, pairs and verdicts; resumed, rehearsed, refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from examples.arithmetic import main as write_arithmetic
from mcore_rl.convert.command import adapter, mcore_to_hf
from mcore_rl.log import read_metrics
from mcore_rl.metric_names import meaning_of

STEPS = 4
TALK = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of two layers with a chat template, and its rows in all forms."""
    made = tmp_path_factory.mktemp("kinds")
    assert (
        write_arithmetic([str(made), "--train", "80", "--eval", "4", "--layers", "2", "--hidden", "64"]) == 0
    )
    (made / "model" / "chat_template.jinja").write_text(TALK)
    problems = [json.loads(line) for line in (made / "train.jsonl").read_text().splitlines()]
    forms: dict[str, list[dict]] = {"pairs": [], "verdicts": [], "talks": []}
    for number, problem in enumerate(problems):
        ask, right = problem["prompt"], problem["label"]
        wrong, row = right[::-1] + "1", {"id": problem["id"], "prompt": ask}
        forms["pairs"].append({**row, "chosen": right, "rejected": wrong})
        answer = right if number % 2 else wrong
        forms["verdicts"].append({**row, "completion": answer, "label": bool(number % 2)})
        turns = [("user", ask), ("assistant", right), ("user", "1+1="), ("assistant", "2")]
        forms["talks"].append({"messages": [{"role": role, "content": text} for role, text in turns]})
    for name, rows in forms.items():
        for part, some in (("train", rows[:64]), ("held_out", rows[64:])):
            text = "".join(json.dumps(one) + "\n" for one in some)
            (made / f"{name}.{part}.jsonl").write_text(text)
    return made


def run(
    ranks,
    folder: Path,
    directory: Path,
    rows: str,
    *flags: str,
    world: int = 1,
    code: int = 0,
    fault: dict | None = None,
) -> list[dict]:
    config = directory / "config.toml"
    config.write_text(f"""
[run]
dir = "{directory}/run"
[model]
path = "{folder}/model"
random_init = true
[data]
train = "{folder}/{rows}.train.jsonl"
validation = "{folder}/{rows}.held_out.jsonl"
[train]
steps = {STEPS}
tokens_per_micro_batch = 128
[supervised]
batch_size = 8
[optimizer]
lr = 1e-3
""")
    script = [] if fault is None else ["tests/faults/faulty.py", json.dumps([fault])]
    done = ranks.run(*script, "train", str(config), *flags, world=world)
    assert done.returncode == code, done.stderr
    return [{"stderr": done.stderr}] if code else read_metrics(directory / "run" / "metrics.jsonl")


def learned(lines: list[dict]) -> list[dict]:
    """What was measured of the model, less what is of the machine."""
    machine = ("time/", "throughput/", "memory/")
    return [{name: x for name, x in line.items() if not name.startswith(machine)} for line in lines]


def weights(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((directory / "run" / "model").glob("*.safetensors")))


DPO = ("--run.kind", "preference")


@pytest.mark.slow
def test_pairs_are_learnt_at_two_ranks_and_a_resumed_run_is_the_same(ranks, folder, tmp_path) -> None:
    """Resumed after all ranks were killed in the middle of the third step."""
    flags = (*DPO, "--parallel.tensor", "2", "--residency.reference", "offloaded", "--checkpoint.every", "2")
    flags += ("--checkpoint.background", "false")
    lines = run(ranks, folder, tmp_path, "pairs", *flags, world=2)
    assert lines[1]["loss/policy"] == pytest.approx(0.693147, abs=1e-5), "the policy is its own reference"
    assert lines[0]["validation/accuracy"] == pytest.approx(0.5)
    assert lines[-1]["validation/loss"] < lines[0]["validation/loss"] - 0.02
    assert lines[-1]["validation/margin"] > 0
    assert all(meaning_of(name) for line in lines for name in line if name != "step")
    whole = weights(tmp_path)
    cut = tmp_path / "cut"
    cut.mkdir()
    fault = {"do": "kill", "rank": "any", "step": 3}
    (killed,) = run(ranks, folder, cut, "pairs", *flags, world=2, code=-9, fault=fault)
    assert killed["stderr"].count("fault: kill in process ") == 2
    assert [line["step"] for line in read_metrics(cut / "run" / "metrics.jsonl")] == [0, 1, 2]
    again = run(ranks, folder, cut, "pairs", *flags, "--resume", "latest", world=2)
    assert learned(again) == learned(lines)
    assert weights(cut) == whole


@pytest.mark.slow
def test_a_reference_that_is_swapped_or_kept_says_the_same(ranks, folder, tmp_path) -> None:
    found = {}
    for where in ("swapped", "kept"):
        (tmp_path / where).mkdir()
        flags = (*DPO, "--residency.reference", where, "--preference.loss", "ipo")
        found[where] = run(ranks, folder, tmp_path / where, "pairs", *flags)
        assert found[where][1]["preference/accuracy"] == 0.5, "the policy is its own reference"
    for swapped, kept in zip(*found.values(), strict=True):
        for name in ("loss/policy", "preference/margin", "validation/loss"):
            assert kept.get(name) == pytest.approx(swapped.get(name), rel=2e-5, abs=1e-6), name


@pytest.mark.slow
def test_verdicts_are_learnt(ranks, folder, tmp_path) -> None:
    lines = run(ranks, folder, tmp_path, "verdicts", *DPO, "--preference.loss", "kto")
    assert lines[1]["preference/reference_point"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["preference/reference_point"] != pytest.approx(0, abs=1e-5)
    assert lines[-1]["validation/chosen"] > lines[-1]["validation/rejected"]
    assert lines[-1]["validation/loss"] < lines[0]["validation/loss"]


@pytest.mark.slow
def test_the_reference_of_adapters_is_the_model_without_them(ranks, folder, tmp_path) -> None:
    """Also where training starts from an adapter: its margin is the one that it had."""
    flags = (*DPO, "--lora.rank", "4", "--lora.alpha", "8", "--optimizer.lr", "1e-2")
    lines = run(ranks, folder, tmp_path, "pairs", *flags, "--checkpoint.every", str(STEPS))
    assert lines[1]["loss/policy"] == pytest.approx(0.693147, abs=1e-5)
    assert lines[-1]["validation/loss"] < lines[0]["validation/loss"] - 0.02
    adapter(tmp_path / f"run/checkpoints/step_{STEPS}", tmp_path / "adapter", model=folder / "model")
    (tmp_path / "again").mkdir()
    start = ("--lora.path", f"{tmp_path}/adapter", "--train.steps", "1")
    again = run(ranks, folder, tmp_path / "again", "pairs", *flags, *start)
    assert again[0]["validation/margin"] == pytest.approx(lines[-1]["validation/margin"], rel=1e-4)
    assert again[0]["validation/margin"] > 0.02


@pytest.mark.slow
def test_all_turns_of_conversations_are_learnt(ranks, folder, tmp_path) -> None:
    flags = ("--run.kind", "sft", "--supervised.target", "all", "--data.prompt_key", "messages")
    lines = run(ranks, folder, tmp_path, "talks", *flags, "--optimizer.lr", "3e-3")
    talk = json.loads((folder / "talks.held_out.jsonl").read_text().splitlines()[0])["messages"]
    assert lines[1]["tokens"] == pytest.approx(8 * (len(talk[1]["content"]) + 3), abs=8)
    assert lines[-1]["validation/loss"] < lines[0]["validation/loss"] - 0.2
    assert lines[-1]["validation/perplexity"] < lines[0]["validation/perplexity"]


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ("verdicts", DPO, "verdicts.train.jsonl:1:chosen: missing"),
        ("pairs", (*DPO, "--preference.loss", "kto"), "pairs.train.jsonl:1:completion: missing"),
        ("pairs", (*DPO, "--supervised.batch_size", "65"), "the file has 64 usable"),
        ("pairs", (*DPO, "--train.tokens_per_micro_batch", "12"), "both answers of .* make"),
    ],
)
def test_rows_that_are_not_what_the_kind_reads_are_refused(
    ranks, folder, tmp_path, rows, flags, message
) -> None:
    (said,) = run(ranks, folder, tmp_path, rows, *flags, code=2)
    assert "Traceback" not in said["stderr"]
    assert re.search(message, said["stderr"]), said["stderr"]


@pytest.mark.slow
def test_a_reward_model_is_a_classifier_of_transformers(ranks, folder, tmp_path) -> None:
    flags = ("--run.kind", "reward_model", "--parallel.tensor", "2", "--train.steps", "12")
    flags = (*flags, "--checkpoint.every", "12")
    lines = run(ranks, folder, tmp_path, "pairs", *flags, "--optimizer.lr", "3e-3", world=2)
    assert lines[-1]["validation/accuracy"] > 0.8
    assert lines[-1]["validation/loss"] < 0.6
    assert all(meaning_of(name) for line in lines for name in line if name != "step")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / "model", dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    margins = []
    for line in (folder / "pairs.held_out.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts = [row["prompt"] + row[key] + "<eos>" for key in ("chosen", "rejected")]
        with torch.no_grad():
            chosen, rejected = (model(torch.tensor([tokenizer.encode(text)])).logits.item() for text in texts)
        margins.append(chosen - rejected)
    assert lines[-1]["validation/margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert lines[-1]["validation/accuracy"] == pytest.approx(sum(one > 0 for one in margins) / len(margins))
    saved, again = tmp_path / "run" / "checkpoints" / "step_12", tmp_path / "converted"
    mcore_to_hf(saved, again, config=folder / "model")
    converted = AutoModelForSequenceClassification.from_pretrained(again, dtype=torch.float32)
    pairs = zip(model.parameters(), converted.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
