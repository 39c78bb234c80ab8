"""A conversion's certificate: transformers and Megatron on the same tokens, logit by logit, in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mcore_rl.data.packing import TokenSequence
from mcore_rl.errors import NumericsError
from mcore_rl.kindred import known_config
from mcore_rl.lora import Lora
from mcore_rl.model import platform
from mcore_rl.model.build import build_logits
from mcore_rl.model.hf.architecture import read_architecture, read_hf_config
from mcore_rl.model.step import forward
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import build_mesh, destroy_mesh
from mcore_rl.parallel.pool import spawn
from mcore_rl.training.batch import Batching, align_of, pack_share

LENGTHS = (64, 33, 17, 2)
"""tokens per sequence"""
LIMIT = 1e-3
"""the largest difference, relative to the largest logit: float32 noise is hundred times smaller, a wrong
weight or rotary table a hundred times larger"""
DEADLINE = 3600.0
"""seconds for Megatron's side"""


@dataclass(frozen=True)
class Certificate:
    """What was compared and how far apart it was."""

    max_abs_logit_difference: float
    max_abs_logit: float
    tokens: int
    precision: str


def certify(hf: Path, megatron: Path, *, config: Path | None = None, lora: Lora | None = None) -> Certificate:
    """Compare the HF directory `hf` with the directory `megatron`, which Megatron's side reads.

    Args:
        config: where config.json of `megatron` is, if not beside it.
        lora: adapters that Megatron's side has beside its weights.

    Raises:
        NumericsError: they are not the same function.
    """
    rows = _tokens(hf)
    expected = _by_transformers(hf, rows)
    (got,) = spawn(_by_megatron, 1, Path(config or megatron), Path(megatron), rows, lora, timeout=DEADLINE)
    scale, difference = float(expected.abs().max()), float((torch.from_numpy(got) - expected).abs().max())
    if not difference <= LIMIT * scale:
        raise NumericsError(
            f"{hf} and {megatron} differ by {difference:.3g} in a logit (the largest is {scale:.3g}): not "
            "the same model; convert again"
        )
    return Certificate(difference, scale, sum(LENGTHS), "fp32")


def _tokens(directory: Path) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(read_architecture(directory).vocab, size=length).tolist() for length in LENGTHS]


def _by_transformers(directory: Path, rows: list[list[int]]) -> Tensor:
    """[tokens but each sequence's last, vocabulary]"""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    known = known_config(read_hf_config(directory))
    model = AutoModelForCausalLM.from_pretrained(
        directory, **known, dtype=torch.float32, trust_remote_code=False
    )
    torch.nn.Module.to(model, platform.device())  # transformers annotates its own `to` wrongly
    with torch.no_grad():
        logits = [model(torch.tensor([row], device=model.device)).logits[0, :-1] for row in rows]
    return torch.cat(logits).cpu()


def _by_megatron(config: Path, directory: Path, rows: list[list[int]], lora: Lora | None) -> np.ndarray:
    """The same, in a process of its own: its parallel state is nobody else's."""
    platform.install()
    mesh = build_mesh(Layout(), timeout=DEADLINE)
    try:
        model = build_logits(config, mesh, weights=directory, lora=lora)
        shape = Batching(1, sum(LENGTHS), max(LENGTHS), lambda n: np.asarray(n, float), align_of(mesh))
        sequences = [TokenSequence(row[:1], row[1:]) for row in rows]
        starts = np.cumsum([0, *LENGTHS[:-1]]) - np.arange(len(LENGTHS))
        number = [start + np.arange(len(row) - 1.0) for start, row in zip(starts, rows, strict=True)]
        scored = forward(model, pack_share(sequences, {"number": number}, shape, mesh), 1.0)
        order = np.argsort(np.concatenate([packed.fields["number"].cpu().numpy() for packed, _ in scored]))
        return np.concatenate([logits.float().cpu().numpy() for _, logits in scored])[order]
    finally:
        destroy_mesh()
