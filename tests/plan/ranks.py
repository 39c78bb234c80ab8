"""Builds ranks of a layout one after the other in one process, without memory and without other processes.

Megatron's own models on the meta device, their groups made by torch's fake process group. A case is
MODEL_DIR=LAYOUT, or MODEL_DIR=LAYOUT:all, and has a list in the answer: where each rank stands and how many
parameters its policy and its critic have. `:all` builds every rank. Otherwise each expert-parallel rank of a
pipeline stage is built once, and the stage's last rank besides: tensor-parallel ranks differ in what they
hold, not in how much (Megatron refuses uneven cuts). The critic, whose layers are the policy's, is built on
every stage's last rank alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from mcore_rl.model import build, platform
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.parameters import CriticParameterMap, ParameterMap
from mcore_rl.model.layouts import padded_vocab
from mcore_rl.model.policy import CriticModel, PolicyModel
from mcore_rl.model.spec import transformer_config
from mcore_rl.model.weights_io import global_weights
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh


def built_ranks(directory: Path, layout: Layout, *, every: bool) -> Iterator[dict[str, Any]]:
    """Coordinates and parameters of each rank, and at last the whole model's, each tensor once."""
    arch = read_architecture(directory)
    mapping = ParameterMap(arch, padded_vocab(arch, layout.tensor))
    shards: dict[str, dict[int, int]] = {}
    seen: set[tuple[int, int, bool]] = set()
    for rank in range(layout.world_size):
        mesh, expert = _join(layout, rank)
        last = (mesh.tp_rank, expert) == (layout.tensor - 1, layout.expert - 1)
        where = (mesh.pp_rank, expert, last)
        if every or where not in seen:
            seen.add(where)
            with_critic = every or last
            policy, *critic = _build(mapping, mesh, with_critic=with_critic)
            for name, size in policy.items():
                shards.setdefault(name, {})[mesh.tp_rank] = size
            found = {"stage": mesh.pp_rank, "policy": _kinds(policy)}
            yield found | ({"critic": _kinds(critic[0])} if critic else {})
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    yield {"whole": sum(_whole(mapping, name, sizes, layout.tensor) for name, sizes in shards.items())}


def _join(layout: Layout, rank: int) -> tuple[Mesh, int]:
    """A mesh with what building a model reads of it, and the expert-parallel rank."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    groups: dict[str, Any] = dict.fromkeys(["tp", "cp", "pp", "replica", "data", "world"])
    mesh = Mesh(
        layout=layout,
        rank=rank,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
        **groups,
    )
    return mesh, parallel_state.get_expert_model_parallel_rank()


def _build(mapping: ParameterMap, mesh: Mesh, *, with_critic: bool) -> list[dict[str, int]]:
    """Numbers of parameters by global name: a policy's, and a critic's if asked for."""
    arch = mapping.arch
    config = transformer_config(arch, mesh.layout, "bf16")
    policy = partial(PolicyModel, live_vocab=arch.vocab, share_embeddings_and_output_weights=arch.tied)
    sizes = []
    models = [(policy, mapping), (CriticModel, CriticParameterMap(arch, mapping.vocab_rows))]
    for kind, table in models if with_critic else models[:1]:
        stages = range(mesh.layout.virtual_pipeline or 1)
        with torch.device("meta"):
            chunks = [
                build._build_chunk(cast(Any, kind), table, config, mesh, stage, adapted=False)
                for stage in stages
            ]
        sizes.append({name: prod(p.shape) for name, p in global_weights(chunks).items()})
    return sizes


def _kinds(sizes: dict[str, int]) -> dict[str, int]:
    experts = sum(size for name, size in sizes.items() if ".local_experts." in name)
    return {"dense": sum(sizes.values()) - experts, "experts": experts}


def _whole(mapping: ParameterMap, name: str, sizes: dict[int, int], tensor: int) -> int:
    """Parameters of one tensor over the tensor-parallel ranks, less padding; a tied copy is none."""
    entry = mapping.entry(name)
    if mapping.arch.tied and name == "output_layer.weight":
        return 0
    (size,) = set(sizes.values())
    if entry.rule.axis is None:
        return size
    padding = (mapping.vocab_rows - mapping.arch.vocab) * mapping.arch.hidden
    return tensor * size - (padding if entry.rule.merge == "vocab" else 0)


def main(out: Path, cases: list[str]) -> None:
    """Writes the lists of all cases; for a process of its own, which can build nothing else afterwards."""
    platform.install()
    platform.device = lambda: torch.device("meta")  # where this process computes: nowhere
    answers = []
    for case in cases:
        directory, _, text = case.partition("=")
        layout, _, every = text.partition(":")
        answers.append(list(built_ranks(Path(directory), Layout.parse(layout), every=every == "all")))
    out.write_text(json.dumps(answers))
