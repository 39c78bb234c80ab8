"""What a backward pass computes again, not kept: answers of cheap functions whose arguments are kept.

The inputs of a layer's linear parts are a norm, a gated activation, the attention's answer in another order.
Each linear layer would keep its own for the gradient of its weight, as much together as all else that a layer
keeps but the gate's argument. What they were made of is kept anyway, by the functions that made them. So such
a function notes on its answer how it came to be, and the linear layers here keep the note. The same function
of the same numbers gives the same bits: no gradient changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, cast

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

_NOTE = "_made_by"
"""attribute of a tensor: the function of nothing that makes it again"""


def noted(answer: Tensor, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`answer`, which remembers that it is `function(*arguments)`; for functions that autograd need not see.

    The arguments live as long as the note: those that the backward pass keeps without it.
    """
    if torch.is_grad_enabled() and answer.requires_grad:
        kept = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        setattr(answer, _NOTE, lambda: _made(function, kept))
    return answer


@torch.no_grad()
def _made(function: Callable[..., Tensor], arguments: list[Any]) -> Tensor:
    return function(*arguments)


def remembering(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, and its answers remember it."""

    @wraps(function)
    def call(*arguments: Any) -> Tensor:
        return noted(function(*arguments), function, *arguments)

    return call


@contextmanager
def kept_as_noted(x: Tensor) -> Iterator[None]:
    """Inside, autograd keeps the note of `x`, if it has one, where it would keep `x`."""
    make = getattr(x, _NOTE, None)
    if make is None:
        yield
        return
    where, shape = x.data_ptr(), x.shape

    def pack(kept: Tensor) -> Any:
        return make if kept.data_ptr() == where and kept.shape == shape else kept

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else cast(Tensor, kept())

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class ThriftyColumn(ColumnParallelLinear):
    """Megatron's layer whose outputs are cut; it keeps a note of its input."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Answer as ColumnParallelLinear does."""
        with kept_as_noted(input_):
            return super().forward(input_, *args, **kwargs)


class ThriftyRow(RowParallelLinear):
    """Megatron's layer whose inputs are cut; it keeps a note of its input."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Answer as RowParallelLinear does."""
        with kept_as_noted(input_):
            return super().forward(input_, *args, **kwargs)
