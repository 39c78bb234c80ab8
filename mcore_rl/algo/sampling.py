"""Log-probs under the distribution that was really sampled from: after top-p, top-k or another kept set."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def kept_log_prob(
    logits: Float[Tensor, "*shape V"],
    targets: Int[Tensor, "*shape"],
    keep: Bool[Tensor, "*shape V"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """log softmax over the kept entries only: the Keep Sampling Mask of DeepSeek-V3.2, arXiv 2512.02556.

    The sampled token always counts as kept. d/dlogits = (onehot - p_kept) / temperature on kept entries, 0
    elsewhere. A KL against a reference must use the same mask on both sides, or none.
    """
    keep = keep.scatter(-1, targets[..., None], True)
    scaled = (logits / temperature).masked_fill(~keep, -torch.inf)
    return torch.log_softmax(scaled, dim=-1).gather(-1, targets[..., None]).squeeze(-1)
