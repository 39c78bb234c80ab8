"""Python, torch, Megatron-Core and the optional accelerators of a GPU machine."""

from __future__ import annotations

import importlib.util
import platform as machine
from collections.abc import Iterable
from importlib import metadata

import torch
from torch.cuda import nccl

from mcore_rl.doctor.finding import Finding, guarded
from mcore_rl.model import versions
from mcore_rl.precision import RECIPES

_GIB = 2**30


def check_software() -> list[Finding]:
    """Versions, GPUs and optional packages; nothing here depends on a config."""
    return [
        Finding("python", "ok", f"{machine.python_version()} on {machine.system()} {machine.machine()}"),
        Finding("torch", "ok", f"{torch.__version__}, CUDA build {torch.version.cuda or 'none'}"),
        *guarded("megatron-core", _megatron),
        *_gpus(),
        *_optional("transformer-engine", "transformer_engine", "FP8 and fused layers on GPUs"),
        *_optional("apex", "apex", "fused optimizer kernels where Transformer Engine has none"),
    ]


def _megatron() -> Iterable[Finding]:
    yield Finding("megatron-core", "ok", versions.check())
    if importlib.util.find_spec("psutil") is None:
        yield Finding(
            "megatron-core",
            "error",
            "psutil is missing: Megatron's checkpoint writer would hang",
            "pip install psutil",
        )


def _gpus() -> Iterable[Finding]:
    if not torch.cuda.is_available():
        yield Finding("gpu", "note", "none that torch can use: everything runs on CPU over gloo")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        fp8 = ", ".join(name for name, recipe in RECIPES.items() if capability >= recipe.capability)
        memory = f"{properties.total_memory / _GIB:.0f} GiB"
        yield Finding("gpu", "ok", f"{index}: {properties.name}, {memory}, FP8 {fp8 or 'none'}")
    version = ".".join(map(str, nccl.version()))
    yield Finding("nccl", "ok", version)


def _optional(check: str, module: str, use: str) -> Iterable[Finding]:
    if importlib.util.find_spec(module) is None:
        yield Finding(check, "note", f"not installed; it gives {use}")
        return
    try:
        version = metadata.version(check)
    except metadata.PackageNotFoundError:
        version = "unknown version"
    yield Finding(check, "ok", version)
