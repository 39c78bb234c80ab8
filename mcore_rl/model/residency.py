"""What waits in host memory while a step does not need it, by `phases.NEEDED`.

A tensor that waits keeps its place: only the bytes of its storage leave and come back, so every view of
them (of Megatron's gradient and parameter buffers, of the optimizer) stays what it was, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from mcore_rl.model.build import Model
from mcore_rl.model.optimizer import Optimizer
from mcore_rl.model.phases import NEEDED
from mcore_rl.model.weights_io import global_weights


class ResidentPart(Protocol):
    """Something that is on the device only inside `resident()`."""

    def resident(self) -> Any:
        """A context; it may be entered again inside itself."""
        ...


class Residency:
    """The parts of this rank that wait, by their names in NEEDED; without any, everything stays."""

    def __init__(self, parts: Mapping[str, ResidentPart]) -> None:
        self.parts = parts

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """The parts that `phase` needs are on the device; those that were not before leave again."""
        with ExitStack() as stack:
            for name, needed in NEEDED.items():
                if phase in needed and name in self.parts:
                    stack.enter_context(self.parts[name].resident())
            yield


class Offloaded:
    """Tensors in host memory, on the device inside `resident()`."""

    def __init__(
        self,
        kept: Callable[[], Iterable[Tensor]],
        scratch: Callable[[], Iterable[Tensor]] = lambda: (),
        *,
        constant: bool = False,
    ) -> None:
        """Leave the device.

        Args:
            kept: the tensors; asked each time, for an optimizer makes its state in its first update.
            scratch: tensors whose numbers nobody needs again; they come back as 0.
            constant: nothing writes to them, so the first copy in host memory stays the right one.
        """
        self._kept, self._scratch, self._constant = kept, scratch, constant
        self._hosts: dict[int, Tensor] = {}
        self._away: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._empty: list[tuple[torch.UntypedStorage, int]] = []
        self._depth = 0
        self._leave()

    @contextmanager
    def resident(self) -> Iterator[None]:
        """On the device; back to host memory at the end of the outermost of such blocks."""
        if self._depth == 0:
            self._enter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._leave()

    @property
    def host_bytes(self) -> int:
        """In host memory, whether the tensors are on the device or not."""
        return sum(host.numel() for host in self._hosts.values())

    def _leave(self) -> None:
        before, self._hosts, self._away = self._hosts, {}, []
        with _copies():
            for storage in storages(self._kept()):
                host = before.get(storage._cdata)
                copied = self._constant and host is not None
                if host is None or host.numel() != storage.nbytes():
                    host = host_buffer(storage.nbytes())
                if not copied:
                    host.copy_(_bytes(storage), non_blocking=True)
                self._hosts[storage._cdata] = host
                self._away.append((storage, host))
        self._empty = [(storage, storage.nbytes()) for storage in storages(self._scratch())]
        for storage, _ in (*self._away, *self._empty):
            storage.resize_(0)

    def _enter(self) -> None:
        for storage, host in self._away:
            storage.resize_(host.numel())
        for storage, size in self._empty:
            storage.resize_(size)
        with _copies():
            for storage, host in self._away:
                _bytes(storage).copy_(host, non_blocking=True)
            for storage, _ in self._empty:
                _bytes(storage).zero_()


class Swapped:
    """A model's present weights in host memory, in the place of its later ones inside `resident()`.

    A reference that is the policy's own start costs no second model on the device: host memory for its
    weights, and once more for those that make room.
    """

    def __init__(self, model: Model) -> None:
        """Copy the present weights."""
        self._storages = storages(global_weights(model.unwrapped).values())  # routers' biases move too
        self._hosts = [host_buffer(storage.nbytes()) for storage in self._storages]
        self._others = [host_buffer(storage.nbytes()) for storage in self._storages]
        self._exchange(self._hosts, None)

    @contextmanager
    def resident(self) -> Iterator[None]:
        """The model has the weights of the beginning; not to be entered inside itself."""
        self._exchange(self._others, self._hosts)
        try:
            yield
        finally:
            self._exchange(None, self._others)

    @property
    def host_bytes(self) -> int:
        """In host memory."""
        return sum(host.numel() for host in (*self._hosts, *self._others))

    def _exchange(self, out: list[Tensor] | None, into: list[Tensor] | None) -> None:
        with _copies():
            for i, storage in enumerate(self._storages):
                here = _bytes(storage)
                if out is not None:
                    out[i].copy_(here, non_blocking=True)
                if into is not None:
                    here.copy_(into[i], non_blocking=True)


def weights_of(model: Model) -> list[Tensor]:
    """Every parameter of this rank."""
    return [parameter.data for chunk in model.unwrapped for parameter in chunk.parameters()]


def gradients_of(model: Model) -> list[Tensor]:
    """Megatron's gradient buffers of this rank."""
    chunks: list[Any] = list(model.chunks)
    return [b.grad_data for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def state_of(optimizer: Optimizer) -> list[Tensor]:
    """Adam's moments and the fp32 weights on this rank, less tensors that are weights of the model itself."""
    models = {storage._cdata for storage in storages(weights_of(optimizer.model), empty=True)}
    found: list[Tensor] = []
    for part in getattr(optimizer.megatron, "chained_optimizers", [optimizer.megatron]):
        adam = part.optimizer
        if adam is None:  # this rank has none of its parameters
            continue
        for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
            state = adam.state.get(parameter, {}).values()
            found += [parameter.data, *(x for x in state if isinstance(x, Tensor) and x.numel() > 1)]
    return [tensor for tensor in found if tensor.untyped_storage()._cdata not in models]


def storages(tensors: Iterable[Tensor], *, empty: bool = False) -> list[torch.UntypedStorage]:
    """The storages of the tensors, each once; those without bytes only where `empty`."""
    found = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return [storage for storage in found.values() if empty or storage.nbytes()]


def host_buffer(size: int) -> Tensor:
    """[size] bytes in host memory, pinned where there is a GPU: only then a copy runs beside computation."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """[bytes] a view of a whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


@contextmanager
def _copies() -> Iterator[None]:
    """Copies on a stream of their own: after what was computed before, and done at the end.

    The caller frees or reads the memory right after.
    """
    if not torch.cuda.is_available():
        yield
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    side.synchronize()
