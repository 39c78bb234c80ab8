"""A policy of Transformer Engine's own modules on a CPU: built, loaded and exported; it cannot compute.


Transformer Engine refuses to construct a module unless torch.cuda answers like a GPU; it is answered during
construction only, in a process of a pool. `tools/gpu_machine.sh cpu DIR` makes the environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mcore_rl.model import build, platform, weights_io
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.model.layouts import padded_vocab
from mcore_rl.model.policy import PolicyModel
from mcore_rl.model.precision import engine_is_importable
from mcore_rl.model.spec import transformer_config
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.precision import Fp8

NEEDS_ENGINE = [
    pytest.mark.skipif(
        not engine_is_importable(),
        reason="Transformer Engine is not installed (tools/gpu_machine.sh cpu DIR)",
    ),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="this machine has a GPU: tests/gpu builds them there"
    ),
    pytest.mark.filterwarnings("ignore:full scope is deprecated"),  # Megatron about its own default
]

HOPPER, BLACKWELL = (9, 0), (10, 0)


@contextmanager
def answers_like(capability: tuple[int, int]) -> Iterator[None]:
    """torch.cuda says that there is such a GPU; parameters stay on the CPU."""
    major, minor = capability
    properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=132, name="asked by a test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        patch.setattr(platform, "device", lambda: torch.device("cpu"))
        yield


def built(mesh: Mesh, directory: Path, recipe: str | None, seed: int | None = None) -> build.Model:
    """The policy of `directory` at `mesh`, in bf16 or an FP8 recipe, of Transformer Engine's modules.

    With a `seed`, on random weights; the directory's config.json is enough.
    """
    platform.install()
    arch = read_architecture(directory)
    mapping = ParameterMap(arch, padded_vocab(arch, mesh.layout.tensor))
    fp8: Any = Fp8(recipe) if recipe else Fp8()  # pyright: ignore[reportArgumentType]
    kind = partial(PolicyModel, live_vocab=arch.vocab, share_embeddings_and_output_weights=arch.tied)
    random = seed is not None
    read = weights_io.random_reader(mapping, seed) if random else weights_io.reader(directory, mapping)
    with answers_like(BLACKWELL if recipe == "mxfp8" else HOPPER):
        config = transformer_config(arch, mesh.layout, "fp8" if recipe else "bf16", fp8=fp8)
        config.use_cpu_initialization = True
        return build._build(kind, config, mapping, read, mesh, None, directory)
