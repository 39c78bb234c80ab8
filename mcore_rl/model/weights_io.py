"""HF safetensors in and out of a Megatron model at any TP x PP; strict about names, shapes and types."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mcore_rl.errors import ConfigError
from mcore_rl.model import versions
from mcore_rl.model.mapping import Entry, Mapping, global_parameters
from mcore_rl.parallel.control import on_main, raise_everywhere
from mcore_rl.parallel.mesh import Mesh

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
"""Copied beside exported weights, so that a server or transformers can load the directory."""


def checkpoint_files(directory: Path) -> dict[str, Path]:
    """HF tensor name -> the safetensors file in `directory` that holds it.

    Raises:
        ConfigError: no safetensors, a damaged file, or an index that points out of the directory.
    """
    directory = Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise ConfigError(f"{index}: {name} points to {file!r}, outside the directory")
        return {name: directory / file for name, file in weight_map.items()}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{directory}: no *.safetensors; convert the model or set model.random_init = true")
    found: dict[str, Path] = {}
    for file in files:
        with _open(file) as tensors:
            found.update(dict.fromkeys(tensors.keys(), file))
    return found


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors raises its own, untyped error for a damaged header
        raise ConfigError(f"{file}: not a readable safetensors file ({error}); export it again") from error


def hf_reader(directory: Path, mapping: Mapping) -> Callable[[str], Tensor]:
    """A function that reads an HF tensor of `directory` by name, after a strict check of names and shapes.

    Raises:
        ConfigError: lists every missing, unexpected or wrongly shaped tensor.
    """
    files = checkpoint_files(directory)
    expected = mapping.hf_shapes()
    problems = [f"missing {name}" for name in sorted(expected.keys() - files.keys())]
    problems += [f"unexpected {name}" for name in sorted(files.keys() - expected.keys())]
    for name in sorted(expected.keys() & files.keys()):
        with _open(files[name]) as tensors:
            shape = tuple(tensors.get_slice(name).get_shape())
        if shape != expected[name]:
            problems.append(f"{name} has shape {shape}, config.json asks for {expected[name]}")
    if problems:
        raise ConfigError(f"{directory}: weights do not fit config.json: " + "; ".join(problems))

    def read(name: str) -> Tensor:
        with _open(files[name]) as tensors:
            return tensors.get_tensor(name)

    return read


def random_reader(mapping: Mapping, seed: int) -> Callable[[str], Tensor]:
    """Random HF tensors that depend on (seed, name) only, so that every layout starts from the same weights.

    Norm weights are 1, matrices normal with the config's standard deviation, drawn in float32.
    """
    shapes = mapping.hf_shapes()
    order = {name: i for i, name in enumerate(sorted(shapes))}

    def read(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + order[name])
        return torch.randn(shape, generator=generator) * mapping.arch.init_std

    return read


def load(chunks: Iterable[GPTModel], mapping: Mapping, mesh: Mesh, read: Callable[[str], Tensor]) -> None:
    """Fill this rank's parameters, each from its HF tensors. `chunks` are unwrapped models."""
    with torch.no_grad():
        for name, parameter in global_parameters(chunks).items():
            entry = mapping.entry(name)
            shard = mapping.to_shard(entry, [read(hf) for hf in entry.hf], mesh.tp_rank, mesh.layout.tensor)
            if shard.shape != parameter.shape:
                raise ConfigError(
                    f"{name}: shard has shape {tuple(shard.shape)}, the model {tuple(parameter.shape)}"
                )
            parameter.copy_(shard)
            _mark(parameter, entry)


def _mark(parameter: torch.nn.Parameter, entry: Entry) -> None:
    """Attributes by which Megatron groups parameters; it sets them only where it also draws the weight."""
    if entry.is_expert:
        # Reduced over the ranks that hold the same experts. Megatron says so only at EP > 1; at TP > 1 alone
        # the experts of the tensor-parallel ranks, which see different tokens, would drift apart.
        parameter.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
    if entry.rule.axis is not None or entry.is_expert:
        # Without it every shard but the first is taken for a duplicate: the gradient norm, and with it
        # clipping, is silently too small under TP.
        dim = 1 if entry.rule.merge == "single" else 0
        versions.mark_shard(parameter, dim)


def export(chunks: Iterable[GPTModel], mapping: Mapping, mesh: Mesh, directory: Path, source: Path) -> None:
    """Write the model as an HF directory; collective over all ranks.

    Each pipeline stage and each rank with experts of its own writes a file; the directory appears complete or
    not at all. `source` supplies config.json and the tokenizer.
    """
    directory = Path(directory)
    partial = directory.with_name(directory.name + ".partial")
    if mesh.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    tensors = gather_hf(dict(global_parameters(chunks)), mapping, mesh)
    names: list[list[str]] = [[] for _ in range(mesh.layout.world_size)]
    dist.all_gather_object(names, sorted(tensors), group=mesh.world)
    writers = [rank for rank, owned in enumerate(names) if owned]
    files = {rank: f"model-{i + 1:05d}-of-{len(writers):05d}.safetensors" for i, rank in enumerate(writers)}
    error: Exception | None = None
    try:
        if tensors:
            save_file(tensors, partial / files[mesh.rank], metadata={"format": "pt"})
    except Exception as caught:  # a full disk, in whatever type safetensors reports it: raised on every rank
        error = caught
    raise_everywhere(mesh, error)
    weight_map = dict(sorted((name, files[rank]) for rank, owned in enumerate(names) for name in owned))
    on_main(mesh, lambda: _finish(partial, directory, weight_map, Path(source), mapping))


def gather_hf(tensors: dict[str, Tensor], mapping: Mapping, mesh: Mesh) -> dict[str, Tensor]:
    """Parameters, or their gradients, by global Megatron name -> full HF tensors, each on one rank.

    Collective over the tensor-parallel groups; every rank may call it. The first replica answers for its
    pipeline stages, and for experts the first of the ranks that hold them.
    """
    out: dict[str, Tensor] = {}
    first_replica = mesh.dp_rank == mesh.cp_rank == 0
    for name, tensor in tensors.items():
        entry = mapping.entry(name)
        if (mapping.arch.tied and name == "output_layer.weight") or not (entry.is_expert or first_replica):
            continue
        shards = [tensor.detach()]
        if entry.rule.axis is not None and mesh.layout.tensor > 1:
            shards = [torch.empty_like(tensor) for _ in range(mesh.layout.tensor)]
            dist.all_gather(shards, tensor.detach().contiguous(), group=mesh.tp)
        if mesh.expert_dp_rank == 0 if entry.is_expert else mesh.tp_rank == 0:
            out.update(zip(entry.hf, (t.cpu().clone() for t in mapping.to_hf(entry, shards)), strict=True))
    return out


def _finish(
    partial: Path, directory: Path, weight_map: dict[str, str], source: Path, mapping: Mapping
) -> None:
    missing = mapping.hf_shapes().keys() - weight_map.keys()
    if missing:
        raise ConfigError(f"{directory}: export lacks {sorted(missing)}; this is a bug in model/mapping.py")
    (partial / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1)
    )
    for name in SIDE_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, partial / name)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
