"""The gradient-scale probe on this machine's Megatron-Core: two data-parallel processes, a tiny model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mcore_rl.doctor.finding import Finding
from mcore_rl.model.build import build_policy
from mcore_rl.model.optimizer import ddp_config
from mcore_rl.model.probe import check_gradient_scale
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import build_mesh, destroy_mesh
from mcore_rl.parallel.pool import Pool

SECONDS = 120.0
"""until both processes have answered, their start included"""

_TINY = {
    "model_type": "qwen3",
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def check_gradient(distributed: bool) -> Iterable[Finding]:
    """That a known gradient arrives unscaled through schedule, DDP and reduction (model/probe.py)."""
    with tempfile.TemporaryDirectory() as directory, Pool(2, start_timeout=SECONDS) as pool:
        (Path(directory) / "config.json").write_text(json.dumps(_TINY))
        pool.run(_probe, Path(directory), distributed, timeout=SECONDS)
    yield Finding("gradient scale", "ok", "a known gradient arrives unscaled from two data-parallel ranks")


def _probe(model: Path, distributed: bool) -> None:
    mesh = build_mesh(Layout(data=2), timeout=SECONDS)
    try:
        check_gradient_scale(
            build_policy(model, mesh, random_seed=0, ddp=ddp_config(distributed=distributed))
        )
    finally:
        destroy_mesh()
