"""The vocab-parallel head: hidden states to log-probs, entropies and gradients without the logits."""

from mcore_rl.parallel.head.head import (
    Call,
    HeadOutput,
    RowLoss,
    dense_log_prob_entropy,
    head_loss,
    log_prob_entropy,
)

__all__ = ["Call", "HeadOutput", "RowLoss", "dense_log_prob_entropy", "head_loss", "log_prob_entropy"]
