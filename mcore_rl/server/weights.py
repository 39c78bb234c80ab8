"""Loading and replacing the served weights, strictly: every name and every shape, or nothing changes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from mcore_rl import strict_json
from mcore_rl.errors import CheckpointError, ConfigError
from mcore_rl.kindred import known_config
from mcore_rl.terminal import short
from mcore_rl.weight_files import check_model_directory, weight_files

Shapes = Mapping[str, tuple[int, ...]]
TYPES = ("F64", "F32", "F16", "BF16")
"""of weights, as safetensors writes them: integers and quantized numbers would be taken for floats"""


def checkpoint_files(directory: Path) -> list[Path]:
    """The safetensors files of an HF checkpoint directory.

    Raises CheckpointError when there are none, or they are ambiguous; see `weight_files`.
    """
    try:
        return weight_files(directory)[0]
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    except (OSError, ValueError) as error:  # a path that the file system cannot have: NUL, a lone surrogate
        raise CheckpointError(
            f"{str(directory)!r:.300}: not a directory that can be read ({error})"
        ) from error


def checkpoint_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, from the file headers alone. Raises CheckpointError, for a wrong type too."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in checkpoint_files(directory):
        with _opened(file) as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            wrong = next((name for name, part in parts.items() if part.get_dtype() not in TYPES), None)
            if wrong is not None:
                raise CheckpointError(
                    f"{file}: {short(wrong)} has type {parts[wrong].get_dtype()}, not one of "
                    f"{', '.join(TYPES)}: no weight of this model; export it again"
                )
            shapes |= {name: tuple(part.get_shape()) for name, part in parts.items()}
    return shapes


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file ({error}); export it again"
        ) from error


def _read(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in checkpoint_files(directory):
        with _opened(file) as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def load_model(directory: Path, device: str) -> tuple[PreTrainedModel, Shapes]:
    """The model in float32, and the tensor names and shapes that every later update must have.

    Raises ConfigError when transformers cannot load the directory, CheckpointError for incomplete weights.
    """
    check_model_directory(directory)
    shapes = checkpoint_shapes(directory)
    transformers_logging.disable_progress_bar()
    try:
        hf = strict_json.parse((directory / "config.json").read_bytes())
        known = known_config(hf if isinstance(hf, dict) else {})
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            **known,
            dtype=torch.float32,
            attn_implementation=_attention_of(directory, known.get("config")),
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (ValueError, OSError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"{directory}: transformers cannot load this model: {error}") from error
    model, report = loaded
    _check_report(directory, report)
    return model.to(device).eval().requires_grad_(False), shapes


def _attention_of(directory: Path, config: PreTrainedConfig | None) -> str:
    """torch's fused kernel, or plain products where the model's attention has more than it: caps, sinks."""
    if config is None:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    kind: Any = type(config)
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    return "eager" if model is not None and not model._supports_sdpa else "sdpa"


def _check_report(directory: Path, report: Mapping[str, object]) -> None:
    if any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")):
        raise CheckpointError(f"{directory}: transformers loads it only in part: {report}; export it again")


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Tied name -> the name it shares its storage with."""
    owner = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    everything = model.named_parameters(remove_duplicate=False)
    return {name: owner[p.data_ptr()] for name, p in everything if owner[p.data_ptr()] != name}


def _check_names(model: PreTrainedModel, directory: Path, expected: Shapes) -> None:
    tied = _tied_names(model)
    found = checkpoint_shapes(directory)
    faults = [f"{name}: missing" for name in sorted(expected.keys() - found.keys() - tied.keys())]
    for name, shape in sorted(found.items()):
        owner = name if name in expected else tied.get(name)
        if owner is None or owner not in expected:
            faults.append(f"{name}: not a tensor of this model")
        elif expected[owner] != shape:
            faults.append(f"{name}: shape {list(shape)}, the model has {list(expected[owner])}")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"{directory}: {'; '.join(faults[:5])}{more}; the old weights stay. Export every tensor once."
        )


def replace_weights(model: PreTrainedModel, directory: Path, expected: Shapes) -> None:
    """Copies the checkpoint into `model`, as float32. Everything is read and checked before the first copy.

    Raises CheckpointError (missing, unexpected, misshapen, non-finite or unequal tied tensors); the model is
    then unchanged.
    """
    _check_names(model, directory, expected)
    tensors = _read(directory)
    for name, owner in _tied_names(model).items():
        if name in tensors and owner in tensors and not torch.equal(tensors[name], tensors[owner]):
            raise CheckpointError(
                f"{directory}: {name} is tied to {owner} but differs from it; the old weights stay"
            )
    bad = [name for name, tensor in tensors.items() if not bool(tensor.float().isfinite().all())]
    if bad:
        raise CheckpointError(
            f"{directory}: {bad[0]} has values that are not finite in float32; the old weights stay"
        )
    # transformers itself maps checkpoint names to module names (they differ for mixture-of-experts models).
    try:
        loaded: Any = type(model).from_pretrained(
            None, config=model.config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
        )
    except RuntimeError as error:
        raise CheckpointError(
            f"{directory}: transformers cannot load it: {error}; the old weights stay"
        ) from error
    fresh, report = loaded
    _check_report(directory, report)
    with torch.no_grad():
        # With the buffers that a checkpoint has: biases of routers' choices.
        new = fresh.state_dict()
        for name, target in model.state_dict().items():
            target.copy_(new[name])


def weight_checksums(model: PreTrainedModel) -> dict[str, str]:
    """Parameter name -> sha256 of its float32 values, C order, little endian; tied names once."""
    return {
        name: hashlib.sha256(parameter.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
        for name, parameter in model.named_parameters()
    }


def combined_checksum(checksums: Mapping[str, str]) -> str:
    """sha256 of the `name:checksum` lines in name order."""
    lines = "".join(f"{name}:{value}\n" for name, value in sorted(checksums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
