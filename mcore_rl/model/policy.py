"""The models: Megatron's GPTModel, packed, and what its last stage answers with instead of logits.

The policy answers with log-probs and entropies, the critic, whose backbone is the policy's, with values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor, nn

from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.architecture import Architecture
from mcore_rl.model.hf.parameters import VALUE_HEAD
from mcore_rl.model.rotary import rotary_table
from mcore_rl.parallel.head import Call, HeadOutput, RowLoss, head_loss, log_prob_entropy
from mcore_rl.parallel.head.divergence import Against, DivergenceLoss, divergence_loss, divergences


@dataclass(frozen=True)
class Scored:
    """What the head scores: `targets[r]` from the hidden state of local packed token `rows[r]`."""

    rows: Tensor
    """[R] int64 into the local tokens"""
    targets: Tensor
    """[R] int64"""
    temperature: float
    """temperature of the sampling policy"""
    loss: RowLoss | DivergenceLoss | None = None
    """a policy answers with `parallel.head.head_loss` of it instead of log-probs; a critic ignores it"""
    against: Against | None = None
    """a student is scored by its divergences from this teacher instead of log-probs, the loss by them too"""
    states: bool = False
    """a policy answers with its last hidden states [T_local, H] themselves: a teacher does"""


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
        self, hidden: Tensor, weight: Tensor | None = None, *, scored: Scored, cap: float | None
    ) -> HeadOutput | Tensor:
        """hidden [T or T/tp, 1, H] -> log-prob and entropy or divergence [R], or a scalar: parallel.head.

        `cap`: the model's bound of its logits, None where it has none.
        """
        states, weight = hidden.squeeze(1), cast(Tensor, self.weight) if weight is None else weight
        call = Call.of(
            weight,
            scored.targets,
            scored.temperature,
            rows=scored.rows,
            group=cast(dist.ProcessGroup, self.tp_group),
            vocab_size=self.vocab_size,
            sequence_parallel=self.sequence_parallel,
            cap=cap,
        )
        if scored.against is not None:
            return _compared(states, weight, call, scored.against, scored.loss)
        if scored.loss is None:
            return log_prob_entropy(states, weight, call)
        return head_loss(states, weight, call, cast(RowLoss, scored.loss))


def _compared(
    states: Tensor, weight: Tensor, call: Call, against: Against, loss: RowLoss | DivergenceLoss | None
) -> Tensor:
    """Divergences [R], or the scalar of the loss by them; see parallel.head.divergence."""
    teacher, divergence = against
    if loss is None:
        return divergences(states, weight, teacher, call, divergence)
    return divergence_loss(states, weight, teacher, call, divergence, cast(DivergenceLoss, loss))


class PackedGPT(GPTModel):
    """GPTModel with rotary positions of packed sequences; a subclass says what its last stage answers with.

    `arch` is set when it has been built. `labels` carries the `Scored` rows to the last stage: Megatron
    passes that argument through untouched.
    """

    arch: Architecture
    longest: int | None
    """tokens of a sequence up to which this is what the model computes; None for any length"""
    adapted: bool = False
    """its own weights are frozen, and adapters beside them are trained"""
    local_frequencies: Tensor | None = None
    """[channels / 2] of the rotary embedding of layers with a window, where it is one of their own"""

    def head(self, hidden: Tensor, scored: Scored) -> HeadOutput | Tensor:
        """hidden [T or T/tp, 1, H] of the last stage -> what the scored rows get, [R] each."""
        raise NotImplementedError

    def _preprocess(self, input_ids, position_ids, *args, packed_seq_params: Any = None, **kwargs) -> Any:
        prepared = super()._preprocess(
            input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs
        )
        hidden, scales = prepared[0], self.arch.scales
        if hidden is not None and scales.embedding != 1.0:
            constant = scales.embedding
            hidden = hidden * (
                torch.tensor(constant, dtype=hidden.dtype).item() if scales.rounded else constant
            )
        if hidden is not None and self.adapted and torch.is_grad_enabled():
            # What Megatron computes again, a layer or a part of one, asks its input whether a gradient is
            # wanted; before the first adapter it says no, and adapters in there would learn nothing.
            hidden = hidden.detach().requires_grad_(self.config.recompute_granularity is not None)
        self._check_length(packed_seq_params)
        positions = packed_seq_params.position_ids
        table = self.rotary_pos_emb(packed_seq_params.max_seqlen_q, packed_seq=True).index_select(
            0, positions
        )
        if self.local_frequencies is not None:
            table = torch.stack([table, rotary_table(positions, self.local_frequencies)])
        return hidden, table, *prepared[2:]

    def _check_length(self, layout: Any) -> None:
        """Raises ConfigError for positions at which the model computes something else than is built here."""
        longest = self.longest
        if longest is not None and int(layout.position_ids.max()) >= longest:
            raise ConfigError(
                f"a sequence of more than {longest} tokens: beyond its original length, the model's rotary "
                "embedding depends on the length of the sequence, which servers and training see "
                "differently; lower rollout.max_new_tokens or data.max_prompt_tokens"
            )

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
        logits = logits.squeeze(1).index_select(0, scored.rows)[:, : self.live_vocab]
        logits = logits / self.arch.scales.logits
        cap = self.arch.scales.logits_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)


class PolicyModel(PackedGPT):
    """Ends in the vocab-parallel head: log-probs and entropies, or the loss on them."""

    def __init__(self, *args, live_vocab: int, **kwargs) -> None:
        """`live_vocab`: tokens without padding; the rest are GPTModel's arguments."""
        super().__init__(*args, **kwargs)
        if self.post_process:
            LogProbHead.adopt(self.output_layer, live_vocab)

    def head(self, hidden: Tensor, scored: Scored) -> HeadOutput | Tensor:
        """Log-prob and entropy or divergence [R], the scalar of `scored.loss`, or the hidden states."""
        if scored.states:
            return hidden.squeeze(1)
        weight = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        divisor = self.arch.scales.logits
        if divisor != 1.0:  # a constant divisor of the logits is a temperature
            scored = replace(scored, temperature=scored.temperature * divisor)
        if scored.against is not None and scored.against.teacher.divisor != divisor:
            teacher = scored.against.teacher
            states = teacher.hidden * (divisor / teacher.divisor)  # both are divided by the student's
            scored = replace(scored, against=scored.against._replace(teacher=teacher._replace(hidden=states)))
        cap = self.arch.scales.logits_cap
        return self.output_layer(hidden, weight=weight, scored=scored, cap=cap)

    @property
    def lm_head(self) -> Tensor:
        """[V_local, H] the weight of the last stage's output layer."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return cast(Tensor, self.output_layer.weight)


class ValueHead(nn.Module):
    """Hidden state -> value: one linear output without bias, at least float32 whatever the model's precision.

    Every tensor-parallel rank holds all of it and sees whole hidden states, so its gradient, and the one it
    sends back, are complete on each of them: nothing to reduce, and no mark that tells Megatron to.
    """

    def __init__(self, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        dtype = torch.promote_types(config.params_dtype, torch.float32)
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, dtype=dtype))
        self.sequence_parallel, self.tp_group = config.sequence_parallel, tp_group

    def forward(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """hidden [T or T/tp, 1, H] -> values [R] of the hidden states `rows`."""
        if self.sequence_parallel:
            # All ranks compute the same loss from the gathered states, so the backward pass takes a rank's
            # own part of the gradient. The default sums the copies: tp times the gradient.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        picked = hidden.squeeze(1).index_select(0, rows)
        return torch.mv(picked.to(self.weight.dtype), self.weight.squeeze(0))


class CriticModel(PackedGPT):
    """Ends in values: V(state before token t) for every scored token t."""

    def __init__(self, *args, **kwargs) -> None:
        """GPTModel's arguments, embeddings untied; the output layer that it always builds is freed again."""
        super().__init__(*args, **kwargs)
        if self.post_process:
            del self.output_layer
            self.value_head = ValueHead(self.config, self.pg_collection.tp)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> Any:
        """Describe the shards as any module of Megatron does; GPTModel's own way asks for an output layer."""
        known = ensure_metadata_has_dp_cp_group(metadata)
        return super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, known)

    def head(self, hidden: Tensor, scored: Scored) -> Tensor:
        """Values [R], from the hidden states that the policy scores the same tokens from."""
        return self.value_head(hidden, scored.rows)


def with_value_head(
    read: Callable[[str], Tensor], arch: Architecture, random_seed: int | None
) -> Callable[[str], Tensor]:
    """`read` of the policy's HF tensors, and of a value head: zero, or random by seed as the rest then is."""

    def read_critic(name: str) -> Tensor:
        if name not in VALUE_HEAD.hf:
            return read(name)
        if random_seed is None:
            return torch.zeros(1, arch.hidden)
        generator = torch.Generator().manual_seed(random_seed)
        return torch.randn(1, arch.hidden, generator=generator) * arch.init_std

    return read_critic
