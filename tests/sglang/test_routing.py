"""Routing replay against a real server: Megatron sends tokens where SGLang did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mcore_rl.data.packing import TokenSequence
from mcore_rl.parallel.pool import Pool
from mcore_rl.rollout.client import Reply, RolloutClient, call
from mcore_rl.rollout.fleet import check_server
from mcore_rl.types import ExpertLayers
from tests.model.support import at_layout, scored_log_probs
from tests.rollout.support import VOCAB, build_moe_model, save_model

OF_MODEL = ExpertLayers(experts=4, per_token=2, sparse=(True, True))
PROMPTS = [np.random.default_rng(i).integers(VOCAB, size=4 + i).tolist() for i in range(16)]


@pytest.fixture
def replies(moe_url: str) -> list[Reply]:
    params = [{"max_new_tokens": 48, "ignore_eos": True}] * len(PROMPTS)
    rids = [f"routed-{i}" for i in range(len(PROMPTS))]

    async def ask(client: RolloutClient) -> list[Reply]:
        await check_server(client, experts=True)
        return await client.generate(PROMPTS, params, rids, experts=OF_MODEL)

    return call(RolloutClient(moe_url, timeout=60.0), ask)


def sequences(replies: Sequence[Reply], *, replayed: bool) -> list[TokenSequence]:
    return [
        TokenSequence(prompt, reply.token_ids, experts=reply.experts if replayed else None)
        for prompt, reply in zip(PROMPTS, replies, strict=True)
    ]


def difference(pool: Pool, layout: str, source: Path, replies: Sequence[Reply], *, replayed: bool) -> Tensor:
    """[tokens] |Megatron - server|."""
    scored = sequences(replies, replayed=replayed)
    got = at_layout(pool, layout, scored_log_probs, source, scored, 256)[0]
    sampled = torch.tensor([value for reply in replies for value in reply.log_probs])
    return (got - sampled).abs()


@pytest.mark.parametrize("layout", ["tp2ep2", "pp2"])
def test_equal_weights_agree_and_equal_what_transformers_chooses(
    pool2: Pool, layout: str, moe_dirs: tuple[Path, Path], replies: list[Reply]
) -> None:
    found = difference(pool2, layout, moe_dirs[0], replies, replayed=True)
    assert len(found) == 16 * 48
    assert found.quantile(0.999) <= 2e-5
    assert found.max() <= 2e-4
    model, same = build_moe_model(0), []
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        logits = model(torch.tensor([[*prompt, *reply.token_ids]]), output_router_logits=True).router_logits
        wanted = np.stack([one.topk(2).indices.sort(-1).values[:-1].numpy() for one in logits], axis=1)
        same.append((np.sort(reply.experts, -1) == wanted).mean())
    assert np.mean(same) > 0.999
    late = [replace(reply, experts=np.roll(reply.experts, 1, axis=0)) for reply in replies]
    assert difference(pool2, layout, moe_dirs[0], late, replayed=True).max() > 1e-2, "the control"


def test_a_router_that_differs_a_little_is_corrected(
    pool2: Pool, replies: list[Reply], tmp_path: Path
) -> None:
    """It is moved as another precision or engine would: without replay, tokens go elsewhere."""
    model = build_moe_model(0)
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.add_(3e-3 * torch.randn_like(layer.mlp.gate.weight))
    source = save_model(tmp_path / "perturbed", model)
    plain = difference(pool2, "tp2ep2", source, replies, replayed=False)
    replayed = difference(pool2, "tp2ep2", source, replies, replayed=True)
    print(
        f"largest {plain.max():.3g} -> {replayed.max():.3g}, mean {plain.mean():.3g} -> {replayed.mean():.3g}"
    )
    assert replayed.max() < plain.max() / 2
    assert replayed.mean() < plain.mean()
