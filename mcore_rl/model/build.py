"""Builds the models of a run on this rank: config, layers, head, weights, Megatron's DDP."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import cast

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mcore_rl.errors import LayoutError
from mcore_rl.lora import Lora
from mcore_rl.model import platform, weights_io
from mcore_rl.model.adapters import attach
from mcore_rl.model.fusions import fuse_weight_gradients
from mcore_rl.model.hf.adapters import PLACE, AdapterMap, random_adapters
from mcore_rl.model.hf.architecture import Architecture, read_architecture
from mcore_rl.model.hf.files import left_out, read_side_files
from mcore_rl.model.hf.parameters import CriticParameterMap, ParameterMap
from mcore_rl.model.hf.peft_files import adapter_reader
from mcore_rl.model.hf.torch_dist import holds_torch_dist
from mcore_rl.model.layouts import check_adapters, check_layout, check_layout_of, padded_vocab
from mcore_rl.model.policy import CriticModel, LogitsModel, PackedGPT, PolicyModel, with_value_head
from mcore_rl.model.rotary import rotary_frequencies
from mcore_rl.model.spec import block_spec, transformer_config
from mcore_rl.parallel.control import raise_everywhere
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.precision import DEFAULT_FP8, Fp8
from mcore_rl.terminal import printable
from mcore_rl.tuning import DEFAULT_TUNING, Tuning


@dataclass(frozen=True)
class Model:
    """A Megatron model on this rank: its chunks (one, or one per virtual pipeline stage) and its numbers."""

    chunks: tuple[torch.nn.Module, ...]
    """wrapped in Megatron's DDP when trainable"""
    unwrapped: tuple[PackedGPT, ...]
    config: TransformerConfig
    arch: Architecture
    mapping: ParameterMap
    mesh: Mesh
    source: Path
    """HF directory that config.json and the tokenizer came from"""
    files: Mapping[str, bytes]
    """on the main rank, name -> content of what lies there beside weights, as it was then"""
    adapters: AdapterMap | None = None
    """the table of what is trained, where the model's own weights are frozen beside it"""

    def gather(self) -> None:
        """Wait until every rank has the weights of the last update, where they are gathered beside the work.

        Before anything but the next forward pass reads them; collective.
        """
        for chunk in self.gathered_beside:
            gather_no_more(chunk)
            with torch.no_grad():
                chunk.start_param_sync(force_sync=True)

    @property
    def gathered_beside(self) -> list[DistributedDataParallel]:
        """The chunks whose weights are gathered beside the forward pass that follows an update."""
        trained = [chunk for chunk in self.chunks if isinstance(chunk, DistributedDataParallel)]
        return [chunk for chunk in trained if chunk.ddp_config.overlap_param_gather]


def build_policy(
    path: Path,
    mesh: Mesh,
    *,
    precision: str = "fp32",
    fp8: Fp8 = DEFAULT_FP8,
    random_seed: int | None = None,
    tuning: Tuning = DEFAULT_TUNING,
    ddp: DistributedDataParallelConfig | None = None,
    lora: Lora | None = None,
) -> Model:
    """Build the model of the HF directory `path` at `mesh`'s layout and load its weights.

    Args:
        precision: a key of spec.DTYPES; bf16 and fp8 take Transformer Engine's layers where it can run.
        fp8: what of FP8 is chosen, at that precision.
        random_seed: start from random weights of this seed instead of the directory's.
        tuning: what of time is traded for memory.
        ddp: wrap for training; None for a frozen model (reference).
        lora: train adapters beside the weights, which stay as they are.

    Raises:
        ConfigError: the directory does not hold a supported model, or FP8 cannot run here.
        LayoutError: it does not divide by the layout.
    """
    arch, rows, read = _read(path, mesh, random_seed)
    kind = partial(PolicyModel, live_vocab=arch.vocab, share_embeddings_and_output_weights=arch.tied)
    config = transformer_config(arch, mesh.layout, precision, tuning, fp8)
    return _build(kind, config, ParameterMap(arch, rows), read, mesh, ddp, path, lora)


def build_logits(
    path: Path, mesh: Mesh, *, precision: str = "fp32", weights: Path | None = None, lora: Lora | None = None
) -> Model:
    """A frozen policy whose last stage answers with whole logits [R, V]: to compare models.

    Args:
        weights: directory of the weights, where it is not that of config.json.
        lora: adapters beside them.
    """
    arch, rows, read = _read(path, mesh, None, weights)
    kind = partial(LogitsModel, live_vocab=arch.vocab, share_embeddings_and_output_weights=arch.tied)
    config = transformer_config(arch, mesh.layout, precision)
    return _build(kind, config, ParameterMap(arch, rows), read, mesh, None, path, lora)


