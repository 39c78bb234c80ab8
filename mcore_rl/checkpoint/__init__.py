"""Training checkpoints: sharded, committed whole, read back at any layout."""

from mcore_rl import before_megatron as before_megatron
from mcore_rl.checkpoint.checkpoints import Checkpoints
from mcore_rl.checkpoint.directory import committed, find
from mcore_rl.checkpoint.fp8 import fp8_pieces
from mcore_rl.checkpoint.manifest import Saved
from mcore_rl.checkpoint.pieces import count_updates, model_pieces, optimizer_pieces, set_updates
from mcore_rl.checkpoint.rng import seed_rng

__all__ = [
    "Checkpoints",
    "Saved",
    "committed",
    "count_updates",
    "find",
    "fp8_pieces",
    "model_pieces",
    "optimizer_pieces",
    "seed_rng",
    "set_updates",
]
