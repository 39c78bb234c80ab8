"""One decode step of a dense decoder in plain torch: what transformers computes, without its modules.

Few rows of a small model are hundreds of short calls, and most of a step's time lies between them: modules
within modules, wrappers of forward, configs that are asked for every layer. This form has the calls alone.
Prefill stays with transformers, and so does every model that is not in FAMILIES.

Legend: R running rows, H hidden, N query heads, K key/value heads, D channels per head, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mcore_rl.server.kv_cache import SlotCache
from mcore_rl.server.windows import layer_windows, within

FAMILIES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
"""classes of transformers that compute what `Decoder` does"""

ONEDNN_NUMBERS = 1 << 18
"""of a weight, from which on its product pays for what a call of oneDNN costs, some ten microseconds"""


class _Norm(NamedTuple):
    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        # F.rms_norm is seven calls on a CPU, of which one reads x twice.
        if x.dtype != torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        squares = torch.linalg.vecdot(x, x)[..., None]
        return (x * torch.rsqrt_(squares.div_(x.shape[-1]).add_(self.eps))).mul_(self.weight)


class _Linear(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    by_onednn: bool
    """multiply by oneDNN, which for the few rows of a decode step takes a tenth to a quarter less time than
    the library behind `F.linear`, of weights as they lie"""

    @classmethod
    def of(cls, module: Any) -> _Linear:
        weight: Tensor = module.weight
        large = weight.numel() >= ONEDNN_NUMBERS
        host = weight.device.type == "cpu" and weight.dtype == torch.float32
        return cls(weight, module.bias, large and host and torch.backends.mkldnn.is_available())

    def __call__(self, x: Tensor) -> Tensor:
        if self.by_onednn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


class _Layer(NamedTuple):
    """The parameters of a layer themselves: a weight update writes into them."""

    attention_norm: _Norm
    query: _Linear
    key: _Linear
    value: _Linear
    query_norm: _Norm | None
    key_norm: _Norm | None
    output: _Linear
    scale: float
    mlp_norm: _Norm
    gate: _Linear
    up: _Linear
    down: _Linear

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            attention_norm=_norm(layer.input_layernorm),
            query=_Linear.of(attention.q_proj),
            key=_Linear.of(attention.k_proj),
            value=_Linear.of(attention.v_proj),
            query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
            key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
            output=_Linear.of(attention.o_proj),
            scale=attention.scaling,
            mlp_norm=_norm(layer.post_attention_layernorm),
            gate=_Linear.of(mlp.gate_proj),
            up=_Linear.of(mlp.up_proj),
            down=_Linear.of(mlp.down_proj),
        )


class Decoder:
    """The model's own parameters, called in order."""

    def __init__(self, model: PreTrainedModel) -> None:
        inner: Any = model.model
        self.embedding: Tensor = inner.embed_tokens.weight
        self.rotary = inner.rotary_emb
        self.layers = [_Layer.of(layer) for layer in inner.layers]
        self.norm = _norm(inner.norm)
        self.head = _Linear.of(model.lm_head)
        self.head_dim: int = inner.layers[0].self_attn.head_dim
        self.windows = layer_windows(model)

    def __call__(self, tokens: Tensor, positions: Tensor, seen: Tensor, cache: SlotCache) -> Tensor:
        """tokens [R] at positions [R] that see `seen` [R, width] of the cache rows -> logits [R, V]."""
        hidden = F.embedding(tokens, self.embedding)
        cos, sin = self.rotary(hidden[:, None], positions[:, None])
        masks: dict[int | None, Tensor] = {None: _added(seen, hidden.dtype)}
        for size in filter(None, set(self.windows)):
            near = within(size, positions[:, None], seen.shape[-1])[:, 0]
            masks[size] = _added(seen & near, hidden.dtype)
        for layer, window, slot in zip(self.layers, self.windows, cache.slots, strict=True):
            x = layer.attention_norm(hidden)
            query, key, value = (self._heads(project(x)) for project in (layer.query, layer.key, layer.value))
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = layer.query_norm(query), layer.key_norm(key)
            query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
            keys, values = slot.update(key[:, :, None], value[:, :, None])
            # The query heads of a key/value head are rows of one product: no key is repeated.
            grouped = query.view(len(tokens), key.shape[1], -1, self.head_dim)
            out = _attend(grouped, keys, values, masks[window], layer.scale)
            hidden = hidden + layer.output(out.reshape(len(tokens), -1))
            x = layer.mlp_norm(hidden)
            hidden = hidden + layer.down(F.silu(layer.gate(x)) * layer.up(x))
        return self.head(self.norm(hidden))

    def _heads(self, x: Tensor) -> Tensor:
        """[R, heads * D] -> [R, heads, D]"""
        return x.view(len(x), -1, self.head_dim)


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, width] -> [R, 1, 1, width], 0 where a key is seen and -inf elsewhere."""
    added = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return added.masked_fill_(~seen, -torch.inf)[:, None, None]


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query [R, K, N / K, D] of one token a row, keys and values [R, K, width, D] -> [R, K, N / K, D]."""
    if query.device.type != "cpu" or query.dtype != torch.float32:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    # Two products and a softmax: torch's kernel is made for many queries a key.
    rows = (query * scale).flatten(0, 1)
    scores = torch.bmm(rows, keys.flatten(0, 1).transpose(1, 2)).view(*query.shape[:3], -1).add_(mask)
    return torch.bmm(scores.softmax(-1).flatten(0, 1), values.flatten(0, 1)).view_as(query)


def build_decoder(model: PreTrainedModel) -> Decoder | None:
    """For a model of FAMILIES; None for any other, which decodes by its own forward."""
    activation = getattr(model.config.get_text_config(), "hidden_act", None)
    return Decoder(model) if type(model).__name__ in FAMILIES and activation == "silu" else None


def _norm(module: Any) -> _Norm:
    return _Norm(module.weight, module.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [R, heads, D] by cos and sin [R, 1, D], halves against each other as transformers has them."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
