"""What the rollout tests share: tiny models on disk, plain HTTP, and log-probs from transformers itself."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB, CONTEXT, EOS = 320, 512, 319
DEADLINE = 30.0


def build_model(seed: int, *, tied: bool = False, spread: float = 0.3) -> PreTrainedModel:
    """A random Qwen3 whose next-token distributions are far from uniform; `spread` of its weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        eos_token_id=EOS,
        initializer_range=spread,
    )
    return Qwen3ForCausalLM(config).eval().requires_grad_(False)


def build_moe_model(seed: int) -> PreTrainedModel:
    """A random Qwen3-MoE, every layer sparse."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        eos_token_id=EOS,
        initializer_range=0.15,
    )
    return Qwen3MoeForCausalLM(config).eval().requires_grad_(False)


def save_model(directory: Path, model: PreTrainedModel) -> Path:
    """The model and a tokenizer with one word per id."""
    model.save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{EOS}").save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Answer:
    """One HTTP reply."""

    status: int
    body: Any
    """parsed JSON, or text when it is none"""


def http(url: str, path: str, body: object = None, *, method: str = "POST", key: str | None = None) -> Answer:
    """One request; GET and None send no body."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url + path, data=data, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE) as reply:
            return Answer(reply.status, _parse(reply.read()))
    except urllib.error.HTTPError as error:
        return Answer(error.code, _parse(error.read()))


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode()


def wait_until(holds: Callable[[], bool], what: str, seconds: float = DEADLINE) -> None:
    """Polls; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.005)


def running(url: str, key: str | None = None) -> int:
    """How many sequences the server decodes."""
    return http(url, "/v1/loads", method="GET", key=key).body["loads"][0]["num_running_reqs"]


def put_back(url: str, directory: Path) -> None:
    """The server serves this model as version `default`, nothing running, not paused."""
    assert http(url, "/abort_request", {"abort_all": True}).status == 200
    assert http(url, "/continue_generation", {}).status == 200
    update = {"model_path": str(directory), "weight_version": "default"}
    assert http(url, "/update_weights_from_disk", update).status == 200


def log_probs_of(
    model: PreTrainedModel, prompt: list[int], output: list[int], temperature: float = 1.0
) -> torch.Tensor:
    """[n] log-probs of `output` after `prompt`, by one plain forward."""
    tokens = torch.tensor([prompt + output])
    scores = (model(tokens).logits[0] / temperature).log_softmax(-1)
    return scores[len(prompt) - 1 : -1].gather(1, tokens[0, len(prompt) :, None])[:, 0]


def log_probs_on_old_cache(
    old: PreTrainedModel, new: PreTrainedModel, prompt: list[int], output: list[int], switch: int
) -> torch.Tensor:
    """[n - switch] log-probs of output[switch:] under `new`, over keys and values that `old` left."""
    tokens = torch.tensor([prompt + output])
    boundary = len(prompt) + switch - 1
    cache = DynamicCache(config=old.config)
    old(tokens[:, :boundary], past_key_values=cache)
    scores = new(tokens[:, boundary:-1], past_key_values=cache).logits[0].log_softmax(-1)
    return scores.gather(1, tokens[0, boundary + 1 :, None])[:, 0]


def largest_error(got: list[float], want: torch.Tensor) -> float:
    assert len(got) == len(want)
    return float((torch.tensor(got) - want).abs().max())
