"""The process groups of a layout; the only file that sets Megatron's parallel_state."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d

from mcore_rl.parallel.layout import Layout


@dataclass(frozen=True)
class Mesh:
    """This rank's coordinates and groups.

    `tp`, `cp`, `pp` move tensors (NCCL on CUDA); `replica`, `data` and `world` are gloo groups for control:
    they carry Python objects and float64 statistics.
    """

    layout: Layout
    rank: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int
    expert_dp_rank: int
    """which copy of its experts this rank holds; 0 where it is the first"""
    tp: dist.ProcessGroup
    cp: dist.ProcessGroup
    pp: dist.ProcessGroup
    replica: dist.ProcessGroup
    """all ranks that hold one copy of the model: equal data-parallel index"""
    data: dist.ProcessGroup
    """the same model shard in every replica"""
    world: dist.ProcessGroup

    @property
    def copy(self) -> int:
        """Which of the layout's copies of the model this rank holds a part of."""
        return self.dp_rank * self.layout.copies // self.layout.data

    @property
    def is_last_stage(self) -> bool:
        """True where the head and the loss live."""
        return self.pp_rank == self.layout.pipeline - 1

    @property
    def is_replica_lead(self) -> bool:
        """True on the one rank of a replica that talks to the servers."""
        return self.tp_rank == self.pp_rank == self.cp_rank == 0

    @property
    def is_main(self) -> bool:
        """True on the one rank that logs and writes."""
        return self.rank == 0

    @property
    def owns_metrics(self) -> bool:
        """True on the ranks whose loss sums are counted: the last stage, once per tensor-parallel group."""
        return self.is_last_stage and self.tp_rank == 0


def build_mesh(layout: Layout, *, timeout: float = 600.0) -> Mesh:
    """Initialise Megatron's parallel state for `layout`; torch.distributed must be initialised.

    Args:
        timeout: seconds after which a collective that not all ranks reached fails.

    Raises:
        LayoutError: the layout does not fit the world size.
    """
    layout.check(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,  # an expert is never cut: gloo cannot gather uneven token counts
        distributed_timeout_minutes=max(1, round(timeout / 60)),
    )
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    pp_rank = parallel_state.get_pipeline_model_parallel_rank()
    cp_rank = parallel_state.get_context_parallel_rank()
    dp_rank = parallel_state.get_data_parallel_rank()
    return Mesh(
        layout=layout,
        rank=dist.get_rank(),
        tp_rank=tp_rank,
        pp_rank=pp_rank,
        cp_rank=cp_rank,
        dp_rank=dp_rank,
        expert_dp_rank=parallel_state.get_expert_data_parallel_rank(),
        tp=cast(dist.ProcessGroup, parallel_state.get_tensor_model_parallel_group()),
        cp=cast(dist.ProcessGroup, parallel_state.get_context_parallel_group()),
        pp=cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group()),
        replica=_gloo_group((dp_rank,), timeout),
        data=_gloo_group((tp_rank, pp_rank, cp_rank), timeout),
        world=_gloo_group((), timeout),
    )


def destroy_mesh() -> None:
    """Close every group but the world's, so that another layout can be built in the same processes.

    Megatron only forgets its groups; each would keep its connections and threads until the process ends.
    """
    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()  # models refer to groups in cycles, and a gloo group ends when nothing refers to it


def _gloo_group(key: tuple[int, ...], timeout: float) -> dist.ProcessGroup:
    """The gloo group of all ranks that pass an equal key; collective over the world."""
    keys: list[tuple[int, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(keys, key)
    groups = {}
    for other in sorted(set(keys)):  # every rank creates every group, in the same order
        ranks = [rank for rank, its in enumerate(keys) if its == other]
        groups[other] = dist.new_group(ranks, backend="gloo", timeout=timedelta(seconds=timeout))
    return groups[key]
