"""Vectorised next-token sampling over the running rows. Pure functions of tensors.

Legend: R running rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

GREEDY_TEMPERATURE = 1e-6
"""Temperatures below this are greedy, as in SGLang."""
_MAX_ELEMENTS = 1 << 24
"""Rows are sampled in chunks of at most this many logits, so that float64 sums of a large vocabulary fit."""


_BLOCK = 256
"""tokens whose probabilities are summed together"""
_CACHED = 1 << 17
"""probabilities whose copy in float64, 1 MiB, is there at once on a CPU"""


class Knobs(NamedTuple):
    """Sampling parameters of every row; see `Rows` for their origin."""

    temperature: Float[Tensor, " R"]
    top_p: Float[Tensor, " R"]
    min_p: Float[Tensor, " R"]
    top_k: Int[Tensor, " R"]
    """0: no limit"""
    uniform: Float[Tensor, " R"]
    """in (0, 1)"""


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as the unsigned `value`."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_xor(x: Int[Tensor, " R"], bits: int) -> Int[Tensor, " R"]:
    """x ^ (x >>> bits): torch shifts int64 arithmetically, so the copied sign bits are masked off."""
    return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))


def _mix(x: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
    return _shift_xor(_shift_xor(_shift_xor(x, 30) * _MIX_1, 27) * _MIX_2, 31)


def counter_uniform(seed: Int[Tensor, " R"], counter: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
    """float64 in (0, 1), a pure function of (seed, counter): no row depends on its neighbours in the batch.

    SplitMix64 (Steele, Lea and Flood 2014, figure 17) over a mixed seed, so that neighbouring seeds are
    unrelated. int64 arithmetic wraps in torch, as the generator needs.
    """
    bits = _mix(_mix(seed) + (counter + 1) * _GOLDEN)
    # 52 bits and a half: 53 bits would let the largest value round to 1.0.
    return (((bits >> 12) & ((1 << 52) - 1)).double() + 0.5) * 2.0**-52


def _kept(probs: Float[Tensor, "R V"], knobs: Knobs) -> Bool[Tensor, "R V"]:
    """Which tokens survive top-k, top-p and min-p (SGLang `top_k_top_p_min_p_sampling_from_probs_torch`)."""
    ordered, index = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    rank = torch.arange(probs.shape[-1], device=probs.device)
    # A row without top-p keeps everything: a float32 sum, as on GPUs, may overshoot 1 before the last token.
    keep = (before <= knobs.top_p[:, None]) | (knobs.top_p >= 1)[:, None]
    keep &= (rank < knobs.top_k[:, None]) | (knobs.top_k == 0)[:, None]
    keep &= ordered >= ordered[:, :1] * knobs.min_p[:, None]
    return torch.zeros_like(keep).scatter(1, index, keep)


def draw(probs: Float[Tensor, "R V"], uniform: Float[Tensor, " R"]) -> Int[Tensor, " R"]:
    """The first token of each row at which the sum of `probs` exceeds `uniform` of the row's sum, in float64.

    The sums are those of blocks, and of the tokens of the one block that the row draws from: a running sum of
    the whole vocabulary costs ten times that. A token without probability is never drawn.
    """
    missing = -probs.shape[-1] % _BLOCK
    padded = torch.nn.functional.pad(probs, (0, missing)) if missing else probs
    blocks = padded.unflatten(-1, (-1, _BLOCK))
    # torch sums a copy in float64: of a few rows it stays in the processor's cache.
    rows = max(1, _CACHED // probs.shape[-1]) if probs.device.type == "cpu" else max(1, len(probs))
    sums = torch.cat([some.sum(-1, dtype=torch.float64) for some in blocks.split(rows)]).cumsum(-1)
    target = (uniform * sums[:, -1])[:, None]
    block = torch.searchsorted(sums, target, right=True).clamp(max=sums.shape[-1] - 1)
    before = torch.where(block > 0, sums.gather(-1, (block - 1).clamp(min=0)), 0.0)
    within = blocks[torch.arange(len(probs), device=probs.device), block[:, 0]].cumsum(
        -1, dtype=torch.float64
    )
    # The two sums of a block may differ in the last bit: the target stays below what its tokens sum up to.
    wanted = torch.minimum(target - before, torch.nextafter(within[:, -1:], within.new_tensor(-torch.inf)))
    drawn = block * _BLOCK + torch.searchsorted(within, wanted, right=True)
    return drawn[:, 0].clamp(max=probs.shape[-1] - 1)  # of a row that is not finite, which the engine refuses


def _sample(logits: Float[Tensor, "R V"], knobs: Knobs) -> tuple[Int[Tensor, " R"], Float[Tensor, "R V"]]:
    greedy = (knobs.temperature < GREEDY_TEMPERATURE) | (knobs.top_k == 1)
    temperature = knobs.temperature.masked_fill(greedy, 1.0)
    plain = bool((temperature == 1).all())  # a division by 1 changes nothing but the place
    log_probs = (logits if plain else logits / temperature[:, None]).log_softmax(-1)
    probs = log_probs.exp()
    if bool(((knobs.top_p < 1) | (knobs.min_p > 0) | (knobs.top_k > 1)).any()):
        probs = probs * _kept(probs, knobs)
    # Inverse CDF in vocabulary order: a row draws the same token with and without truncating neighbours.
    drawn = draw(probs, knobs.uniform)
    return torch.where(greedy, logits.argmax(-1), drawn) if bool(greedy.any()) else drawn, log_probs


def sample(
    logits: Float[Tensor, "R V"], knobs: Knobs
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, "R V"]]:
    """One token per row: (token, its log-prob, log-probs of the whole vocabulary).

    Log-probs are log_softmax(logits / temperature) before any truncation. Greedy rows (temperature 0 or
    top_k 1) are untempered, as SGLang answers for a batch that is greedy throughout; here it is a property of
    the row, so that a reply does not depend on its neighbours.
    """
    rows = max(1, _MAX_ELEMENTS // logits.shape[-1])
    parts = [
        _sample(logits[i : i + rows], Knobs(*(knob[i : i + rows] for knob in knobs)))
        for i in range(0, logits.shape[0], rows)
    ]
    tokens = torch.cat([part[0] for part in parts])
    log_probs = parts[0][1] if len(parts) == 1 else torch.cat([part[1] for part in parts])
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0], log_probs
