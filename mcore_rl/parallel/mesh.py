"""The parallel layout and its process groups; the only file that sets Megatron's parallel_state."""

from __future__ import annotations

import gc
import re
from dataclasses import dataclass
from datetime import timedelta
from math import gcd
from typing import Any, cast

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d

from mcore_rl.errors import LayoutError
from mcore_rl.terminal import quoted


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; `tensor * pipeline * context * data` ranks in all."""

    tensor: int = 1
    sequence: bool = False
    """shard activations between tensor-parallel regions along the sequence"""
    pipeline: int = 1
    virtual_pipeline: int | None = None
    """model chunks per pipeline stage"""
    context: int = 1
    expert: int = 1
    """expert-parallel degree; divides tensor * context * data, adds no ranks"""
    data: int = 1

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def expert_data(self) -> int:
        """Ranks of a pipeline stage that hold the same experts."""
        return self.tensor * self.context * self.data // self.expert

    @property
    def copies(self) -> int:
        """Complete copies of the model, which no rank shares with another: as many sets of `Mesh.copy`."""
        return gcd(self.data, self.expert_data)

    @classmethod
    def parse(cls, text: str) -> Layout:
        """`tp2+sp`, `tp2pp2`, `pp2+vpp2`, `dp2`: `(tp|pp|vpp|cp|ep|dp)N` joined, `+` optional, `sp` bare.

        Expert parallelism rides on the data-parallel ranks: `ep2` alone needs two of them.
        Raises LayoutError for anything else.
        """
        names = {
            "tp": "tensor",
            "pp": "pipeline",
            "vpp": "virtual_pipeline",
            "cp": "context",
            "ep": "expert",
            "dp": "data",
        }
        fields: dict[str, Any] = {}
        rest = text
        while rest or not fields:
            match = re.match(r"\+?(?:(sp)(?!\d)|(tp|vpp|pp|cp|ep|dp)([1-9]\d*))", rest)
            key = ("sequence" if match[1] else names[match[2]]) if match else ""
            if not match or key in fields:
                raise LayoutError(
                    f"layout {quoted(text)}: cannot read {quoted(rest)}; write it like tp2+sp, tp2pp2cp2 or "
                    "pp2+vpp2"
                )
            fields[key] = True if match[1] else int(match[3])
            rest = rest[match.end() :]
        if "expert" in fields and "data" not in fields:
            inner = int(fields.get("tensor", 1)) * int(fields.get("context", 1))
            fields["data"] = max(1, int(fields["expert"]) // inner)
        if fields.get("tensor", 1) != 1 and "expert" in fields:
            fields["sequence"] = True  # Megatron: MoE with tensor parallelism needs sequence parallelism
        layout = cls(**fields)
        layout.check()
        return layout

    def check(self, world_size: int | None = None) -> None:
        """Raise LayoutError for a contradiction that no model could satisfy."""
        if self.sequence and self.tensor == 1:
            raise LayoutError(
                "sequence parallelism needs tensor parallelism: set parallel.tensor above 1 or drop it"
            )
        if self.virtual_pipeline is not None and self.pipeline == 1:
            raise LayoutError("virtual pipeline stages need parallel.pipeline above 1")
        if (self.tensor * self.context * self.data) % self.expert:
            raise LayoutError(
                f"expert parallelism {self.expert} must divide tensor x context x data = "
                f"{self.tensor * self.context * self.data}"
            )
        if world_size is not None and world_size != self.world_size:
            raise LayoutError(
                f"layout {self} needs {self.world_size} processes, {world_size} are running; "
                f"launch with --nproc-per-node {self.world_size} or change [parallel]"
            )

    def __str__(self) -> str:
        degrees = {"tp": self.tensor, "pp": self.pipeline, "vpp": self.virtual_pipeline or 1}
        degrees |= {"cp": self.context, "ep": self.expert, "dp": self.data}
        text = "".join(f"{name}{degree}" for name, degree in degrees.items() if degree > 1)
        return (text or "1rank") + ("+sp" if self.sequence else "")


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
