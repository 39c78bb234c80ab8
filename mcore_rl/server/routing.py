"""Which experts a sequence's tokens are sent to."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from mcore_rl.rollout.experts import encode_experts


def has_experts(model: PreTrainedModel) -> bool:
    """Whether a layer of it is a mixture of experts."""
    return bool(_gates(model))


@torch.inference_mode()
def routed_experts(model: PreTrainedModel, tokens: list[int]) -> str:
    """base64 of int32 [tokens - 1, layers, K], as SGLang returns it; 0 in dense layers.

    By a forward pass of its own over the finished sequence, so that decoding need not keep what routers
    chose; the last token was sampled and not read.
    """
    gates, chosen = _gates(model), {}
    hooks = [
        gate.register_forward_hook(lambda _, __, out, layer=layer: chosen.__setitem__(layer, out[2]))
        for layer, gate in gates.items()
    ]
    try:
        model.base_model(input_ids=torch.tensor([tokens[:-1]], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    kept = torch.zeros(
        len(tokens) - 1, len(_layers(model)), next(iter(chosen.values())).shape[1], dtype=torch.int32
    )
    for layer, experts in chosen.items():
        kept[:, layer] = experts
    return encode_experts(kept.numpy())


def _layers(model: PreTrainedModel) -> Any:
    return model.base_model.layers


def _gates(model: PreTrainedModel) -> dict[int, Any]:
    """Layer -> its router."""
    found = (
        (i, getattr(layer.mlp, "gate", getattr(layer.mlp, "router", None)))
        for i, layer in enumerate(_layers(model))
    )
    return {i: gate for i, gate in found if gate is not None}
