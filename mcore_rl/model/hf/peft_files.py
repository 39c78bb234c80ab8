"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, read strictly and written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mcore_rl import strict_json
from mcore_rl.errors import ConfigError
from mcore_rl.lora import Lora, Target
from mcore_rl.model.hf.adapters import AdapterMap, random_adapters
from mcore_rl.model.hf.architecture import Architecture
from mcore_rl.model.hf.files import SafetensorsWriter
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.model.hf.torch_dist import holds_torch_dist, torch_dist_reader
from mcore_rl.terminal import listed, short

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PLAIN: Mapping[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_parameters": None,
}
"""fields with the only value under which an adapter is what is built here; absent, they have it"""
_READ = ("r", "lora_alpha", "use_rslora", "init_lora_weights")
_IDLE = frozenset(
    {
        *(
            "auto_mapping",
            "base_model_name_or_path",
            "revision",
            "task_type",
            "inference_mode",
            "peft_version",
        ),
        *("target_modules", "exclude_modules", "layers_pattern", "lora_dropout", "ensure_weight_tying"),
        *("megatron_config", "megatron_core", "qalora_group_size", "runtime_config", "velora_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of beginnings: see _BEGINNINGS
    }
)
"""fields that say nothing of what a trained adapter computes, or what its tensors say too; any other one that
is set would change it: PEFT has a new kind every few months"""
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
"""of `init_lora_weights`: with the others, PEFT changes the model's own weights as it loads the adapter"""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def write_adapter(adapters: AdapterMap, tensors: Mapping[str, Tensor], directory: Path, *, base: str) -> None:
    """Fill an empty `directory` with an adapter, which PEFT and servers read.

    Args:
        tensors: every tensor of `adapters.hf_shapes()`, on the CPU.
        base: what the file calls the model that it is beside.
    """
    forms = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with SafetensorsWriter(directory / WEIGHTS, forms) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    config = json.dumps(adapter_config(adapters, base), indent=2) + "\n"
    (directory / CONFIG).write_text(config)


def adapter_config(adapters: AdapterMap, base: str) -> dict[str, Any]:
    """The content of adapter_config.json."""
    lora = adapters.lora
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha  # as PEFT and servers expect it
    return {
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "target_modules": target_modules(adapters),
        **_PLAIN,
    }


def target_modules(adapters: AdapterMap) -> list[str]:
    """What PEFT is to give adapters to: the last part of a module's name where all modules of it have one."""
    own = ParameterMap(adapters.arch, adapters.arch.vocab)
    every = [name.removesuffix(".weight") for name, shape in own.hf_shapes().items() if len(shape) == 2]
    having = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in adapters.hf_shapes()}
    partly = {name.rpartition(".")[2] for name in every if name not in having}
    return sorted({last if (last := name.rpartition(".")[2]) not in partly else name for name in having})


