"""Whether servers sample from a policy with its adapters: a publish that drops them must not pass as noise.

Below float32 a server's log-probs differ from the trainer's by rounding, often by more than one step changes
them. So each server is placed between two models that the trainer has both of: on the probe's tokens,
s is what the server says, p the policy, b the frozen model without adapters. The share of p - b in s - b,

    t = sum (s - b)(p - b) / sum (p - b)^2,

is 1 for a server with the adapters and 0 for one without them, whatever the rounding, which spreads it by
sigma / sqrt(sum (p - b)^2), sigma^2 the mean square of what p - b leaves unexplained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mcore_rl.data.packing import TokenSequence
from mcore_rl.errors import WeightSyncError
from mcore_rl.model.adapters import AdaptersOff
from mcore_rl.model.build import Model
from mcore_rl.model.step import forward
from mcore_rl.parallel.control import reduce_sums
from mcore_rl.training.batch import Batching, pack_share

_SUMS = ("sp", "pp", "ss", "n")
"""(s - b)(p - b), (p - b)^2, (s - b)^2, tokens"""
_SPREADS = 6.0
"""of rounding, by which a share must be away from 1 before it is believed"""
_NOISES = 5.0
_LEAST = 2e-4
"""the adapters must change a token by so many times the rounding, and by so much, before a server is judged:
in low precision the smallest changes are rounding, and merging rounds them away"""


@dataclass(frozen=True)
class AdapterShare:
    """Where a server stands between the frozen model, 0, and the policy, 1."""

    share: float
    spread: float
    """standard deviation that rounding gives it"""
    distance: float
    """root of the mean square of p - b"""
    noise: float
    """that of what p - b leaves unexplained"""

    @property
    def is_without(self) -> bool:
        """The server answers without the adapters, beyond what rounding explains."""
        told_apart = self.distance > max(_LEAST, _NOISES * self.noise)
        return told_apart and self.share < 0.5 and 1 - self.share > _SPREADS * self.spread


def adapter_share(
    policy: Model, shape: Batching, probe: Sequence[Sequence[int]], scores: Mapping[str, Sequence]
) -> dict[str, AdapterShare]:
    """The share of every server, of its log-probs of the probe by url; collective.

    Nothing for a policy without adapters, or whose adapters change no log-prob: there is nothing to tell
    apart.
    """
    if policy.adapters is None:
        return {}
    fields = {str(number): score for number, score in enumerate(scores.values())}
    sequences = [TokenSequence(tokens[:1], tokens[1:]) for tokens in probe]
    batches = pack_share(sequences, fields, shape, policy.mesh)
    with AdaptersOff(policy.unwrapped).resident():
        without = forward(policy, batches, temperature=1.0)
    sums = {(name, what): torch.zeros((), dtype=torch.float64) for name in fields for what in _SUMS}
    for (batch, head), (_, bare) in zip(forward(policy, batches, temperature=1.0), without, strict=True):
        base = bare.log_prob.double()
        for name in fields if base.numel() else ():
            s, p = batch.fields[name].double() - base, head.log_prob.double() - base
            found = {"sp": (s * p).sum(), "pp": (p * p).sum(), "ss": (s * s).sum()}
            found["n"] = torch.tensor(float(base.numel()))
            for what, value in found.items():
                sums[name, what] += value.cpu()
    totals = reduce_sums(policy.mesh, sums)
    measured = {
        url: _share(*(float(totals[name, what]) for what in _SUMS))
        for url, name in zip(scores, fields, strict=True)
    }
    return {url: share for url, share in measured.items() if share is not None}


def _share(sp: float, pp: float, ss: float, count: float) -> AdapterShare | None:
    if pp == 0:
        return None
    share = sp / pp
    left = max(0.0, ss - share * sp) / count
    return AdapterShare(share, math.sqrt(left / pp), math.sqrt(pp / count), math.sqrt(left))


def check_share(version: str, shares: Mapping[str, AdapterShare]) -> None:
    """Raises WeightSyncError, on every rank, where a server (url -> its share) answers without adapters."""
    for url, share in shares.items():
        if share.is_without:
            raise WeightSyncError(
                f"{url} reports version {version}, but its log-probs are those of the frozen model: it has "
                f"{share.share:.2f} (+- {share.spread:.2g}) of what the adapters change, which is "
                f"{share.distance:.1e} a token. The adapters did not arrive, or are too small for "
                "the precision that they are merged in; see the server's log, or raise optimizer.lr"
            ).on_every_rank()
