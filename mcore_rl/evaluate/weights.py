"""Which weights are evaluated, and the Hugging Face directory that a server can load."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from mcore_rl.checkpoint import committed, find, manifest
from mcore_rl.checkpoint.manifest import COMMITTED, MANIFEST
from mcore_rl.config import Config
from mcore_rl.convert.command import mcore_to_hf, merge
from mcore_rl.directories import is_ours
from mcore_rl.errors import ConfigError
from mcore_rl.training.rundir import published_to, root_of

_MODEL_FILES = "*.safetensors"
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Weights:
    """The weights of one evaluation."""

    path: Path
    is_checkpoint: bool
    """a training checkpoint or an adapter, which is converted first; else a Hugging Face directory"""
    step: int | None
    """after which they were written, where that is known"""

    @property
    def label(self) -> str:
        """The name of the evaluation's directory."""
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", self.path.resolve().name).lstrip(".") or "model"
        return name if self.step is None else f"step_{self.step}"

    def identity(self) -> str:
        """What tells them from other weights that lie there later."""
        if (self.path / COMMITTED).is_file():
            return (self.path / COMMITTED).read_text().strip()
        files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in self.path.glob(_MODEL_FILES))
        return hashlib.sha256(repr(files).encode()).hexdigest()

    def as_hf(self, config: Config, directory: Path) -> Path:
        """A Hugging Face directory of them: itself, or `directory`, to which a checkpoint is converted.

        Raises:
            ConfigError, CheckpointError: as `mcore-rl convert mcore-to-hf`, or `merge` for adapters.
        """
        if not self.is_checkpoint:
            return self.path
        if not (directory / MANIFEST).is_file():  # else a conversion of an earlier attempt, which is whole
            if config.lora.rank or _is_adapter(self.path):
                merge(self.path, directory, model=config.model.path)
            else:
                mcore_to_hf(self.path, directory, config=config.model.path)
        return directory


def find_weights(config: Config, run_dir: Path | None, checkpoint: str | None) -> Weights:
    """The weights that `--checkpoint` names, else the newest of a run directory, else model.path.

    Args:
        run_dir: the run whose weights are meant; None for a config.
        checkpoint: `latest`, `previous`, a training checkpoint, an adapter or a Hugging Face directory.

    Raises:
        ConfigError: there are none.
        DamagedCheckpointError: the manifest of a checkpoint is not what was committed.
    """
    if checkpoint in ("latest", "previous"):
        return _saved(find(root_of(config), checkpoint).path)
    if checkpoint is not None:
        path = Path(checkpoint)
        if _is_hf(path) or _is_adapter(path):
            return Weights(path, not _is_hf(path), None)
        return _saved(path)
    if run_dir is None:
        if not _is_hf(config.model.path):
            raise ConfigError(f"model.path: {config.model.path} holds no weights; name some by --checkpoint")
        return Weights(config.model.path, False, None)
    found = _newest(config)
    if found is None:
        raise ConfigError(
            f"{run_dir} holds no weights: no checkpoint, no exported model, none that were published; name "
            "some with --checkpoint"
        )
    return found


def _saved(path: Path) -> Weights:
    return Weights(path, True, manifest.read(path).step)


def _newest(config: Config) -> Weights | None:
    """What supervised training exported, else the checkpoint or published weights of the last step."""
    exported, published = config.run.dir / "model", published_to(config)
    if is_ours(exported, "model") and _is_hf(exported):
        return Weights(exported, False, None)
    known = [(step, 0, path) for step, path in committed(root_of(config))]
    if published.is_dir():
        versions = [path for path in published.iterdir() if path.name.isdecimal()]
        versions = [path for path in versions if is_ours(path, "weights")]
        known += [(int(p.name), 1, p) for p in versions if _is_hf(p) or _is_adapter(p)]
    if not known:
        return None
    step, is_published, path = max(known)
    return Weights(path, not is_published or not _is_hf(path), step)


def _is_hf(path: Path) -> bool:
    return (path / "config.json").is_file() and any(path.glob(_MODEL_FILES))


def _is_adapter(path: Path) -> bool:
    return (path / ADAPTER).is_file()
