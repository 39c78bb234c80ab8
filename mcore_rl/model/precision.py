"""Which precisions this machine can run; those that it cannot are refused by name, with the remedy."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from mcore_rl.errors import ConfigError

FP8_CAPABILITY = (8, 9)
"""CUDA compute capability of the first GPUs with FP8 tensor cores (Ada; Hopper is 9.0)"""
_REMEDY = 'set model.precision = "bf16"'


def check_precision(precision: str) -> None:
    """Raise ConfigError where `precision` cannot run on this machine."""
    if precision != "fp8":
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            f'model.precision = "fp8" needs a GPU, and this machine has none; {_REMEDY}, '
            "or try the code here with --rehearse"
        )
    capability = torch.cuda.get_device_capability()
    if capability < FP8_CAPABILITY:
        name = torch.cuda.get_device_name()
        raise ConfigError(f'model.precision = "fp8": {name} has no FP8 (capability {capability}); {_REMEDY}')
    if find_spec("transformer_engine") is None:
        raise ConfigError(
            f'model.precision = "fp8" needs Transformer Engine, which is not installed; {_REMEDY}'
        )
    raise ConfigError(
        f'model.precision = "fp8": the layers of this version are not built on Transformer Engine; {_REMEDY}'
    )
