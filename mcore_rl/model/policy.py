"""The policy: Megatron's GPTModel whose output layer answers with log-probs and entropies, never logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from mcore_rl.parallel.head import Call, HeadOutput, RowLoss, head_loss, log_prob_entropy


@dataclass(frozen=True)
class Scored:
    """What the head scores: `targets[r]` from the hidden state of local packed token `rows[r]`."""

    rows: Tensor
    """[R] int64 into the local tokens"""
    targets: Tensor
    """[R] int64"""
    temperature: float
    """temperature of the sampling policy"""
    loss: RowLoss | None = None
    """a policy answers with `parallel.head.head_loss` of it instead of log-probs; a critic ignores it"""


class LogProbHead(ColumnParallelLinear):
    """The output layer, entered by its own call so that Megatron's hooks fire (parameter gather, gradient).

    GPTModel hard-codes ColumnParallelLinear, so the class of the constructed layer is set; it adds no weight.
    """

    vocab_size: int
    """tokens without padding"""

    @classmethod
    def adopt(cls, layer: ColumnParallelLinear, vocab_size: int) -> LogProbHead:
        """Turn GPTModel's output layer into this head."""
        layer.__class__ = cls
        head = cast(LogProbHead, layer)
        head.vocab_size = vocab_size
        return head

    def forward(  # type: ignore[override]  # only `PolicyModel.head` calls it
        self, hidden: Tensor, weight: Tensor | None = None, *, scored: Scored
    ) -> HeadOutput | Tensor:
        """hidden [T or T/tp, 1, H] -> log-prob and entropy [R], or a scalar; see parallel.head."""
        states, weight = hidden.squeeze(1), cast(Tensor, self.weight) if weight is None else weight
        call = Call.of(
            weight,
            scored.targets,
            scored.temperature,
            rows=scored.rows,
            group=cast(dist.ProcessGroup, self.tp_group),
            vocab_size=self.vocab_size,
            sequence_parallel=self.sequence_parallel,
        )
        if scored.loss is None:
            return log_prob_entropy(states, weight, call)
        return head_loss(states, weight, call, scored.loss)


class PackedGPT(GPTModel):
    """GPTModel with rotary positions of packed sequences; a subclass says what its last stage answers with.

    `labels` carries the `Scored` rows to the last stage: Megatron passes that argument through untouched.
    """

    def head(self, hidden: Tensor, scored: Scored) -> HeadOutput | Tensor:
        """hidden [T or T/tp, 1, H] of the last stage -> what the scored rows get, [R] each."""
        raise NotImplementedError

    def _preprocess(self, input_ids, position_ids, *args, packed_seq_params: Any = None, **kwargs) -> Any:
        prepared = super()._preprocess(
            input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs
        )
        table = self.rotary_pos_emb(packed_seq_params.max_seqlen_q, packed_seq=True)
        return prepared[0], table.index_select(0, packed_seq_params.position_ids), *prepared[2:]

    def _postprocess(self, hidden_states, *args, labels: Any = None, **kwargs) -> Any:
        if not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=labels, **kwargs)
        return self.head(hidden_states, labels)


class LogitsModel(PackedGPT):
    """Ends in the logits, gathered over tensor-parallel ranks: to compare models, not to train one."""

    def __init__(self, *args, live_vocab: int, **kwargs) -> None:
        """Take what PolicyModel takes."""
        super().__init__(*args, **kwargs)
        self.live_vocab = live_vocab

    def head(self, hidden: Tensor, scored: Scored) -> Tensor:
        """[R, V]"""
        weight = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        logits, _ = self.output_layer(hidden, weight=weight, runtime_gather_output=True)
        return logits.squeeze(1).index_select(0, scored.rows)[:, : self.live_vocab]


class PolicyModel(PackedGPT):
    """Ends in the vocab-parallel head: log-probs and entropies, or the loss on them."""

    def __init__(self, *args, live_vocab: int, **kwargs) -> None:
        """`live_vocab`: tokens without padding; the rest are GPTModel's arguments."""
        super().__init__(*args, **kwargs)
        if self.post_process:
            LogProbHead.adopt(self.output_layer, live_vocab)

    def head(self, hidden: Tensor, scored: Scored) -> HeadOutput | Tensor:
        """Log-prob and entropy [R], or the scalar of `scored.loss`."""
        weight = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        return self.output_layer(hidden, weight=weight, scored=scored)
