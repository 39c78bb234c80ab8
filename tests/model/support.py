"""What tests of the model share: tiny configurations, sequences, and what Megatron computes on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mcore_rl.data.packing import TokenSequence
from mcore_rl.model import platform
from mcore_rl.model.build import Model, build_policy
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh, build_mesh, destroy_mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.training.batch import Batching, align_of
from mcore_rl.training.model_passes import log_probs

VOCAB = 50
DENSE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
MOE = DENSE | {
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}


def sequences(count: int = 10, seed: int = 1) -> list[TokenSequence]:
    """Prompts of 1-6 and responses of 0-9 tokens."""
    rng = np.random.default_rng(seed)

    def draw(low: int, high: int) -> list[int]:
        return rng.integers(VOCAB, size=rng.integers(low, high)).tolist()

    return [TokenSequence(draw(1, 7), draw(0, 10)) for _ in range(count)]


def expected_log_probs(model: torch.nn.Module, scored: Sequence[TokenSequence], temperature: float) -> Tensor:
    """[R] by transformers, one sequence at a time without padding."""
    rows = []
    with torch.no_grad():
        for sequence in scored:
            tokens = torch.tensor([*sequence.prompt, *sequence.response])
            log_p = torch.log_softmax(model(tokens[None]).logits[0].double() / temperature, dim=-1)
            rows.append(log_p[:-1].gather(1, tokens[1:, None]).squeeze(1)[len(sequence.prompt) - 1 :])
    return torch.cat(rows)


def at_layout(pool: Pool, text: str, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """`fn(mesh, *args)` on every rank of `pool` at a layout; the answers in rank order."""
    return pool.run(with_mesh, Layout.parse(text), fn, *args)


def with_mesh(layout: Layout, fn: Callable[..., Any], *args: Any) -> Any:
    platform.install()
    mesh = build_mesh(layout, timeout=60.0)
    try:
        return fn(mesh, *args)
    finally:
        destroy_mesh()


def shape_at(mesh: Mesh, tokens: int = 32) -> Batching:
    return Batching(1, tokens, 10, lambda lengths: np.asarray(lengths, float), align_of(mesh))


def scored_log_probs(
    mesh: Mesh, directory: Path, scored: Sequence[TokenSequence], tokens: int = 32, temperature: float = 1.0
) -> Tensor:
    """[R] by Megatron, packed into micro-batches of at most `tokens`."""
    model: Model = build_policy(directory, mesh)
    return torch.from_numpy(np.concatenate(log_probs(model, scored, shape_at(mesh, tokens), temperature)))
