"""The Triton row kernels in Triton's interpreter, beside torch's; prints the errors as JSON.

A process of its own, started by test_triton_rows.py: whether Triton interprets is settled at its import.
"""

from __future__ import annotations

import itertools
import json

import torch
from torch import Tensor

from mcore_rl.parallel.head import passes as head_passes
from mcore_rl.parallel.head import rows, triton_rows
from mcore_rl.parallel.head.passes import Tiling
from mcore_rl.parallel.head.rows import RowTerms
from tests.parallel import test_head as head

triton_rows.BLOCK = 32  # several blocks a row


class Tile:
    """A tile of logits and what the kernels are told of it, in the precision of logits and of float64."""

    def __init__(self, count: int, live: int, dtype: torch.dtype, offset: float, options: str) -> None:
        g = torch.Generator().manual_seed(count + live)
        wide = offset + 3 * torch.randn(count, live + 5, generator=g)
        self.logits = wide.to(dtype)[:, 2 : live + 2]  # rows apart, and none aligned
        self.local = torch.randint(-4, live + 4, (count,), generator=g)
        self.scale = 1 / 0.7
        other = torch.randn(4, 4, count, generator=g, dtype=torch.float64)  # what other shards would send
        other[0, 0], other[1:, 0], other[:, 1] = offset, -torch.inf, other[:, 1].abs()
        other[1:, 1:3] = 0
        self.others = other
        self.a, self.b = torch.randn(2, count, generator=g, dtype=torch.float64)
        self.entropy = "e" in options
        self.cap = 4.0 if "c" in options else None

    def run(self, kernels, dtype: torch.dtype) -> list[Tensor]:
        """The four statistics, and the gradient with the terms that follow from float64."""
        logits = self.logits.double() if dtype == torch.float64 else self.logits
        stats = kernels.shard_statistics(logits, self.local, self.scale, self.cap)
        exact = rows.shard_statistics(self.logits.double(), self.local, self.scale, self.cap)
        _, entropy, top, log_total = rows.merge_statistics(torch.cat([exact[None], self.others]), self.scale)
        terms = RowTerms(*(x.to(dtype) for x in (top, log_total, entropy, self.a)), None)
        if self.entropy:
            terms = terms._replace(grad_entropy=self.b.to(dtype))
        out = torch.full_like(logits, torch.nan, dtype=dtype)
        kernels.logit_gradient(logits, self.local, terms, self.scale, out, self.cap)
        return [*stats, out]

    def error(self, got: list[Tensor]) -> float:
        """The error of the largest entry, relative to max(1, the largest of its kind); -inf must be exact."""
        errors = [0.0]
        for one, other in zip(got, self.run(rows, torch.float64), strict=True):
            if not torch.equal(one.isneginf(), other.isneginf()):
                return float("inf")
            one, other = (x.double().masked_fill(other.isneginf(), 0) for x in (one, other))
            if other.numel():
                error = (one - other).abs().max() / other.abs().max().clamp(min=1)
                errors.append(float(error.nan_to_num(torch.inf)))
        return max(errors)


def tiles() -> dict[str, float]:
    """Case -> error of both kernels."""
    dtypes, offsets, options = (torch.float32, torch.bfloat16), (0.0, 1e4, -1e4), ("", "e", "ec")
    cases = [(3, 71, *others) for others in itertools.product(dtypes, offsets, options)]
    edges = ((0, 71), (1, 1), (2, 0), (3, 32))
    cases += [(*shape, torch.float32, 0.0, chosen) for shape in edges for chosen in ("", "e", "ec")]
    found = {}
    for case in cases:
        tile = Tile(*case)
        found[" ".join(map(str, case))] = tile.error(tile.run(triton_rows, torch.float32))
    return found


def controls() -> dict[str, float]:
    """What is changed -> error, which must be far from none."""
    found = {}
    for name in ("temperature", "target", "entropy", "cap"):
        tile = Tile(3, 71, torch.float32, 0.0, "e")
        got = tile.run(triton_rows, torch.float32)
        if name == "temperature":
            tile.scale *= 1.001
        elif name == "cap":
            tile.cap = 8.0
        elif name == "target":
            tile.local[2] = 1 + tile.local[2] % 70
        else:
            tile.entropy = False
        found[name] = tile.error(got)
    return found


def heads() -> dict[str, float]:
    """The head in both modes through these kernels, against dense float64: by the tiles of a GPU."""
    head_passes.row_kernels = lambda device, dtype: triton_rows
    triton_rows.BLOCK = 128
    case = head.exact_logits(1e4)
    found = {}
    for mode in (head.recomputed, head.fused):
        got = mode(case, tiling=Tiling(4, 16, len(case.weight)))
        errors = head.relative_errors(got, head.dense(head.in_float64(case)))
        found[mode.__name__] = max(*errors[:2], errors[3])
    return found


if __name__ == "__main__":
    print(json.dumps({"tiles": tiles(), "controls": controls(), "heads": heads()}))
