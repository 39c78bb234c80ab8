"""The Hugging Face directory that a run directory, or a path of a model, means."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcore_rl.errors import ConfigError


def check_target(target: Path) -> None:
    """Raises ConfigError for what is neither a run directory nor a model."""
    if not (target / "resolved.toml").is_file() and not (target / "config.json").is_file():
        raise ConfigError(
            f"{target} is neither a run directory (it has no resolved.toml) nor a Hugging Face model (it has "
            "no config.json); check the path"
        )


@contextmanager
def model_of(target: Path, checkpoint: str | None = None) -> Iterator[Path]:
    """A directory of safetensors, which a checkpoint is converted to for as long as the block lasts.

    Args:
        target: a Hugging Face directory, or a run directory, whose newest weights are meant.
        checkpoint: other weights of the run: `latest`, `previous`, or the path of a checkpoint.

    Raises:
        ConfigError: it is neither, or there are no such weights.
        DamagedCheckpointError: the manifest of the checkpoint is not what was committed.
    """
    resolved = target / "resolved.toml"
    if not resolved.is_file():
        if checkpoint is not None:
            raise ConfigError(f"--checkpoint: {target} is no run directory (it has no resolved.toml)")
        check_target(target)
        yield target
        return
    from mcore_rl.config import load_config
    from mcore_rl.evaluate.weights import find_weights

    config = load_config(resolved, [f"--run.dir={json.dumps(str(target))}"])  # it may have been moved
    weights = find_weights(config, target, checkpoint)
    with tempfile.TemporaryDirectory(prefix="mcore_rl_model_") as scratch:
        yield weights.as_hf(config, Path(scratch) / "model")
