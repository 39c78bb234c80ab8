"""The parallel layout: degrees and what they imply. It imports neither torch nor Megatron-Core."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import gcd
from typing import Any

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
