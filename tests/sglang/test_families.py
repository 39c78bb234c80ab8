"""Which of the families with windows, caps, sinks and biases SGLang serves on a CPU, and with what answer.

Where it computes something else than transformers, a run with it stops at its first comparison of log-probs
(publish.tolerance_max): this is the list of them. What a later SGLang corrects fails here. A server takes a
minute to start: those that answer otherwise are asked with SGLANG_OTHERWISE=1 alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from mcore_rl.errors import RolloutError
from tests.model.conftest import save
from tests.model.families import FAMILIES
from tests.model.support import VOCAB
from tests.rollout.support import http
from tests.sglang.conftest import sglang_server

PROMPT = [(7 * i + 3) % VOCAB for i in range(19)]
EQUAL = 1e-5
SERVED = ("gemma3",)
OTHERWISE = {
    "mistral_window": "it has no window",
    "qwen3_window": "it has no window",
    "olmo3": "on a CPU: windows, or the second rotary embedding",
    "gemma2": "on a CPU: the cap of scores",
    "llama_biased": "it leaves the biases of the MLP out",
}
"""family -> what is missing"""
otherwise = pytest.mark.skipif("SGLANG_OTHERWISE" not in os.environ, reason="SGLANG_OTHERWISE=1 asks these")


def made(family: str, directory: Path) -> Path:
    """A tiny model; with the field by which SGLang asks for the activation, as published files have it."""
    kind, settings = FAMILIES[family]
    save(AutoModelForCausalLM.from_config, getattr(transformers, kind)(**settings), directory)
    file = directory / "config.json"
    hf = json.loads(file.read_text())
    hf.setdefault("hidden_act", hf.get("hidden_activation", "silu"))
    file.write_text(json.dumps(hf))
    return directory


def difference(url: str, directory: Path) -> float:
    """Largest difference of the log-probs of what the server samples from those of transformers."""
    asked: dict[str, Any] = {"input_ids": PROMPT, "return_logprob": True}
    asked["sampling_params"] = {"max_new_tokens": 12, "temperature": 1.0, "ignore_eos": True}
    reply = http(url, "/generate", asked)
    assert reply.status == 200, reply.body
    pairs = reply.body["meta_info"]["output_token_logprobs"]
    tokens = torch.tensor([*PROMPT, *(token for _, token, *_ in pairs)])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        log_probs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
    expected = log_probs.gather(1, tokens[1:, None])[len(PROMPT) - 1 :, 0]
    return float((expected - torch.tensor([log_prob for log_prob, *_ in pairs])).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("family", [*SERVED, *(pytest.param(one, marks=otherwise) for one in OTHERWISE)])
def test_what_it_answers(family: str, tmp_path: Path) -> None:
    directory = made(family, tmp_path / "model")
    with sglang_server(directory, tmp_path / "log", "--skip-tokenizer-init") as server:
        found = difference(server.url, directory)
    print(f"{family}: log-probs differ by {found:.3g}")
    assert (found <= EQUAL) is (family in SERVED)


@pytest.mark.slow
@otherwise
def test_sinks_are_refused_on_a_cpu(tmp_path: Path) -> None:
    directory = made("gpt_oss", tmp_path / "model")
    log = tmp_path / "log"
    with (
        pytest.raises(RolloutError),
        sglang_server(directory, log, "--skip-tokenizer-init"),
    ):
        pass
    assert "requires one of" in log.read_text()
