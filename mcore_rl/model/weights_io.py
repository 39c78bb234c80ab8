"""The weights of a Megatron model at any layout, from HF tensors; strict about names, shapes and types.

The way out is weights/buckets.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mcore_rl.errors import ConfigError
from mcore_rl.model import versions
from mcore_rl.model.hf.adapters import PLACE
from mcore_rl.model.hf.files import hf_reader
from mcore_rl.model.hf.parameters import NUMBER, ParameterEntry, ParameterMap, canonical, numbers_in
from mcore_rl.model.hf.stacked import whole_of
from mcore_rl.model.hf.torch_dist import holds_torch_dist, torch_dist_reader
from mcore_rl.parallel.mesh import Mesh

ROUTER_BIAS = ".router.expert_bias"
"""end of the name of a buffer that a checkpoint of Hugging Face has, and that is exported"""


def global_parameters(chunks: Iterable[GPTModel]) -> dict[str, torch.nn.Parameter]:
    """Global Megatron name -> parameter, of all model chunks on this rank (unwrapped GPTModels).

    Megatron numbers layers within a chunk and experts within a rank; here both are global, from 0. The names
    are canonical: those of the portable spec, also where Transformer Engine fuses modules.
    """
    named: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            named[globalize(name, chunk)] = parameter
    return named


def global_weights(chunks: Iterable[GPTModel]) -> dict[str, Tensor]:
    """The parameters but for adapters, and tensors of a model that no gradient reaches: routers' biases."""
    chunks = list(chunks)
    buffers = {
        globalize(name, chunk): buffer
        for chunk in chunks
        for name, buffer in chunk.named_buffers()
        if name.endswith(ROUTER_BIAS)
    }
    own = {name: weight for name, weight in global_parameters(chunks).items() if PLACE not in name}
    return own | buffers


def globalize(name: str, chunk: GPTModel) -> str:
    """The global, canonical name of a parameter that `chunk` calls `name`."""
    name = canonical(name)
    numbers = numbers_in(name)
    if not numbers:
        return name
    layer: Any = chunk.decoder.layers[numbers["layer"]]
    known = {"layer": layer.layer_number - 1}
    if "expert" in numbers:
        known["expert"] = layer.mlp.local_expert_indices[numbers["expert"]]
    return NUMBER.sub(lambda match: str(known[match.lastgroup or ""]), name)


def reader(directory: Path, mapping: ParameterMap) -> Callable[[str], Tensor]:
    """HF tensors by name from safetensors, or from a model in torch_dist form (converted, or a checkpoint).

    Raises:
        ConfigError: lists what is missing, unexpected, or of a wrong shape or type.
        CheckpointError: a torch_dist directory is damaged.
    """
    read = torch_dist_reader if holds_torch_dist(directory) else hf_reader
    return read(Path(directory), mapping)


def random_reader(mapping: ParameterMap, seed: int) -> Callable[[str], Tensor]:
    """Random HF tensors that depend on (seed, name) only, so that every layout starts from the same weights.

    Norm weights are 1, biases and sinks 0, matrices normal with the config's standard deviation, drawn in
    float32.
    """
    shapes = mapping.hf_shapes()
    order = {name: i for i, name in enumerate(sorted(shapes))}

    def read(name: str) -> Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            added = whole_of(name).endswith(("bias", "sinks"))
            one = not (added or mapping.arch.centered_norms)
            return torch.ones(shape) if one else torch.zeros(shape)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + order[name])
        return torch.randn(shape, generator=generator) * mapping.arch.init_std

    return read


def load(
    chunks: Iterable[GPTModel], mapping: ParameterMap, mesh: Mesh, read: Callable[[str], Tensor]
) -> None:
    """Fill this rank's parameters, each from its HF tensors. `chunks` are unwrapped models."""
    with torch.no_grad():
        for name, parameter in global_weights(chunks).items():
            entry = mapping.entry(name)
            shard = mapping.to_shard(entry, [read(hf) for hf in entry.hf], mesh.tp_rank, mesh.layout.tensor)
            if shard.shape != parameter.shape:
                raise ConfigError(
                    f"{name}: shard has shape {tuple(shard.shape)}, the model {tuple(parameter.shape)}"
                )
            parameter.copy_(shard)
            _keep_unrounded(parameter, shard)
            mark(parameter, entry)


def _keep_unrounded(parameter: Any, shard: Tensor) -> None:
    """Tell a weight that is kept in FP8 what was loaded: the optimizer's fp32 weights begin with it.

    Transformer Engine remembers what the parameter was before it was rounded, and that was before this load.
    """
    if hasattr(parameter, "get_high_precision_init_val"):
        parameter._high_precision_init_val = shard.detach().cpu()


def mark(parameter: Any, entry: ParameterEntry) -> None:
    """Attributes by which Megatron groups parameters; it sets them only where it also draws the weight."""
    if entry.is_expert:
        # Reduced over the ranks that hold the same experts. Megatron says so only at EP > 1; at TP > 1 alone
        # the experts of the tensor-parallel ranks, which see different tokens, would drift apart.
        parameter.allreduce = False
        # Megatron marks the bias of a row-parallel layer as if every rank had the same expert.
        parameter.sequence_parallel = False
    if entry.rule.axis is not None or entry.is_expert:
        # Without it every shard but the first is taken for a duplicate: the gradient norm, and with it
        # clipping, is silently too small under TP.
        versions.mark_shard(parameter, entry.rule.axis or 0 if entry.rule.merge == "single" else 0)
