"""The random states of a rank, as JSON: torch (CPU and CUDA), numpy, Python, and Megatron's tracker."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from mcore_rl.errors import ConfigError


def seed_rng(seed: int) -> None:
    """Begin every generator of this process anew, so that two runs of one seed have the same states."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The states of this process's random generators, as JSON."""
    kind, numbers, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": _to_text(torch.get_rng_state()),
        "cuda": _to_text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "numpy": [str(kind), [int(n) for n in numbers], int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
        "megatron": {name: _to_text(state) for name, state in _tracker().get_states().items()},
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Continue from what `rng_state` gave, after a trip through JSON.

    Raises:
        ConfigError: it is of another kind of device.
    """
    if (state["cuda"] is not None) != torch.cuda.is_available():
        raise ConfigError(
            "--resume: the random states are of another kind of device; resume on the saved one"
        )
    torch.set_rng_state(_to_tensor(state["torch"]))
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(_to_tensor(state["cuda"]))
    kind, numbers, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(numbers, dtype=np.uint32), position, has_gauss, gauss))
    version, words, pending = state["python"]
    random.setstate((version, tuple(words), pending))
    _tracker().set_states({name: _to_tensor(text) for name, text in state["megatron"].items()})


def _tracker() -> Any:
    return get_cuda_rng_tracker()


def _to_text(state: Tensor) -> str:
    return state.cpu().numpy().tobytes().hex()


def _to_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
