"""Rewards of SGLang servers: a judge's score over the OpenAI-compatible address, and a reward model's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from mcore_rl.rewards import Void
from mcore_rl.rewards.remote import classify, judge
from mcore_rl.rollout.processes import LocalServer, SGLang
from mcore_rl.types import Group, Prompt, Sample, VersionSpan
from tests.rollout.support import CONTEXT, EOS, VOCAB, save_model
from tests.sglang.conftest import ON_CPU, PYTHON


def group(*responses: list[int]) -> Group:
    prompt = Prompt("p", "w1w2", (1, 2), "", messages=[{"role": "user", "content": "w1w2"}])
    samples = [
        Sample.of_response(
            id=f"p@1/{k}",
            prompt=prompt,
            token_ids=np.array(ids, np.int32),
            log_probs=np.zeros(len(ids), np.float32),
            text="".join(f"w{i}" for i in ids),
            finish_reason="stop",
            versions=(VersionSpan("0", 0, len(ids)),),
        )
        for k, ids in enumerate(responses)
    ]
    return Group("p@1", tuple(samples))


RESPONSES = [[3], [4, 5, 6], [7] * 20]


def classifier(directory: Path) -> Qwen3ForSequenceClassification:
    """A random one, saved with a bias of zeros for its head.

    SGLang 0.5.23 gives Qwen's classifiers a bias that transformers' have not, and draws it at random where
    the file has none: every start of a server would add another constant to its scores.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_labels": 1}
    tokens = {"vocab_size": VOCAB, "eos_token_id": EOS, "pad_token_id": EOS}
    config = Qwen3Config(max_position_embeddings=CONTEXT, initializer_range=0.3, **sizes, **heads, **tokens)
    model = Qwen3ForSequenceClassification(config).eval()
    save_model(directory, model)
    file = directory / "model.safetensors"
    save_file(load_file(file) | {"score.bias": torch.zeros(1)}, file, {"format": "pt"})
    return model


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    directory = tmp_path_factory.mktemp("classifier")
    model = classifier(directory / "model")
    program = SGLang(PYTHON, dtype="float32", options=(*ON_CPU, "--is-embedding"))
    server = LocalServer(directory / "model", program, log_file=directory / "log", start_timeout=400.0)
    with server:
        yield server.url, model


def test_the_score_of_a_served_reward_model_is_that_of_transformers(judged: tuple[str, Any]) -> None:
    url, model = judged
    said = asyncio.run(classify(group(*RESPONSES), url=url))
    with torch.no_grad():
        wanted = [model(torch.tensor([[1, 2, *ids]])).logits.item() for ids in RESPONSES]
        other = [model(torch.tensor([[1, *ids]])).logits.item() for ids in RESPONSES]
    np.testing.assert_allclose(said, wanted, atol=1e-4)
    assert np.abs(np.subtract(said, other)).max() > 1e-2, "the control: without a token of the prompt"


def test_a_response_that_is_too_long_for_it_is_void(judged: tuple[str, Any]) -> None:
    url, _ = judged
    (void,) = asyncio.run(classify(group([3] * (CONTEXT + 10)), url=url))
    assert isinstance(void, Void)
    assert void.reason == "refused"
    assert "context length" in void.why


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a tiny model of random weights whose tokenizer has a chat template."""
    directory = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    tokens = {"vocab_size": VOCAB, "eos_token_id": EOS, "pad_token_id": EOS}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(max_position_embeddings=CONTEXT, **sizes, **heads, **tokens))
    save_model(directory / "model", model)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (directory / "model" / "chat_template.jinja").write_text(template)
    program = SGLang(PYTHON, dtype="float32", options=ON_CPU)
    server = LocalServer(directory / "model", program, log_file=directory / "log", start_timeout=400.0)
    with server:
        yield server.url


def test_a_judge_is_any_server_of_the_openai_protocol(speaking: str) -> None:
    """What a model of random weights says is no score, and its words are one where `score` reads them."""
    args: dict[str, Any] = {"url": f"{speaking}/v1", "model": "default", "max_tokens": 8}
    args |= {"template": "w5{response}"}
    said = asyncio.run(judge(group(*RESPONSES), **args))
    assert [void.reason for void in said] == ["unparsed"] * 3
    words = asyncio.run(judge(group(*RESPONSES), **args, score=r"w(\d+)", high=float(VOCAB)))
    assert all(0 <= score <= 1 for score in words)
    wrong = args | {"url": f"{speaking}/v2"}
    (void, *_) = asyncio.run(judge(group(*RESPONSES), **wrong))
    assert void.reason == "refused"
