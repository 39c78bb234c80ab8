"""How the packed tokens of a micro-batch lie, and how the portable attention pads their sequences.

Legend: T packed tokens of this rank, B sequences, L longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from mcore_rl.parallel.context import gathered_places


@dataclass(kw_only=True)
class PackedLayout(PackedSeqParams):
    """How the packed tokens of one micro-batch lie.

    `qkv_format` is "sbhd" on purpose: rotary embeddings are indexed by `position_ids` (one gather) instead of
    Megatron's loop over sequences, and both attentions read the boundaries themselves. What only the portable
    one reads is made when its first layer asks, on the device, and goes with the micro-batch.
    """

    position_ids: Tensor
    """[T] position of every local token in its own sequence"""
    padding: Padding
    """of the local tokens"""
    boundaries: Tensor
    """[B+1] int32 boundaries of the whole sequences, all context-parallel shares together"""
    shares_prompts: bool = False
    """some sequences are here without their prompt, which is that of another one"""
    keys: KeyLayout | None = None
    """set under context parallelism, where keys come from all ranks of the group"""
    masks: dict[tuple[int | None, torch.dtype | None], Tensor] = field(default_factory=dict)
    """what `visible` and `mask` have answered: layers ask for the same"""
    experts: Tensor | None = None
    """[T, or T / TP under sequence parallelism, layers, K] that tokens are sent to; see model.routing"""
    live: Tensor | None = None
    """[T, or T / TP under sequence parallelism] bool: False for padding; None where there is none"""
    angles: Tensor | None = None
    """[T, 1, 1, channels] that latent attention turns by; every layer sets it for itself"""

    @classmethod
    def of(
        cls,
        position_ids: Tensor,
        boundaries: Tensor,
        longest: int,
        *,
        context: int = 1,
        experts: Tensor | None = None,
        begins: Tensor | None = None,
        parts: Parts | None = None,
    ) -> PackedLayout:
        """From the local tokens' positions [T]; no tensor is read here, so that a GPU need not be waited for.

        Args:
            boundaries: [B+1] of the whole sequences.
            longest: tokens of the longest of them.
            context: ranks that hold a share of each.
            begins: as PackedBatch has it; without context parallelism.
            parts: which sequences are padded together (`of_like_lengths`); without context parallelism.
        """
        tokens = len(position_ids)
        prompts = None if begins is None else SharedPrompts(begins, position_ids[boundaries[:-1].long()])
        whole = Padding(boundaries, longest, tokens * context, prompts, parts)
        local = whole if context == 1 else Padding(boundaries // context, longest // context, tokens)
        return cls(
            qkv_format="sbhd",
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            position_ids=position_ids,
            padding=local,
            boundaries=boundaries,
            shares_prompts=begins is not None,
            keys=None if context == 1 else KeyLayout(whole, local, position_ids, context),
            experts=experts,
        )

    def visible(self, window: int | None) -> Tensor:
        """[B or 1, 1, L, L_whole] True where a query sees the key: it, and the `window` - 1 before it."""
        key = (window, None)
        if key not in self.masks:
            self.masks[key] = self._visible(window)
        return self.masks[key]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """The same as 0 where the query sees the key, else -inf.

        It is what torch makes of a mask of bools in every layer anew, to keep it until the backward pass.
        """
        key = (window, dtype)
        if key not in self.masks:
            seen = self._visible(window)
            self.masks[key] = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
                ~seen, -torch.inf
            )
        return self.masks[key]

    def _visible(self, window: int | None) -> Tensor:
        device = self.position_ids.device
        if self.keys is None:
            queries, longest = torch.arange(self.padding.longest, device=device)[None], self.padding.longest
        else:
            queries, longest = self.keys.positions, self.keys.whole.longest
        position, column = queries[:, None, :, None], torch.arange(longest, device=device)
        seen = column <= position
        return seen if window is None else seen & (column > position - window)


SHORTER, SHORTER_TOKENS = 0.25, 32
"""a sequence is padded together with others as long as it is shorter by such a share, or by so many tokens"""

Parts = Sequence[tuple[Tensor | slice, int]]
"""some sequences, and the tokens of the longest of them"""


def of_like_lengths(boundaries: Tensor, positions: Tensor) -> Parts | None:
    """Which sequences of a micro-batch are best padded together; None for all of them.

    Padded to the longest of a micro-batch, all would cost a multiple where that one is alone.

    Args:
        boundaries: [B+1] and positions: [T], as PackedBatch has them, on the host.
    """
    lengths = boundaries.diff().long() + positions[boundaries[:-1].long()]
    descending, order = lengths.sort(descending=True, stable=True)
    parts: list[tuple[Tensor | slice, int]] = []
    begin, each = 0, descending.tolist()
    for end in range(1, len(each) + 1):
        if end == len(each) or each[begin] - each[end] > max(each[begin] * SHORTER, SHORTER_TOKENS):
            parts.append((order[begin:end], each[begin]))
            begin = end
    return parts if len(parts) > 1 else None


@dataclass(frozen=True)
class SharedPrompts:
    """Which tokens come before those that a sequence has here."""

    begins: Tensor
    """[B] the first token of its prompt; its own first one, if it has its prompt here"""
    before: Tensor
    """[B] how many tokens of the prompt lie there; 0, if it has its own"""


@dataclass(frozen=True)
class Places:
    """Where padded sequences take their tokens from, part by part."""

    index: Tensor
    """[sum of B * L]; the number of tokens, one past the end, reads zeros"""
    shapes: list[tuple[int, int]]
    """(B, L) of every part"""

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Places:
        """From the index [B, L] of every part."""
        return cls(torch.cat([part.flatten() for part in parts]), [(len(p), p.shape[1]) for p in parts])

    def padded(self, x: Tensor) -> list[Tensor]:
        """[T, heads, D] -> [B, L, heads, D] of every part."""
        rows = F.pad(x, (0, 0, 0, 0, 0, 1)).index_select(0, self.index)
        parts = rows.split([count * longest for count, longest in self.shapes])
        return [part.view(*shape, *x.shape[1:]) for part, shape in zip(parts, self.shapes, strict=True)]


@dataclass
class Padding:
    """From packed tokens to [B, L] and back.

    A sequence whose prompt lies with another one has its own tokens behind as much room as that prompt takes:
    its queries are asked for its own tokens, and its keys are those of all. So attention is what it is
    without sharing, while every other part of a layer sees a prompt once.
    """

    boundaries: Tensor
    """[B+1]"""
    longest: int
    """L"""
    tokens: int
    """T"""
    prompts: SharedPrompts | None = None
    parts: Parts | None = None
    """which sequences are padded together; None: all"""

    def _parts(self) -> Parts:
        return self.parts or [(slice(None), self.longest)]

    @cached_property
    def queries(self) -> Places:
        """The tokens of every part, padded."""
        return Places.of([self._own(which, longest) for which, longest in self._parts()])

    @cached_property
    def keys(self) -> Places:
        """The same, with the tokens of shared prompts."""
        if self.prompts is None:
            return self.queries
        return Places.of([self._seen(self.prompts, which, longest) for which, longest in self._parts()])

    @cached_property
    def to_padded(self) -> Tensor:
        """[B, L] index into the tokens, all in one part; T (one past the end) where a sequence has none."""
        return self._own(slice(None), self.longest)

    def _own(self, which: Tensor | slice, longest: int) -> Tensor:
        """[b, longest] index into the tokens of some sequences; T where one has none of its own."""
        starts, ends = (bounds[which, None].long() for bounds in (self.boundaries[:-1], self.boundaries[1:]))
        index = starts + torch.arange(longest, device=starts.device)
        if self.prompts is not None:
            index = index - self.prompts.before[which, None]
        return torch.where((index >= starts) & (index < ends), index, self.tokens)

    def _seen(self, prompts: SharedPrompts, which: Tensor | slice, longest: int) -> Tensor:
        """[b, longest] the same, and before its own tokens those of its prompt."""
        column = torch.arange(longest, device=self.boundaries.device)
        shared = column < prompts.before[which, None]
        return torch.where(shared, prompts.begins[which, None] + column, self._own(which, longest))

    @cached_property
    def from_padded(self) -> Tensor:
        """[T] index into the flattened [B * L] of all parts, one after another."""
        boundaries = self.boundaries.long()
        starts, end = torch.empty_like(boundaries[:-1]), 0
        for which, longest in self._parts():
            count = len(starts[which])
            starts[which] = end + longest * torch.arange(count, device=starts.device)
            end += count * longest
        token = torch.arange(self.tokens, device=boundaries.device)
        sequence = torch.bucketize(token, boundaries[1:], right=True)
        place = token - boundaries[sequence]
        if self.prompts is not None:
            place = place + self.prompts.before[sequence]
        return starts[sequence] + place


@dataclass
class KeyLayout:
    """Where the keys and values of whole sequences lie after the context-parallel all-gather."""

    whole: Padding
    local: Padding
    position_ids: Tensor
    """[T] of this rank's tokens"""
    size: int
    """ranks of the group"""

    @cached_property
    def to_padded(self) -> Tensor:
        """[B, L_whole] index into the gathered tokens, in sequence order; their number where padded."""
        place = gathered_places(self.whole.boundaries, self.size, self.whole.tokens)
        return F.pad(place, (0, 1), value=self.whole.tokens)[self.whole.to_padded]

    @cached_property
    def positions(self) -> Tensor:
        """[B, L_local] position of each query in its whole sequence; of padding the last one."""
        return F.pad(self.position_ids, (0, 1), value=self.whole.longest - 1)[self.local.to_padded]
