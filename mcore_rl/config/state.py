"""The sections of a run's state: what leaves the GPU while it is not used, and what is saved."""

from __future__ import annotations

from typing import Literal

from mcore_rl.config.sections import Count, FilePath, NonNegative, Positive, Section


class ResidencyConfig(Section):
    """What leaves the GPU while it is not used. It waits in host memory; the servers' memory is freed."""

    reference: Literal["resident", "offloaded", "swapped", "kept"] = "resident"
    """`swapped`: no second model; for scoring, the policy takes its first weights back. `kept`, in preference
    training: no second model; what it says of all rows is computed once, at the start."""
    critic: Literal["resident", "offloaded"] = "resident"
    """Its weights and gradients, outside of its own scoring and updates."""
    reward_model: Literal["resident", "offloaded"] = "resident"
    """Its weights, outside of scoring."""
    teacher: Literal["resident", "offloaded"] = "resident"
    """The weights of all teachers, outside of their passes; their output layers stay."""
    optimizer: Literal["resident", "offloaded"] = "resident"
    """Adam's moments and fp32 weights, of policy and critic, outside of their updates."""
    servers: Literal["resident", "released"] = "resident"
    """SGLang's weights and KV cache on the trainer's own GPUs; released, they leave it during training."""


class CheckpointConfig(Section):
    """The whole state of the run, saved to resume from."""

    dir: FilePath | None = None
    """Where; unset, `checkpoints` in the run directory."""
    every: NonNegative | None = None
    """Steps between checkpoints, the last step included; unset, `minutes` say when; 0 saves none."""
    minutes: Positive = 30.0
    """Minutes between checkpoints where `every` is unset; the last step is saved as well."""
    keep: Count = 2
    """Newest checkpoints that stay; with 2, `--resume previous` has one to go back to."""
    background: bool = True
    """Write while training goes on, from a copy in host memory; false waits for the disk."""

    @property
    def saves(self) -> bool:
        """The run keeps checkpoints."""
        return self.every != 0