def build_critic(
    path: Path,
    mesh: Mesh,
    *,
    precision: str = "fp32",
    fp8: Fp8 = DEFAULT_FP8,
    random_seed: int | None = None,
    tuning: Tuning = DEFAULT_TUNING,
    ddp: DistributedDataParallelConfig | None = None,
) -> Model:
    """The backbone and weights of `build_policy`, the embedding untied, under a value head.

    The head starts at 0, and so does every value; with `random_seed` it is random like the other weights.
    """
    arch, rows, read = _read(path, mesh, random_seed)
    read = with_value_head(read, arch, random_seed)
    config = transformer_config(arch, mesh.layout, precision, tuning, fp8)
    return _build(CriticModel, config, CriticParameterMap(arch, rows), read, mesh, ddp, path)


def build_classifier(
    path: Path,
    mesh: Mesh,
    key: str,
    *,
    precision: str = "fp32",
    fp8: Fp8 = DEFAULT_FP8,
    tuning: Tuning = DEFAULT_TUNING,
    ddp: DistributedDataParallelConfig | None = None,
) -> Model:
    """The sequence classifier of the HF directory `path`: one label, `score.weight` [1, H], no bias.

    Its value of a row is the score of the tokens up to there. It is a reward model, or a critic's start.
    Raises ConfigError, LayoutError as `build_policy`, whose other arguments it has.

    Args:
        key: of the config, which names it, for errors.
    """
    platform.install()
    arch = read_architecture(path)
    check_layout_of(arch, mesh.layout, key)
    mapping = CriticParameterMap(arch, padded_vocab(arch, mesh.layout.tensor))
    config = transformer_config(arch, mesh.layout, precision, tuning, fp8)
    return _build(CriticModel, config, mapping, weights_io.reader(path, mapping), mesh, ddp, path)


def _read(
    path: Path, mesh: Mesh, random_seed: int | None, weights: Path | None = None
) -> tuple[Architecture, int, Callable[[str], Tensor]]:
    """The checked architecture of `path`, its padded vocabulary, and a reader of its HF tensors."""
    platform.install()
    arch = read_architecture(path)
    check_layout(arch, mesh.layout)
    rows = padded_vocab(arch, mesh.layout.tensor)
    mapping = ParameterMap(arch, rows)
    if random_seed is None:
        if mesh.is_main:
            _warn_of_left_out(Path(weights or path), arch)
        return arch, rows, weights_io.reader(weights or path, mapping)
    return arch, rows, weights_io.random_reader(mapping, random_seed)


def _build(
    kind: Callable[..., PackedGPT],
    config: TransformerConfig,
    mapping: ParameterMap,
    read: Callable[[str], Tensor],
    mesh: Mesh,
    ddp: DistributedDataParallelConfig | None,
    source: Path,
    lora: Lora | None = None,
) -> Model:
    adapters = None
    if lora is not None:
        check_adapters(mapping.arch, mesh.layout, lora)
        adapters = AdapterMap(mapping.arch, lora)
        if "experts" in lora.targets:  # one grouped layer has no place for an adapter of each expert
            config.moe_grouped_gemm = False
    for embedding in (RotaryEmbedding, YarnRotaryEmbedding):
        embedding.forward.cache_clear()  # its keys refer to the groups of models that are gone
    model_parallel_cuda_manual_seed(0)  # Megatron's RNG tracker, forked even where dropout is 0
    stages = range(mesh.layout.virtual_pipeline or 1)
    build = partial(_build_chunk, kind, mapping, config, mesh, adapted=adapters is not None)
    unwrapped = tuple(build(stage) for stage in stages)
    weights_io.load(unwrapped, mapping, mesh, read)
    if adapters is not None:
        _adapt(unwrapped, adapters, mesh)
    wrapped = tuple(_in_bf16(config, chunk) for chunk in unwrapped) if config.bf16 else unwrapped
    if ddp is None:
        for chunk in unwrapped:
            chunk.requires_grad_(False).eval()
    else:
        wrapped = _in_ddp(config, ddp, wrapped, adapted=adapters is not None)
    files = read_side_files(Path(source)) if mesh.is_main else {}
    return Model(wrapped, unwrapped, config, mapping.arch, mapping, mesh, Path(source), files, adapters)


