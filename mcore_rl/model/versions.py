"""The supported Megatron-Core versions, and everything in which they differ for this project.

One source serves both. Where they part, a function here looks at what is there and meets both; the rest of
the package calls it and knows no version. DIFFERENCES lists each one with the version that needs it, which
tests/model/test_versions.py proves by taking it away.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from mcore_rl.errors import ConfigError

SUPPORTED = {"0.16.1": "Python 3.11", "0.19.2": "Python 3.12 and newer"}
"""megatron-core versions whose internals were checked: platform fixes reach into them."""


def check() -> str:
    """The installed megatron-core version, or a ConfigError that names the supported ones."""
    known = " or ".join(f"{version} ({python})" for version, python in SUPPORTED.items())
    try:
        version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        raise ConfigError(f"megatron-core is not installed; install {known}") from None
    if version not in SUPPORTED:
        raise ConfigError(
            f"megatron-core {version} is not supported: mcore_rl does not know its internals; install {known}"
        )
    return version


def mark_shard(parameter: torch.nn.Parameter, dim: int) -> None:
    """Say that `parameter` is a tensor-parallel shard cut along `dim`, unless Megatron has said so."""
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def mlp_module(linears: MLPSubmodules) -> Any:
    """The `mlp` submodule of a dense layer, in the form that a TransformerLayer builds it from."""
    build = getattr(MLP, "as_mlp_submodule", None)
    return ModuleSpec(module=MLP, submodules=linears) if build is None else partial(build, submodules=linears)


def name_te_gemm() -> None:
    """Define the router's `te_general_gemm` where Transformer Engine, which brings it, is absent."""
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def tell_te_absent() -> None:
    """Let latent attention know that Transformer Engine is absent, where it is."""
    latent: Any = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    engine: Any = importlib.import_module("megatron.core.extensions.transformer_engine")
    latent.HAVE_TE = engine.HAVE_TE


ANNOUNCEMENTS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not",
}
"""logger -> beginning of what it says at every construction, to developers of Megatron-Core"""


def drop_announcements() -> None:
    """Keep the lines of ANNOUNCEMENTS, and one about an experiment, out of every rank's log; no other."""
    warnings.filterwarnings("ignore", "MimoModelConfig is experimental", UserWarning)
    for logger, beginning in ANNOUNCEMENTS.items():
        logging.getLogger(logger).addFilter(partial(_says_more, beginning))


def _says_more(beginning: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginning)


def install() -> None:
    """Meet, once in a process, the differences that no other module calls a function of this one for."""
    name_te_gemm()
    tell_te_absent()
    drop_announcements()


@dataclass(frozen=True)
class VersionDifference:
    """A place where the versions part, and the function here that meets both. For readers and tests."""

    met_by: Callable[..., Any]
    version: str
    """the one that needs it; the other is left as it is"""
    reason: str
    """what happens there without it"""


DIFFERENCES = (
    VersionDifference(
        mark_shard,
        "0.16.1",
        "marks a shard only where it also draws its weights, and ours are loaded: every shard but the first "
        "is then a duplicate to the gradient norm, and clipping differs by layout. 0.19.2 marks all of them, "
        "and asserts when it is told again",
    ),
    VersionDifference(
        name_te_gemm,
        "0.16.1",
        "imports the router's te_general_gemm with Transformer Engine and reads it without: NameError",
    ),
    VersionDifference(
        tell_te_absent,
        "0.16.1",
        "takes what stands for Transformer Engine's classes for the classes, and asks whether a layer of "
        "latent attention is one: TypeError. 0.19.2 asks whether it is there",
    ),
    VersionDifference(
        mlp_module,
        "0.19.2",
        "builds a dense MLP from a class method; it rewraps a ModuleSpec, with a warning for every layer",
    ),
    VersionDifference(
        drop_announcements,
        "0.19.2",
        "announces on every rank, model and critic that GPTModel will follow HybridModel, which 0.16.1 does "
        "not have, and that its DDP computes a layout that 0.16.1 computes silently",
    ),
)
