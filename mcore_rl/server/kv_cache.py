"""A KV cache of fixed size whose running rows are always its first rows.

Storage per layer is `capacity` tokens, seen as [rows, heads, length, head dim]; the length follows the
longest sequence, so many short or few long ones fit. With compact rows a decode step reads a plain view.
"""

from __future__ import annotations

import psutil
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from mcore_rl.errors import ConfigError

_KINDS = (DynamicLayer, DynamicSlidingWindowLayer)
"""layers that cache nothing but the keys and values of tokens"""
_LENGTH_STEP = 32
"""Lengths are rounded up to this, so that small changes of the longest sequence move nothing."""


class _SlotLayer(CacheLayerMixin):
    """One layer: writes where `SlotCache` says the forward stands, and returns what attention reads."""

    is_compileable = False
    is_sliding = False

    def __init__(self, storage: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.storage = storage
        """Flat [capacity, heads, head dim] keys and values."""
        self.shape_as(0, 0)
        self.is_initialized = True
        self.rows = slice(0, 0)
        self.positions: Tensor | None = None
        self.width = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a slot layer is allocated by SlotCache")

    def shape_as(self, rows: int, length: int) -> None:
        """Sees the storage as [rows, heads, length, head dim]."""
        self.key_rows, self.value_rows = (
            flat[: rows * length].view(rows, flat.shape[1], length, flat.shape[2]) for flat in self.storage
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """key_states, value_states: [n, heads, length, head dim] of the rows that `SlotCache.at_*` named."""
        if self.positions is None:
            self.key_rows[self.rows, :, : self.width] = key_states
            self.value_rows[self.rows, :, : self.width] = value_states
            return key_states, value_states
        index = torch.arange(self.rows.start, self.rows.stop, device=self.positions.device)[:, None]
        self.key_rows[index, :, self.positions] = key_states.transpose(1, 2)
        self.value_rows[index, :, self.positions] = value_states.transpose(1, 2)
        return self.key_rows[self.rows, :, : self.width], self.value_rows[self.rows, :, : self.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.key_rows.shape[2]


class SlotCache(Cache):
    """`transformers` cache over fixed storage: say where the forward stands, run it, then copy rows."""

    def __init__(self, storage: list[tuple[Tensor, Tensor]]) -> None:
        self.slots = [_SlotLayer(pair) for pair in storage]
        super().__init__(layers=list(self.slots))
        self.capacity = storage[0][0].shape[0]
        """tokens"""
        self.length = 0

    @property
    def max_length(self) -> int:
        """The longest sequence that fits, in tokens."""
        return self.capacity // _LENGTH_STEP * _LENGTH_STEP

    def rows_for(self, length: int) -> int:
        """How many rows fit when the longest sequence has `length` tokens."""
        return self.capacity // (-(-length // _LENGTH_STEP) * _LENGTH_STEP)

    def reserve(self, rows: int, length: int, live: int) -> None:
        """Makes room for `rows` rows of `length` tokens; the first `live` rows keep their content.

        The caller has checked `rows <= rows_for(length)`.
        """
        rounded = -(-length // _LENGTH_STEP) * _LENGTH_STEP
        if rounded <= self.length and rows <= self.capacity // self.length:
            return
        for layer in self.slots:
            old = (layer.key_rows[:live].clone(), layer.value_rows[:live].clone()) if live else None
            layer.shape_as(self.capacity // rounded, rounded)
            if old is not None:
                width = min(self.length, rounded)
                layer.key_rows[:live, :, :width] = old[0][:, :, :width]
                layer.value_rows[:live, :, :width] = old[1][:, :, :width]
        self.length = rounded

    def at_prefill(self, rows: slice, width: int) -> None:
        """The next forward holds positions [0, width) of `rows`."""
        for layer in self.slots:
            layer.rows, layer.positions, layer.width = rows, None, width

    def at_decode(self, positions: Int[Tensor, " R"], width: int) -> None:
        """The next forward holds a token of each of the first R rows, at `positions`, and sees [0, width)."""
        self.at_extend(slice(0, len(positions)), positions[:, None], width)

    def at_extend(self, rows: slice, positions: Int[Tensor, "n w"], width: int) -> None:
        """The next forward holds w tokens of each of `rows`, at `positions`, and sees [0, width)."""
        for layer in self.slots:
            layer.rows, layer.positions, layer.width = rows, positions, width

    def row(self, row: int, width: int) -> list[tuple[Tensor, Tensor]]:
        """A copy of positions [0, width) of a row: keys and values of every layer."""
        return [
            (layer.key_rows[row, :, :width].clone(), layer.value_rows[row, :, :width].clone())
            for layer in self.slots
        ]

    def fill(self, row: int, layers: list[tuple[Tensor, Tensor]], width: int) -> None:
        """Write the first `width` positions of what `row` gave into a row."""
        for layer, (keys, values) in zip(self.slots, layers, strict=True):
            layer.key_rows[row, :, :width] = keys[:, :width]
            layer.value_rows[row, :, :width] = values[:, :width]

    def copy_rows(self, source: Int[Tensor, " n"], target: Int[Tensor, " n"], width: int) -> None:
        """Positions [0, width) of the `source` rows are copied to the `target` rows."""
        for layer in self.slots:
            layer.key_rows[target, :, :width] = layer.key_rows[source, :, :width]
            layer.value_rows[target, :, :width] = layer.value_rows[source, :, :width]


@torch.inference_mode()
def build_cache(model: PreTrainedModel, tokens: int | None) -> SlotCache:
    """A cache for `model` on its device, holding `tokens` tokens (None: what fits in 1 GiB, at most 262144).

    Prefixes of sessions may take as much again (`prefixes.py`), which must fit too.

    Layer shapes come from a forward over one token, so any decoder works whose layers cache keys and values
    of their own; layers with a sliding window keep all tokens, and see the last ones (server.windows).
    Raises ConfigError for linear-attention or other special caches.
    """
    device = model.device
    cache = model(
        input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=True
    ).past_key_values
    special = {type(layer).__name__ for layer in cache.layers if type(layer) not in _KINDS}
    if special:
        raise ConfigError(
            f"{model.config.model_type}: the embedded server caches keys and values only, this model has "
            f"{sorted(special)}; serve it with SGLang"
        )
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    token_bytes = sum(t.numel() * t.element_size() for pair in pairs for t in pair)
    capacity = min(1 << 18, (1 << 30) // token_bytes) if tokens is None else tokens
    room = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else psutil.virtual_memory().total
    if 2 * capacity * token_bytes > room:
        raise ConfigError(
            f"kv_tokens={capacity}: {capacity * token_bytes} bytes, and as many for prefixes of sessions; "
            f"{device} has {room}; lower it"
        )
    # Zeroed, not empty: masked positions still meet the softmax weight 0, and 0 x NaN would be NaN.
    return SlotCache([tuple(t.new_zeros(capacity, t.shape[1], t.shape[3]) for t in pair) for pair in pairs])  # type: ignore[misc]
