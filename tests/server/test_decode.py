"""The plain decode step against transformers' own forward, family by family."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config

from mcore_rl.server import decode
from mcore_rl.server.decode import build_decoder
from mcore_rl.server.engine import Engine
from mcore_rl.server.kv_cache import build_cache
from mcore_rl.server.sequence import Limits, Sequence, Wanted
from tests.rollout.support import VOCAB, build_model, build_moe_model

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, rope_parameters=LLAMA_3_ROPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
}
LIMITS = Limits(20, 0, 1.0, 1.0, 0.0, 0, frozenset())


def build(name: str) -> PreTrainedModel:
    """A model whose norms and biases, 1 and 0 in a new one, are drawn too."""
    torch.manual_seed(3)
    if name == "qwen3":
        model = build_model(3)
    else:
        model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="sdpa").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def sampled(engine: Engine) -> tuple[list[list[int]], torch.Tensor]:
    """Token ids, and log-probs one after another, of five prompts of different lengths."""
    prompts = [[(7 * i + k) % VOCAB for k in range(1 + 5 * i)] for i in range(5)]
    sequences = [Sequence(str(i), str(i), p, LIMITS, i, Wanted()) for i, p in enumerate(prompts)]
    engine.submit(sequences)
    while engine.running or engine.waiting:
        engine.step()
    return [s.output_ids for s in sequences], torch.tensor([x for s in sequences for x in s.log_probs])


@pytest.mark.parametrize("numbers", [1 << 18, 0], ids=["plain", "oneDNN"])
@pytest.mark.parametrize("name", [*CONFIGS, "qwen3"])
def test_decoding_is_that_of_transformers(name: str, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "ONEDNN_NUMBERS", numbers)
    model = build(name)
    plain, own, wrong = (Engine(model, build_cache(model, 2048), max_running=8) for _ in range(3))
    assert plain.decoder is not None
    assert plain.decoder.head.by_onednn == (numbers == 0)
    own.decoder = None
    tokens, log_probs = sampled(plain)
    expected_tokens, expected = sampled(own)
    assert tokens == expected_tokens
    assert torch.allclose(log_probs, expected, rtol=0, atol=2e-5)
    assert wrong.decoder is not None
    wrong.decoder.layers[1] = wrong.decoder.layers[1]._replace(scale=1.0)
    assert sampled(wrong)[0] != expected_tokens


def test_products_by_onednn_are_of_the_weights_as_they_are_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update writes into them: nothing of the old ones is kept."""
    monkeypatch.setattr(decode, "ONEDNN_NUMBERS", 0)
    model, other = build("qwen3"), build_model(5)
    updated, fresh = (Engine(one, build_cache(one, 2048), max_running=8) for one in (model, other))
    before = sampled(updated)
    with torch.no_grad():
        for name, target in model.state_dict().items():
            target.copy_(other.state_dict()[name])
    updated.set_version("other")
    after, expected = sampled(updated), sampled(fresh)
    assert after[0] == expected[0]
    assert torch.equal(after[1], expected[1])
    assert before[0] != after[0]


def test_what_is_not_a_known_dense_decoder_keeps_its_own_forward() -> None:
    assert build_decoder(build_moe_model(0)) is None
    other = LlamaConfig(**SIZES, hidden_act="gelu")
    assert build_decoder(AutoModelForCausalLM.from_config(other)) is None
