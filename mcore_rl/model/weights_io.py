"""HF safetensors in and out of a Megatron model at any TP x PP; strict about names, shapes and types."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from megatron.core.models.gpt import GPTModel
from safetensors.torch import save_file
from torch import Tensor

from mcore_rl.errors import ConfigError, NumericsError
from mcore_rl.model import versions
from mcore_rl.model.hf_files import EMBEDDING, INDEX, copy_side_files, hf_reader
from mcore_rl.model.mapping import Entry, Mapping, global_parameters
from mcore_rl.model.quantize import is_quantized, quantization_config, quantize_blocks, quantized_shapes
from mcore_rl.model.torch_dist import holds_torch_dist, torch_dist_reader
from mcore_rl.parallel.control import on_main, raise_everywhere
from mcore_rl.parallel.mesh import Mesh


def reader(directory: Path, mapping: Mapping) -> Callable[[str], Tensor]:
    """HF tensors by name from safetensors, or from a model in torch_dist form (converted, or a checkpoint).

    Raises:
        ConfigError: lists what is missing, unexpected, or of a wrong shape or type.
        CheckpointError: a torch_dist directory is damaged.
    """
    read = torch_dist_reader if holds_torch_dist(directory) else hf_reader
    return read(Path(directory), mapping)


def random_reader(mapping: Mapping, seed: int) -> Callable[[str], Tensor]:
    """Random HF tensors that depend on (seed, name) only, so that every layout starts from the same weights.

    Norm weights are 1, biases 0, matrices normal with the config's standard deviation, drawn in float32.
    """
    shapes = mapping.hf_shapes()
    order = {name: i for i, name in enumerate(sorted(shapes))}

    def read(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
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
            _keep_unrounded(parameter, shard)
            _mark(parameter, entry)


def _keep_unrounded(parameter: Any, shard: Tensor) -> None:
    """Of a weight kept in FP8: what the optimizer's fp32 weights begin with, else they begin rounded to FP8.

    Transformer Engine remembers what the parameter was before it was rounded; that was before this load.
    """
    if hasattr(parameter, "get_high_precision_init_val"):
        parameter._high_precision_init_val = shard.detach().cpu()


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


Write = Callable[[dict[str, Tensor], Path], None]
"""puts tensors into the safetensors file of this name"""


def write_file(tensors: dict[str, Tensor], path: Path) -> None:
    """`path` in safetensors' own way."""
    save_file(tensors, path, metadata={"format": "pt"})


def export(
    chunks: Iterable[GPTModel],
    mapping: Mapping,
    mesh: Mesh,
    directory: Path,
    source: Path,
    *,
    quantized: bool = False,
    write: Write = write_file,
) -> None:
    """Write the model as an HF directory, `quantized` in FP8 (model.quantize); collective over all ranks.

    Each pipeline stage and each rank with experts of its own writes a file; the directory appears complete or
    not at all. `source` supplies config.json and the tokenizer.
    """
    directory = Path(directory)
    partial = directory.with_name(directory.name + ".partial")
    if mesh.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    error: Exception | None = None
    try:
        tensors = gather_hf(dict(global_parameters(chunks)), mapping, mesh, quantized=quantized)
    except NumericsError as caught:
        error = caught
    raise_everywhere(mesh, error)
    names: list[list[str]] = [[] for _ in range(mesh.layout.world_size)]
    dist.all_gather_object(names, sorted(tensors), group=mesh.world)
    writers = [rank for rank, owned in enumerate(names) if owned]
    files = {rank: f"model-{i + 1:05d}-of-{len(writers):05d}.safetensors" for i, rank in enumerate(writers)}
    try:
        if tensors:
            write(tensors, partial / files[mesh.rank])
    except Exception as caught:  # a full disk, in whatever type safetensors reports it: raised on every rank
        error = caught
    raise_everywhere(mesh, error)
    weight_map = dict(sorted((name, files[rank]) for rank, owned in enumerate(names) for name in owned))
    on_main(
        mesh,
        lambda: _finish(
            partial, directory, weight_map, Path(source), mapping, quantized, tensors[EMBEDDING].dtype
        ),
    )


def gather_hf(
    tensors: dict[str, Tensor], mapping: Mapping, mesh: Mesh, *, quantized: bool = False
) -> dict[str, Tensor]:
    """Parameters, or their gradients, by global Megatron name -> full HF tensors, each on one rank.

    Collective over the tensor-parallel groups; every rank may call it. The first replica answers for its
    pipeline stages, and for experts the first of the ranks that hold them.
    """
    out: dict[str, Tensor] = {}
    first_replica = mesh.dp_rank == mesh.cp_rank == 0
    for name, tensor in tensors.items():
        entry = mapping.entry(name)
        tensor = dequantize_fp8_tensor(tensor) if is_float8tensor(tensor) else tensor
        if not is_published(mapping, name) or not (entry.is_expert or first_replica):
            continue
        shards = [tensor.detach()]
        if entry.rule.axis is not None and mesh.layout.tensor > 1:
            shards = [torch.empty_like(tensor) for _ in range(mesh.layout.tensor)]
            dist.all_gather(shards, tensor.detach().contiguous(), group=mesh.tp)
        if is_owner(mesh, entry):
            for hf, whole in zip(entry.hf, mapping.to_hf(entry, shards), strict=True):
                written = quantize_blocks(hf, whole) if quantized and is_quantized(hf) else {hf: whole}
                out |= {key: value.cpu().clone() for key, value in written.items()}
    return out


def is_published(mapping: Mapping, name: str) -> bool:
    """False for a tied output layer, which is the embedding again."""
    return not (mapping.arch.tied and name == "output_layer.weight")


def is_owner(mesh: Mesh, entry: Entry) -> bool:
    """Whether this rank, of all that hold a parameter or its shards, answers for it."""
    return mesh.copy == 0 and is_owner_in_copy(mesh, entry)


def is_owner_in_copy(mesh: Mesh, entry: Entry) -> bool:
    """Whether this rank answers for a parameter in its own copy of the model."""
    copies = mesh.layout.copies
    if entry.is_expert:
        return mesh.expert_dp_rank % (mesh.layout.expert_data // copies) == 0
    return mesh.cp_rank == mesh.tp_rank == 0 and mesh.dp_rank % (mesh.layout.data // copies) == 0


def _finish(
    partial: Path,
    directory: Path,
    weight_map: dict[str, str],
    source: Path,
    mapping: Mapping,
    quantized: bool,
    dtype: torch.dtype,
) -> None:
    shapes = mapping.hf_shapes()
    missing = (quantized_shapes(shapes) if quantized else shapes).keys() - weight_map.keys()
    if missing:
        raise ConfigError(f"{directory}: export lacks {sorted(missing)}; this is a bug in model/mapping.py")
    (partial / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1))
    copy_side_files(source, partial, dtype, quantization_config(shapes) if quantized else None)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
