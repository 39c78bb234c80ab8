"""Which cached tokens the layers of a model see: all, or a window of the last ones.

transformers builds its masks from a cache of its own, which forgets what no window shows. The embedded
server's holds whole sequences for every layer, so that rows can be moved and copied alike, and hides by mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

SLIDING, FULL = "sliding_attention", "full_attention"


def layer_windows(model: PreTrainedModel) -> list[int | None]:
    """Per layer, how many tokens a query sees, itself among them; None where it sees all before it."""
    config = model.config.get_text_config()
    layers, size = config.num_hidden_layers, getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:  # such a model has its window in every layer
        return [size] * layers
    return [size if kind == SLIDING else None for kind in kinds]


class Masks:
    """The form in which a model asks for its masks."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self.windows = layer_windows(model)
        self.by_kind = bool(getattr(config, "layer_types", None)) and any(self.windows)
        """the model picks one for each layer, by the layer's kind"""
        self.added = model.config._attn_implementation == "eager"
        """masks are added to the scores, instead of saying what is seen"""

    def of(self, seen: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """What the model's forward takes as attention_mask.

        seen [..., Q, K] is True where the key of that position is there and not behind the query; positions
        [..., Q] are those of the queries.
        """
        size = next(filter(None, self.windows), None)
        near = seen if size is None else seen & within(size, positions, seen.shape[-1])
        if not self.by_kind:
            return self._formed(near)
        return {FULL: self._formed(seen), SLIDING: self._formed(near)}

    def _formed(self, seen: Tensor) -> Tensor:
        if not self.added:
            return seen
        return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)


def within(size: int, positions: Tensor, width: int) -> Tensor:
    """[..., Q, width] True where a key lies in the window of `size` tokens of the queries at `positions`."""
    return torch.arange(width, device=positions.device) > positions[..., None] - size
