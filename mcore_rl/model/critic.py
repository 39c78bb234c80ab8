"""The critic: the policy's backbone with a value head where the output layer was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor, nn

from mcore_rl.model.hf.architecture import Architecture
from mcore_rl.model.hf.parameters import ParameterMap, Rule
from mcore_rl.model.policy import PackedGPT, Scored

VALUE_HEAD = Rule("value_head.weight", ("score.weight",), ("one hidden",))
"""[1, H]; the HF name is that of transformers' sequence classifiers."""


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


class CriticParameterMap(ParameterMap):
    """The policy's table with the value head in place of the output layer."""

    def __init__(self, arch: Architecture, vocab_rows: int) -> None:
        """Take what ParameterMap takes."""
        super().__init__(arch, vocab_rows)
        del self._rules["output_layer.weight"]
        self._rules[VALUE_HEAD.megatron] = VALUE_HEAD


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
