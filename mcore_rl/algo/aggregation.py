"""How per-token losses become one number: L = sum over rows of weight * loss.

The denominators are global over one optimizer step (all micro-batches x DP x CP) and known before the forward
pass, so the sum does not depend on how the rows are split. A mean of micro-batch means is a different, wrong
objective.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mcore_rl.errors import ConfigError

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]


def aggregation_weight(
    aggregation: Aggregation,
    sequence_tokens: Float[Tensor, "*shape"],
    *,
    tokens: float | int,
    sequences: float | int,
    max_length: float | int,
) -> Float[Tensor, "*shape"]:
    """Weight of every scored token; multiply by the mask where masked tokens are still present.

    Args:
        aggregation: token-mean 1/tokens (DAPO, arXiv 2503.14476 section 3.3; LitePPO, 2508.08221);
            seq-mean-token-mean 1/(n_i sequences) (GRPO, 2402.03300 eq. 3; GSPO, 2507.18071 eq. 5; SAPO,
            2511.20347); seq-mean-token-sum 1/sequences (REINFORCE); seq-mean-token-sum-norm 1/(sequences
            max_length) (Dr. GRPO, 2503.20783).
        sequence_tokens: n_i, scored tokens of the WHOLE sequence the token belongs to (not of its CP shard).
        tokens: scored tokens of the whole optimizer step.
        sequences: sequences of the whole optimizer step. All of them by default, fully masked ones included,
            so that filtering out overlong answers does not weigh up the rest; pass the non-empty ones for the
            other reading.
        max_length: response limit in tokens; only seq-mean-token-sum-norm uses it.

    Raises:
        ConfigError: unknown aggregation.
    """
    match aggregation:
        case "token-mean":
            return torch.full_like(sequence_tokens, 1.0 / max(tokens, 1))
        case "seq-mean-token-mean":
            return 1.0 / (sequence_tokens.clamp(min=1) * max(sequences, 1))
        case "seq-mean-token-sum":
            return torch.full_like(sequence_tokens, 1.0 / max(sequences, 1))
        case "seq-mean-token-sum-norm":
            return torch.full_like(sequence_tokens, 1.0 / (max(sequences, 1) * max_length))
    raise ConfigError(
        f"algorithm.aggregation: {aggregation!r} is unknown; use one of {', '.join(get_args(Aggregation))}"
    )


def weighted_sum(loss: Float[Tensor, "*shape"], weight: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """sum weight * loss, where a row of weight 0 contributes exactly 0 even if its loss is not finite."""
    return torch.where(weight != 0, weight * loss, 0.0).sum()
