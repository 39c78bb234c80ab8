"""mcore_rl: reinforcement learning for large language models on Megatron-Core.

The names below are the public ones. They are imported when they are first used, so that `import mcore_rl` is
instant and `from mcore_rl import load_config` loads no Megatron-Core.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcore_rl.algo.rows import TokenLoss
    from mcore_rl.config import Config, load_config
    from mcore_rl.errors import (
        BlockedLoopError,
        ChangedFileError,
        CheckpointError,
        ConfigError,
        DamagedCheckpointError,
        DataError,
        LayoutError,
        MalformedRowError,
        McoreRLError,
        MismatchError,
        NoSignalError,
        NothingToDo,
        NumericsError,
        PreemptedError,
        RendezvousError,
        ResourceError,
        RewardError,
        RolloutError,
        StorageError,
        WeightSyncError,
    )
    from mcore_rl.rewards import RewardFn
    from mcore_rl.training.loop import train
    from mcore_rl.types import Group, Prompt, Sample, Segment

__version__ = "0.1.0"

__all__ = [
    "BlockedLoopError",
    "ChangedFileError",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DamagedCheckpointError",
    "DataError",
    "Group",
    "LayoutError",
    "MalformedRowError",
    "McoreRLError",
    "MismatchError",
    "NoSignalError",
    "NothingToDo",
    "NumericsError",
    "PreemptedError",
    "Prompt",
    "RendezvousError",
    "ResourceError",
    "RewardError",
    "RewardFn",
    "RolloutError",
    "Sample",
    "Segment",
    "StorageError",
    "TokenLoss",
    "WeightSyncError",
    "load_config",
    "train",
]

_HOME = {
    "Config": "mcore_rl.config",
    "load_config": "mcore_rl.config",
    "TokenLoss": "mcore_rl.algo.rows",
    "RewardFn": "mcore_rl.rewards",
    "train": "mcore_rl.training.loop",
    "Group": "mcore_rl.types",
    "Prompt": "mcore_rl.types",
    "Sample": "mcore_rl.types",
    "Segment": "mcore_rl.types",
}
"""public name -> module; every other one is in mcore_rl.errors"""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mcore_rl' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "mcore_rl.errors")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