def adapter_reader(adapters: AdapterMap, directory: Path) -> Callable[[str], Tensor]:
    """Tensors by PEFT's names, from a directory of PEFT's, or a checkpoint, with exactly these adapters.

    PEFT's may be of some of a target's matrices, such as queries and values: the others' adapters are those
    that training begins with elsewhere, whose B is 0.

    Raises:
        ConfigError: the directory holds another adapter, or a form that is not supported; the message says
            which key of [lora], or which tensor.
        CheckpointError: a checkpoint is damaged.
    """
    if holds_torch_dist(directory):
        return torch_dist_reader(directory, adapters)
    told = _check_config(adapters, directory / CONFIG)
    path = directory / WEIGHTS
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
    begun = set(_begun(adapters, told, tensors.keys()))
    shapes = {name: shape for name, shape in adapters.hf_shapes().items() if matrix_of(name) not in begun}
    if lines := list(_differences(tensors, shapes)):
        raise ConfigError(
            f"lora.path: {path}: its tensors are not those of lora.targets = {list(adapters.lora.targets)} "
            f"beside model.path ({listed(lines)}); correct lora.targets, or take another adapter"
        )
    if broken := [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise ConfigError(
            f"lora.path: {path}: {listed(broken)} have numbers that are not finite; take an adapter from "
            "before its training broke"
        )
    begin = random_adapters(adapters)
    return lambda name: tensors[name] if name in tensors else begin(name)


def begun_anew(adapters: AdapterMap, directory: Path) -> list[str]:
    """Matrices, in all layers, of which PEFT's `directory` has no adapter and `adapter_reader` a new one."""
    if holds_torch_dist(directory):
        return []
    told = read_config(directory / CONFIG)
    with _opened(directory / WEIGHTS) as file:
        return _begun(adapters, told, set(file.keys()))


def matrix_of(tensor: str) -> str:
    """What a tensor of PEFT's is of, in all layers and experts, whose numbers become `*`."""
    return _NUMBER.sub("*", tensor.removeprefix("base_model.model.").rpartition(".lora_")[0])


def _begun(adapters: AdapterMap, told: Mapping[str, Any], held: Set[str]) -> list[str]:
    """Matrices that a file has no tensor of, neither is said to have, while it has others of their target."""
    having, named, found = {matrix_of(name) for name in held}, told.get("target_modules"), []
    for target in adapters.lora.targets:
        matrices = {matrix_of(name) for name in _alone(adapters, target).hf_shapes()}
        if matrices & having and named != "all-linear":
            found += sorted(m for m in matrices - having if not _names(named, m))
    return found


def _alone(adapters: AdapterMap, target: Target) -> AdapterMap:
    return AdapterMap(adapters.arch, replace(adapters.lora, targets=(target,)))


def _names(modules: Any, matrix: str) -> bool:
    """`target_modules` of PEFT's, where it is a list, has the matrix of some layer in it."""
    names = modules if isinstance(modules, list) else []
    return any(f".{matrix}".endswith(f".{_NUMBER.sub('*', str(name))}") for name in names)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file to read from. Raises ConfigError for what is none."""
    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"lora.path: {path}: not a readable safetensors file ({error})") from error


def _check_file(path: Path) -> None:
    if not path.is_file():  # to read a pipe could take for ever
        raise ConfigError(f"{path}: no plain file; name the directory of an adapter")


def _differences(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """How an adapter's tensors are not what was wanted."""
    yield from (f"missing {name}" for name in sorted(wanted.keys() - tensors.keys()))
    yield from (f"unexpected {name}" for name in sorted(tensors.keys() - wanted.keys()))
    for name in sorted(wanted.keys() & tensors.keys()):
        if tuple(tensors[name].shape) != wanted[name]:
            yield f"{name} has shape {tuple(tensors[name].shape)}, expected {wanted[name]}"
        if tensors[name].dtype not in (torch.float32, torch.bfloat16, torch.float16):
            yield f"{name} has type {tensors[name].dtype}"


def _check_config(adapters: AdapterMap, path: Path) -> dict[str, Any]:
    told = read_config(path)
    lora = adapters.lora
    ours = {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora}
    keys = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora"}
    for name, value in ours.items():
        if told.get(name, False) != value:
            raise ConfigError(
                f"lora.{keys[name]} = {value}, but {path} says {name} = {short(str(told.get(name)))}; set "
                f"lora.{keys[name]} to it"
            )
    return told


def read_config(path: Path) -> dict[str, Any]:
    """adapter_config.json, of an adapter that is what is built here.

    Raises:
        ConfigError: it cannot be read, or tells of another kind of adapter.
    """
    _check_file(path)
    try:
        told = strict_json.parse(path.read_bytes())
    except (OSError, strict_json.JsonError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); name the directory of an adapter") from error
    if not isinstance(told, dict):
        raise ConfigError(f"{path} is no JSON object; name the directory of an adapter")
    for name, value in told.items():
        plain = _PLAIN.get(name)
        if name in _READ or name in _IDLE or value == plain or not (value or plain):
            continue
        raise ConfigError(
            f"{path}: {short(name)} = {short(repr(value))} is not supported, only {plain!r}; merge that "
            "adapter into its model with PEFT"
        )
    if (begun := told.get("init_lora_weights")) not in _BEGINNINGS:
        raise ConfigError(
            f"{path}: init_lora_weights = {short(repr(begun))}: such an adapter is beside other weights than "
            "the model's; convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    return told


def lora_of(directory: Path, arch: Architecture) -> Lora:
    """What an adapter in PEFT's format says of itself; its targets are those that it has tensors of.

    Raises:
        ConfigError: it cannot be read, or is of another kind.
    """
    told = read_config(directory / CONFIG)
    rank, alpha, rslora = told.get("r"), _finite(told.get("lora_alpha")), told.get("use_rslora", False)
    if type(rank) is not int or rank <= 0 or alpha is None or not isinstance(rslora, bool):
        given = {name: told.get(name) for name in ("r", "lora_alpha", "use_rslora")}
        raise ConfigError(
            f"{directory / CONFIG}: {short(given)}: the rank is a whole number above 0, alpha a finite one, "
            "use_rslora true or false; name the directory of an adapter"
        )
    with _opened(directory / WEIGHTS) as file:
        held = set(file.keys())
    targets = []
    for target in get_args(Target):
        with suppress(ConfigError):  # this model has no such matrices, and so no tensors of theirs
            if held & AdapterMap(arch, Lora(rank, alpha, (target,))).hf_shapes().keys():
                targets.append(target)
    if not targets:
        raise ConfigError(
            f"{directory / WEIGHTS}: of its {len(held)} tensors ({listed(sorted(held))}) none is of an "
            f"adapter of this {arch.family} model; name the model that it was trained beside"
        )
    return Lora(rank, alpha, tuple(targets), rslora, path=directory)


def _finite(number: Any) -> float | None:
    """The number as a float; None for what is none, or none that a float can hold."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    try:
        return float(number) if math.isfinite(number) else None
    except OverflowError:
        return None
