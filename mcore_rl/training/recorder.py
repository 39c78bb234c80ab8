"""What the updates of one step say of its tokens, taken where it is computed: no forward pass is added.

A recorded objective sees the log-probs that the objective sees, and keeps them. A step that is not dumped has
no recorder, and its objective is the run's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mcore_rl.dumps.trained import TrainedTokens
from mcore_rl.model.step import Loss, Measure
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.types import PackedBatch, Sample

ROW = "row"
"""field of a row: its number among the trained tokens of all samples"""


class Recorder:
    """The policy's log-probs of R trained tokens, sample after sample, as one step's updates meet them."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.ids = [sample.id for sample in samples]
        self.ends = np.cumsum([sample.trained_tokens for sample in samples]).tolist()
        self._old, self._now = (torch.full((self.ends[-1],), torch.nan) for _ in range(2))
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def fields(self) -> Mapping[str, Sequence[np.ndarray]]:
        """What the rows of the step's mini-batches carry besides."""
        return {ROW: np.split(np.arange(self.ends[-1]), self.ends[:-1])}

    def keep(self, batch: PackedBatch, log_prob: Tensor) -> None:
        """Log-probs [r] of the rows of (a part of) a micro-batch; of two visits, the later one stays."""
        now = log_prob.detach().float()
        old = batch.fields.get("old_log_prob", now)
        self._kept.append((batch.fields[ROW].long(), old.float(), now))  # no rows have no type

    def tokens(self, mesh: Mesh, advantages: Sequence[Any]) -> TrainedTokens:
        """The tokens of all ranks; collective.

        Args:
            advantages: [N] of one number or [m_i] numbers.
        """
        for rows, *kept in self._kept:  # at the end of a step, since a GPU is waited for
            numbers = rows.cpu()
            known = numbers >= 0  # tokens between the turns, where they are learnt too, have no number
            for place, values in zip((self._old, self._now), kept, strict=True):
                place[numbers[known]] = values.cpu()[known]
        self._kept.clear()
        both = torch.stack([self._old, self._now])
        known = ~both.isnan() if mesh.owns_metrics else torch.zeros_like(both, dtype=torch.bool)
        # one of the ranks that own metrics has met a row, and the others add nothing
        found = torch.stack([torch.where(known, both, 0.0), known.float()])
        dist.all_reduce(found, group=mesh.world)
        old, now = torch.where(found[1] > 0, found[0], torch.nan).numpy()
        lengths = np.diff(self.ends, prepend=0)
        spread = [np.broadcast_to(value, length) for value, length in zip(advantages, lengths, strict=True)]
        return TrainedTokens(old, now, np.concatenate([np.zeros(0), *spread]).astype(np.float32))


@dataclass(frozen=True)
class RecordedObjective:
    """An objective whose recorder keeps what it is asked about; see `Loss` in model.step."""

    objective: Loss
    recorder: Recorder = field(repr=False)

    def rowwise(self, batch: PackedBatch) -> bool:
        """Say what the objective says."""
        return self.objective.rowwise(batch)

    def __call__(self, batch: PackedBatch, head: Any) -> tuple[Tensor, Measure]:
        """Answer what the objective answers."""
        total, measure = self.objective(batch, head)

        def keep_and_measure() -> Mapping[Any, Tensor]:
            self.recorder.keep(batch, head.log_prob)
            return measure()

        return total, keep_and_measure
