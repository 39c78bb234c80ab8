"""Held-out sets in whole runs: taking turns, beside training, resumed, and in supervised training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]
STEPS = 4
ASYNC = ("--rollout.max_staleness", "1", "--algorithm.params.correction", "tis-token")


def config(folder: Path, directory: Path, url: str, **sections: str) -> str:
    """A file with two sets: one sample of each prompt, and four of some."""
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
