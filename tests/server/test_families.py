"""The embedded server with every family that trains: its log-probs, after an update of its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from mcore_rl.server.engine import Engine
from mcore_rl.server.kv_cache import build_cache
from mcore_rl.server.routing import has_experts, routed_experts
from mcore_rl.server.sequence import Limits, Sequence, Wanted
from mcore_rl.server.weights import load_model, replace_weights
from tests.model.conftest import save
from tests.model.families import FAMILIES
from tests.model.support import VOCAB

LIMITS = Limits(12, 0, 1.0, 1.0, 0.0, 0, frozenset())
PROMPTS = [[(7 * i + k) % VOCAB for k in range(1 + 9 * i)] for i in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_served_after_an_update(family: str, tmp_path: Path) -> None:
    kind, settings = FAMILIES[family]
    config = getattr(transformers, kind)(**settings)
    for seed, name in enumerate(("old", "new")):
        save(AutoModelForCausalLM.from_config, config, tmp_path / name, seed)
    model, shapes = load_model(tmp_path / "old", "cpu")
    replace_weights(model, tmp_path / "new", shapes)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32).eval()
    engine = Engine(model, build_cache(model, 1024), max_running=4)
    sequences = [Sequence(str(i), str(i), p, LIMITS, i, Wanted()) for i, p in enumerate(PROMPTS)]
    engine.submit(sequences)
    while engine.running or engine.waiting:
        engine.step()
    for sequence in sequences:
        tokens = torch.tensor([sequence.tokens])
        with torch.no_grad():
            log_probs = expected(tokens).logits[0, :-1].log_softmax(-1)
        sampled = log_probs.gather(1, tokens[0, 1:, None])[-LIMITS.max_new_tokens :, 0]
        torch.testing.assert_close(torch.tensor(sequence.log_probs), sampled, rtol=0, atol=2e-5)
    assert has_experts(model) is ("num_experts_per_tok" in settings)
    if has_experts(model):
        assert routed_experts(model, sequences[-1].tokens)
