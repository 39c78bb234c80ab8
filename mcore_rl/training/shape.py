"""The numbers of a model directory that the FLOPs of its passes depend on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mcore_rl.data.balance import ModelShape, model_shape
from mcore_rl.model.hf.architecture import architecture_of, read_hf_config


def shape_of(path: Path) -> ModelShape:
    """Those of config.json in `path`, sliding windows among them. Raises as `read_architecture`."""
    hf = read_hf_config(path)
    windows = architecture_of(hf, str(Path(path) / "config.json")).windows
    return replace(model_shape(hf), window=windows.size, windowed=sum(windows.layers))