def _in_ddp(
    config: TransformerConfig,
    ddp: DistributedDataParallelConfig,
    chunks: tuple[torch.nn.Module, ...],
    *,
    adapted: bool,
) -> tuple[TrainedChunk, ...]:
    """The chunks in Megatron's DDP, connected to its schedules.

    A hook before each forward pass of a module waits for its weights. Those of adapters lie in dictionaries,
    which nobody calls: they would be used before they are there. So they are gathered right after an update.
    """
    if adapted:
        ddp = replace(ddp, overlap_param_gather=False)
    for chunk in chunks:
        fuse_weight_gradients(chunk)
    wrapped = tuple(
        TrainedChunk(config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
    )
    connect_schedule(config, ddp, wrapped)
    if ddp.overlap_param_gather:
        for chunk in wrapped:
            gather_no_more(chunk)
    return wrapped


def gather_no_more(chunk: DistributedDataParallel) -> None:
    """Forward passes of `chunk` gather no weights until an update has changed them.

    Megatron gathers before every first forward pass after gradients were zeroed, and what went wrong on one
    rank would be sent to all others before anybody has looked at it.
    """
    if chunk.remove_forward_pre_hook_handles:
        chunk.disable_forward_pre_hook(param_sync=False)


def _adapt(chunks: tuple[PackedGPT, ...], adapters: AdapterMap, mesh: Mesh) -> None:
    """Freeze the weights, and give the chunks adapters to train.

    Raises:
        LayoutError: on every rank, where one of them would have nothing to train.
    """
    path = adapters.lora.path
    attach(
        chunks, adapters, mesh, random_adapters(adapters) if path is None else adapter_reader(adapters, path)
    )
    empty = []
    for chunk in chunks:
        chunk.adapted = True
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(PLACE in name)
        empty += [chunk] if not any(p.requires_grad for p in chunk.parameters()) else []
    error = LayoutError(
        f"lora.targets = {list(adapters.lora.targets)}: the layers of a pipeline stage have none of these; "
        "add one that every layer has, such as 'qkv', or cut the layers into fewer stages"
    )
    raise_everywhere(mesh, error if empty else None)


@cache
def _warn_of_left_out(source: Path, arch: Architecture) -> None:
    """Say once in a process which tensors of a source no model has."""
    if arch.predicting_layers and not holds_torch_dist(source) and (later := left_out(source, arch)):
        print(printable(f"warning: {later}"), file=sys.stderr, flush=True)


class TrainedChunk(DistributedDataParallel):
    """Megatron's wrapper, whose memory and groups are given back when nothing refers to it.

    Megatron's hook on a gradient accumulator refers to the wrapper. Where a module keeps an activation (the
    dispatcher of experts does), the accumulator is held by the graph, and the garbage collector cannot see
    that the graph is held by the wrapper alone.
    """

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        return DistributedDataParallel._make_backward_post_hook(
            cast(DistributedDataParallel, weakref.proxy(self)), param
        )


def _in_bf16(config: TransformerConfig, chunk: PackedGPT) -> Float16Module:
    biases = {name: b.clone() for name, b in chunk.named_buffers() if name.endswith(weights_io.ROUTER_BIAS)}
    wrapped = Float16Module(config, chunk)
    for name, bias in biases.items():  # chosen by; Megatron's router keeps it in float32, but rounded
        chunk.get_submodule(name.rpartition(".")[0]).expert_bias = bias
    if isinstance(chunk, CriticModel) and chunk.post_process:
        chunk.value_head.float()  # Float16Module casts everything
    return wrapped


def connect_schedule(config: TransformerConfig, ddp: DistributedDataParallelConfig, chunks) -> None:
    """Tell Megatron's schedules how to reduce gradients; without the first line none is ever reduced."""
    config.finalize_model_grads_func = finalize_model_grads
    if len(chunks) == 1:
        config.no_sync_func = chunks[0].no_sync
        return
    # Lists are what Megatron's interleaved schedule takes, whatever its annotations say.
    config.no_sync_func = [chunk.no_sync for chunk in chunks]  # type: ignore[assignment]
    if ddp.overlap_grad_reduce:
        config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]  # type: ignore[assignment]


def _build_chunk(
    kind: Callable[..., PackedGPT],
    mapping: ParameterMap,
    config: TransformerConfig,
    mesh: Mesh,
    stage: int,
    *,
    adapted: bool,
) -> PackedGPT:
    """One model chunk: the layers that this pipeline rank and virtual stage own."""
    virtual = mesh.layout.virtual_pipeline
    last = (virtual or 1) - 1
    model = kind(
        config=config,
        transformer_layer_spec=block_spec(
            config, mapping.arch, vp_stage=stage if virtual else None, fused=not adapted
        ),
        vocab_size=mapping.vocab_rows,
        max_sequence_length=1 << 20,  # rotary positions have no table of this size; Megatron only stores it
        pre_process=mesh.pp_rank == 0 and stage == 0,
        post_process=mesh.is_last_stage and stage == last,
        position_embedding_type="rope",
        parallel_output=True,
        vp_stage=stage if virtual else None,
    )
    model.arch, model.longest = mapping.arch, mapping.arch.longest
    if mapping.arch.latent is not None:  # Megatron has a table in every layer then
        model.rotary_pos_emb = RotaryEmbedding(
            mapping.arch.latent.turned,
            rotary_percent=1.0,
            rotary_interleaved=mapping.arch.rotary.interleaved,
            use_cpu_initialization=config.use_cpu_initialization,
        )
    model.rotary_pos_emb.inv_freq = rotary_frequencies(mapping.arch.rotary).to(platform.device())
    if mapping.arch.local_rotary is not None:
        model.local_frequencies = rotary_frequencies(mapping.arch.local_rotary).to(platform.device())
    return model.to(platform.device())
