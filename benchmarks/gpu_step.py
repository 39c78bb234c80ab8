"""Stages 2 and 3 of tools/gpu_check.sh: training steps of an 8-layer Llama-3-8B on one GPU, in bf16 and FP8.

    python -m benchmarks.gpu_step portable|engine [--rehearse] [--out benchmarks]

`portable` (stage 2) needs Megatron-Core alone and takes the portable layers; `engine` (stage 3) takes
Transformer Engine's, in bf16 and in FP8. A step is forward and backward of packed micro-batches, and Adam.
Tokens per second and the share of bf16's peak that the model's own FLOPs reach (MFU; 3 forward passes,
nothing for recomputation), by the GPU's data sheet and by a GEMM measured here; what Adam's state takes to
leave for pinned host memory and to come back. Writes OUT/gpu_step_KIND_DATE.json after every measurement.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_record import CUDA, DEVICE, MIB, Record, arguments, datasheet_flops, milliseconds
from mcore_rl.data.balance import forward_flops, model_shape
from mcore_rl.data.packing import TokenSequence, pack
from mcore_rl.errors import ConfigError
from mcore_rl.model import build, platform, spec
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.model.layouts import padded_vocab
from mcore_rl.model.optimizer import Optimizer, build_optimizer, ddp_config
from mcore_rl.model.policy import PolicyModel
from mcore_rl.model.precision import engine_is_importable
from mcore_rl.model.residency import Offloaded, state_of, storages
from mcore_rl.model.step import forward_backward
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh, build_mesh, destroy_mesh
from mcore_rl.training.supervised import NegativeLogLikelihood
from mcore_rl.types import PackedBatch

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass(frozen=True)
class Size:
    """What a step trains on."""

    config: dict[str, Any]
    lengths: tuple[int, ...]
    """tokens of the sequences of one micro-batch; prompts are a quarter of each"""
    micro_batches: int
    steps: int


FULL = Size(LLAMA, (4096, 3072, 2048, 2048, 1536, 1536, 1024, 1024), 2, 8)
REHEARSAL = Size(LLAMA | TINY, (48, 32, 16), 2, 2)


class Step:
    """A model with its optimizer and the micro-batches of one step."""

    def __init__(self, directory: Path, mesh: Mesh, precision: str, size: Size) -> None:
        arch = read_architecture(directory)
        mapping = ParameterMap(arch, padded_vocab(arch, 1))
        kind = partial(PolicyModel, live_vocab=arch.vocab, share_embeddings_and_output_weights=arch.tied)
        shapes = mapping.hf_shapes()

        def read(name: str) -> Tensor:  # drawn where they are used: 2.8e9 numbers take a CPU a minute
            shape = shapes[name]
            return (
                torch.ones(shape, device=DEVICE)
                if len(shape) == 1
                else 0.02 * torch.randn(shape, device=DEVICE)
            )

        config = spec.transformer_config(arch, mesh.layout, precision)
        self.model = build._build(kind, config, mapping, read, mesh, ddp_config(), directory)
        self.optimizer: Optimizer = build_optimizer(self.model, lr=1e-5, precision=precision)
        self.batches = [_batch(size, i) for i in range(size.micro_batches)]
        self.tokens = size.micro_batches * sum(size.lengths)
        lengths = np.array(size.lengths, float)
        scored = lengths - lengths // 4
        flops = forward_flops(lengths, model_shape(size.config), scored)
        self.flops = 3 * size.micro_batches * float(flops.sum())

    def __call__(self) -> float:
        """Train; the gradient norm."""
        self.optimizer.zero_grad()
        forward_backward(self.model, self.batches, NegativeLogLikelihood(), 1.0)
        return self.optimizer.step()


def _batch(size: Size, seed: int) -> PackedBatch:
    rng = np.random.default_rng(seed)
    vocab = size.config["vocab_size"]
    sequences = [
        TokenSequence(
            rng.integers(vocab, size=n // 4).tolist(), rng.integers(vocab, size=n - n // 4).tolist()
        )
        for n in size.lengths
    ]
    weight = [1.0 / (size.micro_batches * sum(one.scored for one in sequences))] * len(sequences)
    return pack(sequences, range(len(sequences)), {"weight": weight}, align=16)


def measured(record: Record, name: str, directory: Path, mesh: Mesh, precision: str, size: Size) -> None:
    """One precision: its steps, and Adam's state on its way to host memory and back."""
    if record.measure(f"{name} parameters", lambda: _built(directory, mesh, precision, size)) is None:
        return
    step = _BUILT.pop()
    record.measure(f"{name} step", lambda: _steps(step, size))
    record.measure(f"{name} copies", lambda: _copies(step))
    del step
    gc.collect()  # the next precision wants the memory
    if CUDA:
        torch.cuda.empty_cache()


