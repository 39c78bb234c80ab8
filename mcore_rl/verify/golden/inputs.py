"""The golden batch in one precision, and the head that scores it on one rank or on a tensor-parallel group.

Legend: N sequences, T response positions, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mcore_rl.algo import advantages
from mcore_rl.algo.advantages import offsets_of
from mcore_rl.errors import DataError
from mcore_rl.parallel.head import head
from mcore_rl.parallel.head.passes import Tiling

Arrays = Mapping[str, np.ndarray]
Outputs = dict[str, Tensor]

BATCH_INPUTS = frozenset(
    {
        "H",
        "W",
        "y",
        "mask",
        "pad",
        "lengths",
        "group",
        "rewards",
        "temperature",
        "L_max",
        "old_logp",
        "ref_logp",
    }
    | {"rollout_logp", "values_old", "values_new", "n_tokens", "n_seq", "n_seq_valid", "keep_mask"}
)


def load(directory: Path) -> dict[str, dict[str, np.ndarray]]:
    """File stem -> array name -> array, of every .npz file in `directory`.

    Raises:
        DataError: no such directory, no batch.npz in it, a file that cannot be read, or a batch without an
        input.
    """
    try:
        is_there = directory.is_dir()
    except OSError:  # a name that no file system takes
        is_there = False
    if not is_there:
        raise DataError(f"{directory}: no such directory; pass one that holds batch.npz and the golden files")
    files = {file.stem: _read(file) for file in sorted(directory.glob("*.npz"))}
    missing = sorted(BATCH_INPUTS - files.get("batch", {}).keys())
    if missing:
        raise DataError(
            f"{directory / 'batch.npz'}: no {', '.join(missing)}; every golden case needs the batch"
        )
    return files


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy and zipfile raise many types on a damaged file
        raise DataError(f"{file}: not a readable .npz file ({error}); copy it again") from error


@dataclass(frozen=True)
class GoldenInputs:
    """Everything a case may read. Floats have `dtype`; rewards stay float64, as in training."""

    files: Mapping[str, Arrays]
    dtype: torch.dtype
    group: dist.ProcessGroup | None = None
    fused: bool = False
    """losses are differentiated in the head's fused mode, not in its recompute mode"""

    def tensor(self, name: str, file: str = "batch") -> Tensor:
        """One input, floating-point ones cast."""
        if name not in self.files.get(file, {}):
            raise DataError(f"{file}.npz: no input array {name!r}; the cases of this file need it")
        value = torch.from_numpy(np.asarray(self.files[file][name]))
        return value.to(self.dtype) if value.is_floating_point() else value

    def scalar(self, name: str, file: str = "batch") -> float:
        """One input number."""
        return float(self.tensor(name, file).double())

    @cached_property
    def mask(self) -> Tensor:
        """[N, T] bool"""
        return self.tensor("mask") > 0

    @cached_property
    def lengths(self) -> Tensor:
        """[N] scored tokens, int64"""
        return self.mask.sum(1)

    @cached_property
    def offsets(self) -> Tensor:
        """[N+1] of the scored tokens as flat rows"""
        return offsets_of(self.lengths)

    @cached_property
    def groups(self) -> list[int]:
        """[N]"""
        return self.files["batch"]["group"].tolist()

    @cached_property
    def rewards(self) -> Tensor:
        """[N] float64"""
        return torch.from_numpy(self.files["batch"]["rewards"]).double()

    @cached_property
    def statistics(self) -> advantages.GroupStatistics:
        """The statistics of the rewards, by group."""
        return advantages.group_statistics(self.groups, self.rewards.tolist())

    @cached_property
    def logits(self) -> Tensor:
        """[N, T, V] before the temperature"""
        return self.tensor("H") @ self.tensor("W").T

    def rows(self, name: str) -> Tensor:
        """[N, T] array -> [R] scored rows."""
        return self.tensor(name)[self.mask]

    def unpack(self, rows: Tensor) -> Tensor:
        """[R] scored rows -> [N, T], 0 at masked positions."""
        return torch.zeros(self.mask.shape, dtype=self.dtype).masked_scatter(self.mask, rows.to(self.dtype))

    def expand(self, samples: Tensor) -> Tensor:
        """[N] -> [N, T]"""
        return samples.to(self.dtype)[:, None].expand(self.mask.shape)

    def sequence_mean(self, tokens: Tensor) -> Tensor:
        """[N, T] -> [N] mean over scored tokens, 0 where there is none"""
        return self.sequence_sum(tokens) / self.lengths.clamp(min=1)

    def sequence_sum(self, tokens: Tensor) -> Tensor:
        """[N, T] -> [N] sum over scored tokens"""
        return torch.where(self.mask, tokens, 0.0).sum(1)

    def scores(self) -> tuple[Tensor, Tensor]:
        """(log_prob, entropy), each [N, T], from the head."""
        scored = self._head(self.tensor("H"), self.tensor("W"))[0]
        return scored.log_prob.detach(), scored.entropy.detach()

    def gradients(self, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Outputs:
        """loss, coef [N, T], dlogits [N, T, V], dW [V, D] and dH [N, T, D] of `loss_of(log_prob, entropy)`.

        dlogits comes from the head with hidden := logits and weight := identity, dW and dH from the real
        ones.
        """
        loss, coef, d_hidden, d_shard = self._differentiate(loss_of, self.tensor("H"), self.tensor("W"))
        eye = torch.eye(self.logits.shape[-1], dtype=self.dtype)
        _, _, d_logits, _ = self._differentiate(loss_of, self.logits, eye)
        return {
            "loss": loss,
            "coef": coef,
            "dlogits": d_logits,
            "dW": self.gather(d_shard)[: len(eye)],
            "dH": d_hidden,
        }

    def _differentiate(
        self, loss_of: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(loss, dL/dlog_prob [N, T], dL/dhidden [N, T, .], dL/dweight of this rank's shard)."""
        if self.fused:
            return self._differentiate_fused(loss_of, hidden, weight)
        scored, hidden, shard = self._head(hidden, weight)
        loss = loss_of(scored.log_prob, scored.entropy)
        gradients = torch.autograd.grad(
            loss, (scored.log_prob, hidden, shard), allow_unused=True, materialize_grads=True
        )
        return loss.detach(), gradients[0], gradients[1], gradients[2]

    def _differentiate_fused(self, loss_of, hidden: Tensor, weight: Tensor):
        """Differentiate the fused head. The batch is one chunk, so that sequence losses are exact too."""
        seen: list[tuple[Tensor, Tensor]] = []

        def row_loss(rows: slice, scored: head.HeadOutput) -> Tensor:
            loss = loss_of(*(x.view(self.mask.shape) for x in scored))
            (coef,) = torch.autograd.grad(
                loss, scored.log_prob, allow_unused=True, materialize_grads=True, retain_graph=True
            )
            seen.append((loss.detach(), coef.view(self.mask.shape)))
            return loss

        states, shard, call = self.call(hidden, weight)
        total = head.head_loss(states.flatten(0, 1), shard, call, row_loss)
        d_states, d_shard = torch.autograd.grad(total, (states, shard))
        return *seen[0], d_states, d_shard

    def _head(self, hidden: Tensor, weight: Tensor) -> tuple[head.HeadOutput, Tensor, Tensor]:
        """The [N, T] outputs and the leaves they came from: hidden [N, T, .], this rank's weight shard."""
        states, shard, call = self.call(hidden, weight)
        scored = head.log_prob_entropy(states.flatten(0, 1), shard, call)
        return head.HeadOutput(*(x.view(self.mask.shape) for x in scored)), states, shard

    def call(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, head.Call]:
        """Return leaves of hidden [N, T, .] and of this rank's weight shard, and the call of the head."""
        targets = self.tensor("y").flatten()
        rows = targets.numel()
        shard = self.shard(weight).requires_grad_()
        call = head.Call.of(
            shard,
            targets,
            self.scalar("temperature"),
            group=self.group,
            vocab_size=len(weight),
            tiling=Tiling(rows, rows, len(weight)),
        )
        return hidden.clone().requires_grad_(), shard, call

    def shard(self, weight: Tensor) -> Tensor:
        """This rank's rows of `weight`, padded to divide evenly. NaN padding: whoever reads it shows."""
        ranks, rank = (1, 0) if self.group is None else (self.group.size(), self.group.rank())
        rows = -(-len(weight) // ranks)
        padding = weight.new_full((rows * ranks - len(weight), weight.shape[1]), torch.nan)
        return torch.cat([weight, padding])[rank * rows : (rank + 1) * rows].clone()

    def gather(self, shard: Tensor) -> Tensor:
        """Every rank's rows, in order, padding included."""
        if self.group is None:
            return shard
        parts = [torch.empty_like(shard) for _ in range(self.group.size())]
        dist.all_gather(parts, shard.contiguous(), group=self.group)
        return torch.cat(parts)
