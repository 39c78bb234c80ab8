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


def block_sums(logits: Float[Tensor, "R V"], peak: Float[Tensor, "R 1"]) -> Float[Tensor, "R B"]:
    """Running sums of exp(logits - peak) up to the end of each block of tokens, in float64."""
    # Of a few rows at a time the exponentials, and torch's copy in float64, stay in the processor's cache.
    few = max(1, _CACHED // logits.shape[-1]) if logits.device.type == "cpu" else max(1, len(logits))
    parts = zip(logits.split(few), peak.split(few), strict=True)
    sums = [_blocks((some - its).exp_(), 0.0).sum(-1, dtype=torch.float64) for some, its in parts]
    return torch.cat(sums).cumsum(-1)


def _blocks(x: Float[Tensor, "R V"], beyond: float) -> Float[Tensor, "R B b"]:
    """Blocks of tokens; `beyond` the vocabulary."""
    missing = -x.shape[-1] % _BLOCK
    padded = torch.nn.functional.pad(x, (0, missing), value=beyond) if missing else x
    return padded.unflatten(-1, (-1, _BLOCK))


def draw(
    logits: Float[Tensor, "R V"],
    peak: Float[Tensor, "R 1"],
    sums: Float[Tensor, "R B"],
    uniform: Float[Tensor, " R"],
) -> Int[Tensor, " R"]:
    """The first token of each row at which the sum of exp(logits - peak) exceeds `uniform` of the row's sum.

    `sums` is block_sums(logits, peak). They are those of blocks, and of the tokens of the one block that the
    row draws from: a running sum of the whole vocabulary costs ten times that. A token of logit -inf is never
    drawn.
    """
    target = (uniform * sums[:, -1])[:, None]
    block = torch.searchsorted(sums, target, right=True).clamp(max=sums.shape[-1] - 1)
    before = torch.where(block > 0, sums.gather(-1, (block - 1).clamp(min=0)), 0.0)
    rows = torch.arange(len(logits), device=logits.device)
    weights = (_blocks(logits, -torch.inf)[rows, block[:, 0]] - peak).exp_()
    within = weights.cumsum(-1, dtype=torch.float64)
    # The two sums of a block may differ in the last bit: the target stays below what its tokens sum up to.
    wanted = torch.minimum(target - before, torch.nextafter(within[:, -1:], within.new_tensor(-torch.inf)))
    drawn = block * _BLOCK + torch.searchsorted(within, wanted, right=True)
    # The engine refuses a row that is not finite, after it has been drawn from.
    return drawn[:, 0].clamp(max=logits.shape[-1] - 1)


class LogProbs(NamedTuple):
    """Log-probs of the whole vocabulary, of which a step mostly wants one a row: none is written down."""

    logits: Float[Tensor, "R V"]
    """over the temperature"""
    log_sum: Float[Tensor, " R"]
    """of their exponentials, in float64"""

    def row(self, row: int) -> Float[Tensor, " V"]:
        """Log-probs of one row."""
        return (self.logits[row] - self.log_sum[row]).float()

    def of(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
        """Log-probs of one token a row."""
        return (self.logits.gather(1, tokens[:, None])[:, 0] - self.log_sum).float()


def _sample(logits: Float[Tensor, "R V"], knobs: Knobs) -> tuple[Int[Tensor, " R"], LogProbs]:
    greedy = (knobs.temperature < GREEDY_TEMPERATURE) | (knobs.top_k == 1)
    temperature = knobs.temperature.masked_fill(greedy, 1.0)
    if not bool((temperature == 1).all()):  # a division by 1 changes nothing but the place
        logits = logits / temperature[:, None]
    peak = logits.amax(-1, keepdim=True)
    sums = block_sums(logits, peak)
    log_probs = LogProbs(logits, sums[:, -1].log() + peak[:, 0])
    left = logits
    if bool(((knobs.top_p < 1) | (knobs.min_p > 0) | (knobs.top_k > 1)).any()):
        kept = _kept((logits - log_probs.log_sum[:, None].float()).exp_(), knobs)
        left = logits.masked_fill(~kept, -torch.inf)
        sums = block_sums(left, peak)
    # Inverse CDF in vocabulary order: a row draws the same token with and without truncating neighbours.
    drawn = draw(left, peak, sums, knobs.uniform)
    return torch.where(greedy, logits.argmax(-1), drawn) if bool(greedy.any()) else drawn, log_probs


def sample(
    logits: Float[Tensor, "R V"], knobs: Knobs
) -> tuple[Int[Tensor, " R"], Float[Tensor, " R"], LogProbs]:
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
    scores = [part[1] for part in parts]
    whole = scores[0] if len(parts) == 1 else LogProbs(*map(torch.cat, zip(*scores, strict=True)))
    return tokens, whole.of(tokens), whole