_BUILT: list[Step] = []
"""what `_built` has built: a record holds numbers alone"""


def _built(directory: Path, mesh: Mesh, precision: str, size: Size) -> int:
    _BUILT[:] = [Step(directory, mesh, precision, size)]
    return sum(p.numel() for chunk in _BUILT[0].model.unwrapped for p in chunk.parameters())


def _steps(step: Step, size: Size) -> dict[str, Any]:
    step()  # kernels are chosen, workspaces are made
    norm = step()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    times = [milliseconds(step) for _ in range(size.steps)]
    seconds = median(times) / 1e3
    rate, peak = _gemm_flops(), datasheet_flops()
    return {
        "layers": sorted({type(m).__name__ for m in step.model.unwrapped[0].modules()}),
        "ms": round(1e3 * seconds, 2),
        "tokens_per_second": round(step.tokens / seconds, 1),
        "model_tflops": round(step.flops / seconds / 1e12, 4),
        "mfu": None if peak is None else round(step.flops / seconds / peak, 4),
        "share_of_gemm": round(step.flops / seconds / rate, 4),
        "grad_norm": norm,
        "peak_mib": round(torch.cuda.max_memory_allocated() / MIB) if CUDA else None,
    }


def _gemm_flops() -> float:
    """bf16 FLOP/s of one large product, the median of ten."""
    side = 8192 if CUDA else 128
    a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    return 2 * side**3 / median(milliseconds(lambda: torch.mm(a, a, out=out)) for _ in range(12)) * 1e3


def _copies(step: Step) -> dict[str, Any]:
    """GB/s out and in; the same numbers afterwards. Of several tensors at once, each waits for none."""
    state = state_of(step.optimizer)
    size = sum(storage.nbytes() for storage in storages(state))
    before = [tensor.sum(dtype=torch.float64).item() for tensor in state]
    part: list[Offloaded] = []
    first = milliseconds(lambda: part.append(Offloaded(lambda: state_of(step.optimizer))))
    times: dict[str, float] = {}

    def enter_and_leave() -> None:
        inside = part[0].resident()
        times["in"] = milliseconds(inside.__enter__)
        assert [tensor.sum(dtype=torch.float64).item() for tensor in state_of(step.optimizer)] == before
        times["out"] = milliseconds(lambda: inside.__exit__(None, None, None))

    enter_and_leave()
    rates = {f"{way}_gb_per_s": round(size / ms / 1e6, 3) for way, ms in times.items()}
    return {"mib": round(size / MIB, 1), "first_ms": round(first, 2), **rates}


@contextmanager
def one_rank() -> Iterator[Mesh]:
    """A process group of one, which meets nobody."""
    platform.install()
    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    torch.distributed.init_process_group(platform.backend(), store=store, rank=0, world_size=1)
    try:
        yield build_mesh(Layout(), timeout=60.0)
        destroy_mesh()
    finally:
        torch.distributed.destroy_process_group()


def main() -> int:
    """Measure: 1 where something failed."""
    parser = arguments(__doc__ or "")
    parser.add_argument("kind", choices=["portable", "engine"])
    a = parser.parse_args()
    size = REHEARSAL if a.rehearse else FULL
    record = Record(f"step_{a.kind}", a.out, rehearsal=a.rehearse)
    if a.kind == "portable":
        spec.takes_transformer_engine = lambda dtype: False
    elif not engine_is_importable() and not a.rehearse:
        record.skip("engine", "Transformer Engine is not installed (tools/gpu_machine.sh)")
        print(record.path)
        return 0
    with tempfile.TemporaryDirectory() as where, one_rank() as mesh:
        directory = Path(where)
        (directory / "config.json").write_text(json.dumps(size.config))
        measured(record, "bf16", directory, mesh, "bf16", size)
        if a.kind == "engine":
            try:
                spec.check_fp8("blockwise")
            except ConfigError as error:
                record.skip("fp8", str(error))
            else:
                measured(record, "fp8", directory, mesh, "fp8", size)
    print(record.path)
    return int(bool(record.failed))


if __name__ == "__main__":
    sys.exit(main())
