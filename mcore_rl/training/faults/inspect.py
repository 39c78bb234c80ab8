"""Watches one micro-batch through a model and notes where values stop being finite, phase by phase."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from mcore_rl.model.build import Model
from mcore_rl.model.step import Loss, Measure
from mcore_rl.parallel.context import local_tokens
from mcore_rl.types import PackedBatch

WEIGHTS, INPUT, FORWARD, OBJECTIVE, BACKWARD, GRADIENT = range(6)
MAY_BE_INFINITE = ("rollout_log_prob", "old_log_prob")
"""a token with such a log-prob is masked (algo.rows.Rows.usable)"""


@dataclass(frozen=True, order=True)
class NonFiniteTensor:
    """A tensor with a value that is not finite; they sort in the order of computation."""

    phase: int
    stage: tuple[int, int]
    """(model chunk, pipeline stage), negative in the backward pass"""
    order: int
    """in which this rank met it"""
    rank: int
    what: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.what}, on rank {self.rank}"


class Inspector:
    """`with Inspector(...) as inspector:` hooks every module of the model; `findings` tells what was met."""

    def __init__(self, model: Model, batch: PackedBatch, samples: Sequence[str]) -> None:
        """`batch` before it is cut for context parallelism; `samples`: an id for each of its sequences."""
        self._model, self._mesh = model, model.mesh
        self._batch, self._samples = batch, samples
        self._handles: list[Any] = []
        self._found: list[NonFiniteTensor] = []

    def __enter__(self) -> Self:
        self._inspect_inputs()
        for number, chunk in enumerate(self._model.unwrapped):
            for name, parameter in chunk.named_parameters():
                self._note(WEIGHTS, number, f"weight {name}", parameter)
            for name, module in chunk.named_modules():
                hook = partial(self._after, number, name or "the model")
                self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def observed(self, loss: Loss) -> Loss:
        """The same loss, its input and result looked at."""
        return _Observed(self, loss)

    def look_at(self, batch: PackedBatch, output: Any) -> None:
        """What the last stage answered for these rows."""
        heads = ("log_prob", "entropy") if isinstance(output, tuple) else ("values",)
        for name, value in zip(heads, output if isinstance(output, tuple) else (output,), strict=True):
            self._note(OBJECTIVE, self._last, f"{name} of the head", value, rows=batch)

    def look_at_loss(self, total: Tensor) -> None:
        """The loss of those rows."""
        self._note(OBJECTIVE, self._last, "the loss", total)

    @property
    def _last(self) -> int:
        return len(self._model.unwrapped) - 1

    def findings(self) -> list[NonFiniteTensor]:
        """The tensors of this rank that are not finite; to be asked after the backward pass."""
        for number, chunk in enumerate(self._model.unwrapped):
            for name, parameter in reversed(list(chunk.named_parameters())):
                gradient = getattr(parameter, "main_grad", None)
                if gradient is not None:
                    self._note(GRADIENT, number, f"gradient of {name}", gradient)
        return self._found

    def _inspect_inputs(self) -> None:
        for name, values in self._batch.fields.items():
            if name not in MAY_BE_INFINITE:
                self._note(INPUT, 0, f"field {name}", values, rows=self._batch)

    def _after(self, chunk: int, name: str, module: nn.Module, _: Any, output: Any) -> None:
        for tensor in _tensors(output):
            self._note(FORWARD, chunk, f"output of {name} ({type(module).__name__})", tensor, tokens=True)
            if tensor.requires_grad and torch.is_grad_enabled():
                what = f"gradient of the output of {name} ({type(module).__name__})"
                tensor.register_hook(partial(self._note, BACKWARD, chunk, what, tokens=True))

    def _note(
        self,
        phase: int,
        chunk: int,
        what: str,
        tensor: Tensor | None,
        *,
        tokens: bool = False,
        rows: PackedBatch | None = None,
    ) -> None:
        """Keep the first of a phase on this rank: later ones follow from it. None: no gradient came."""
        if tensor is None or any(finding.phase == phase for finding in self._found):
            return
        value = tensor.detach()
        if not value.is_floating_point() or bool(value.isfinite().all()):
            return
        index = (~value.isfinite()).nonzero()[0].tolist()
        shown = f"{value[tuple(index)].item()} at {index} of {list(value.shape)}"
        if tokens:  # [tokens, 1, ...], and [1, tokens, ...] of the embedding
            axis = 1 if value.shape[0] == 1 and value.ndim > 1 else 0
            shown += self._token(index[axis], value.shape[axis])
        elif rows is not None:
            shown += self._sample(int(rows.sequence[index[0]])) if index else ""
        sign = -1 if phase in (BACKWARD, GRADIENT) else 1
        stage = (sign * chunk, sign * self._mesh.pp_rank)
        self._found.append(
            NonFiniteTensor(phase, stage, len(self._found), self._mesh.rank, f"{what}: {shown}")
        )

    def _token(self, local: int, count: int) -> str:
        """Which packed token the first axis of a local activation means, where it is one of tokens."""
        layout, mesh, batch = self._mesh.layout, self._mesh, self._batch
        mine = torch.arange(batch.tokens.numel())
        if layout.context > 1:
            mine = local_tokens(batch.cu_seqlens, layout.context, mesh.cp_rank)
        if count * layout.tensor == mine.numel() and layout.sequence:
            local += count * mesh.tp_rank
        elif count != mine.numel():
            return ""
        token = int(mine[local])
        sequence = int(torch.searchsorted(batch.cu_seqlens, token, right=True)) - 1
        starts = batch.cu_seqlens[:-1].long()
        before = batch.position_ids[starts]
        place = token - int(starts[sequence]) + int(before[sequence])
        whose = torch.zeros(batch.num_sequences, dtype=torch.bool)
        if batch.begins is not None:  # others may have no tokens of their own for the same prompt
            whose = (batch.begins == starts[sequence]) & (before > place)
        whose[sequence] = True
        return (
            f", token {place} (id {int(batch.tokens[token])}){self._sample(*whose.nonzero()[:, 0].tolist())}"
        )

    def _sample(self, *sequences: int) -> str:
        names = [self._samples[sequence] for sequence in sequences if self._samples[sequence]]
        return f", sample{'s' * (len(names) > 1)} {', '.join(names)}" if names else ""


@dataclass(frozen=True)
class _Observed:
    """A `Loss` of which an inspector sees every call; the head asks it in the mode that it would have."""

    inspector: Inspector
    loss: Loss

    def rowwise(self, batch: PackedBatch) -> bool:
        return self.loss.rowwise(batch)

    def __call__(self, batch: PackedBatch, output: Any) -> tuple[Tensor, Measure]:
        self.inspector.look_at(batch, output)
        total, measure = self.loss(batch, output)
        self.inspector.look_at_loss(total)
        return total, measure


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
