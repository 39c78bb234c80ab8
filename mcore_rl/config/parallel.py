"""The section of a configuration that says how ranks share the work."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mcore_rl.config.sections import Count, Section
from mcore_rl.tuning import DispatcherName


class ParallelConfig(Section):
    """Degrees of parallelism; their product with `data` is the number of processes."""

    tensor: Count = 1
    """Tensor-parallel size."""
    sequence: bool = False
    """Sequence parallel: split the activations between the tensor-parallel blocks too."""
    pipeline: Count = 1
    """Pipeline stages."""
    virtual_pipeline: Annotated[int, Field(ge=2)] | None = None
    """Model chunks per pipeline stage (interleaved schedule)."""
    context: Count = 1
    """Context-parallel size: one sequence over several ranks."""
    expert: Count = 1
    """Expert-parallel size of a mixture-of-experts model."""
    data: Count | None = None
    """Data-parallel replicas; unset, what the number of processes leaves."""
    dispatcher: DispatcherName = "alltoall"
    """How tokens reach the experts of other ranks: Megatron's all-to-all, or kernels of the package deep_ep
    (`deepep`, `hybridep`)."""
