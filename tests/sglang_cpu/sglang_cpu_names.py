"""Lets SGLang import where there is no GPU; a `.pth` file of .venv-sglang loads it in each of its processes.

SGLang imports CUDA packages wherever it runs. On a CPU without AMX it then computes everything with plain
torch, so that only their *names* must exist; nothing here computes. It is no part of mcore_rl.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

NAMES_ONLY = ("triton", "sgl_kernel")
"""triton: decorators of GPU kernels, 700 MB installed; sgl_kernel: published for CUDA only"""


class Name:
    """Stands for a function, decorator or type: may be named, decorated with and called while importing.

    Launching a kernel (`kernel[grid](...)`) raises NotImplementedError.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, *args: object, **options: object) -> Name:
        return self

    def __getattr__(self, name: str) -> Name:
        if name.startswith("__"):
            raise AttributeError(name)
        if (
            name == "active"
        ):  # triton.runtime.driver.active: SGLang asks for the GPU, and is told as triton does
            raise RuntimeError("0 active drivers")
        return type(self)(f"{self._path}.{name}")

    def __getitem__(self, grid: object) -> object:
        raise NotImplementedError(f"{self._path}: this environment has its name only")


class Function(Name):
    """A Name whose call raises too: sgl_kernel has functions, no decorators."""

    def __call__(self, *args: object, **options: object) -> Name:
        raise NotImplementedError(f"{self._path}: this environment has its name only")


class NamesOnly(ModuleType):
    """A module in which every public name exists."""

    __version__ = "3.0.0"
    __path__ = ()

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        kind = Function if self.__name__.startswith("sgl_kernel") else Name
        return kind(f"{self.__name__}.{name}")


class Finder(MetaPathFinder, Loader):
    """Finds the NAMES_ONLY packages, and prepares torch for two modules just before they are imported."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname == "torchvision":
            declare_torchvision_operators()
        if fullname == "sglang.srt.mem_cache.pool_host.common":
            pin_nothing()
        if fullname == "sglang.srt.lora.layers":
            allocate_unpinned()
        if fullname.split(".")[0] in NAMES_ONLY:
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return NamesOnly(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def declare_torchvision_operators() -> None:
    """torchvision's binary is a CUDA build that CPU torch cannot load; its rules for these two remain."""
    import torch

    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)


class HostMemory:
    """What torch.cuda.cudart() has: pinning, which succeeds where there is no device to pin for."""

    def cudaHostRegister(self, *args: object) -> int:
        return 0

    def cudaHostUnregister(self, *args: object) -> int:
        return 0


def pin_nothing() -> None:
    """Recording routed experts pins a host buffer, on a CPU too (--enable-return-routed-experts)."""
    import torch

    torch.cuda.cudart = HostMemory


def allocate_unpinned() -> None:
    """SGLang's LoRA layers ask for pinned memory, on a CPU too (--enable-lora); they get ordinary memory."""
    import torch

    for name in ("arange", "empty", "ones", "tensor", "zeros"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda tensor, *device: tensor


def unpinned(make: Callable[..., object]) -> Callable[..., object]:
    """The function of torch that makes a tensor, without `pin_memory`."""

    @functools.wraps(make)
    def made(*args: object, pin_memory: bool = False, **options: object) -> object:
        return make(*args, **options)

    return made


KEPT: list[object] = []
"""operator definitions live as long as their library object"""

# SGLang takes its CPU engine only when told.
os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
# TP > 1 compiles one function with dynamo, which trips over a triton without kernels.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
sys.meta_path.insert(0, Finder())
