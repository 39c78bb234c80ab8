"""The adapters of a model to files in PEFT's format, from any layout."""

from __future__ import annotations

import shutil
from pathlib import Path

from mcore_rl import directories
from mcore_rl.model.adapters import adapter_parameters
from mcore_rl.model.build import Model
from mcore_rl.model.hf.peft_files import write_adapter
from mcore_rl.parallel.control import gather_ranks, on_main
from mcore_rl.weights.buckets import gather

_REMEDY = "choose another directory, or move its files away"


def export_adapter(model: Model, directory: Path, *, base: str) -> None:
    """Write the adapters of `model` to `directory`; collective over all ranks.

    The directory appears complete or not at all, and replaces one that an earlier call wrote. The whole
    adapter is in the main rank's host memory meanwhile: PEFT has one file.

    Args:
        base: what the file calls the model that it is beside.

    Raises (on every rank):
        ConfigError: `directory` holds what no call of this wrote.
        StorageError: a file cannot be written.
    """
    adapters = model.adapters
    assert adapters is not None
    own = gather(adapter_parameters(model.unwrapped), adapters, model.mesh)
    ranks = gather_ranks(model.mesh, own)
    found = {name: tensor for rank in ranks for name, tensor in rank.items()}
    tensors = {name: found[name] for name in adapters.hf_shapes()}
    partial = directory.with_name(directory.name + ".partial")

    def write() -> None:
        directories.check_free(directory, _REMEDY, kind="adapter")
        directories.make(partial, _REMEDY, kind="adapter")
        write_adapter(adapters, tensors, partial, base=base)
        directories.remove(directory, _REMEDY, kind="adapter")
        partial.rename(directory)

    try:
        on_main(model.mesh, write)
    except Exception:
        if model.mesh.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
