"""GLM-4.5's family on a real SGLang server: the log-probs of what it samples are those of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from mcore_rl.model.hf.architecture import read_hf_config
from tests.model.conftest import save
from tests.model.families import DENSE, GLM4, GLM_MOE, SMALL
from tests.rollout.support import http
from tests.sglang.conftest import sglang_server

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "vocab_size": 256}
"""its kernels on CPU take no narrower heads"""
PROMPT = [(7 * i + 3) % 256 for i in range(11)]


def write(directory: Path) -> None:
    """A tiny model, its config.json in the form of the published ones: rope fields beside each other."""
    settings = DENSE | SMALL | GLM4 | GLM_MOE | SIZES | {"moe_intermediate_size": 64}
    config = transformers.Glm4MoeConfig(**settings, num_mtp_layers=0)
    save(AutoModelForCausalLM.from_config, config, directory)
    hf = read_hf_config(directory)
    rope = hf.pop("rope_parameters")
    hf |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor")}
    hf |= {"architectures": ["Glm4MoeForCausalLM"], "torch_dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(hf))


def test_its_log_probs_are_those_of_transformers(tmp_path: Path) -> None:
    write(tmp_path / "hf")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    asked = {
        "input_ids": PROMPT,
        "sampling_params": {"max_new_tokens": 8, "temperature": 1.0, "ignore_eos": True},
        "return_logprob": True,
    }
    with sglang_server(tmp_path / "hf", tmp_path / "log", "--skip-tokenizer-init") as server:
        told = http(server.url, "/generate", asked).body["meta_info"]["output_token_logprobs"]
    tokens = torch.tensor([PROMPT + [entry[1] for entry in told]])
    with torch.no_grad():
        log_probs = expected(tokens).logits[0, :-1].log_softmax(-1)
    wanted = log_probs.gather(1, tokens[0, 1:, None])[-len(told) :, 0]
    torch.testing.assert_close(torch.tensor([entry[0] for entry in told]), wanted, rtol=0, atol=2e-5)
