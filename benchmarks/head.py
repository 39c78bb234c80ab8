"""Time and memory of the head on a CPU, beside other ways to the same numbers and the GEMMs alone.

    python benchmarks/head.py [--rows 2048] [--repeats 3] [--out benchmarks]

Two passes: `train` is log-prob, entropy and the gradients in hidden states and weight, `score` is log-prob
and entropy alone. Time is CPU-seconds of one thread over those of the GEMMs alone (three, or one) with the
same shapes, dtype and process, run by turns: the median of the ratios. Memory is the rise of the resident set
above its size before the first run, without the gradients themselves. Every cell has a process of its own.

- naive: logits, log_softmax in float32, entropy, autograd.
- trl: as TRL 1.x computes them: logsumexp (bf16: log_softmax in bf16, row by row), entropy by 128 rows.
- chunked: naive on 512 rows at a time, computed again in the backward pass (torch.utils.checkpoint).
- recompute, fused: `mcore_rl.parallel.head`, the weight's gradient into an fp32 main_grad as in training.

Writes OUT/head_DATE.json with the hardware, and a picture beside it, after every cell: what is in the file of
today is not measured again.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.outputs import output_directory
from mcore_rl.parallel.head import Call, HeadOutput, head_loss, log_prob_entropy

ROOT = Path(__file__).parents[1]
HIDDEN, VOCAB, TEMPERATURE, MIB = 1024, 32768, 0.9, 1 << 20
CHUNK_ROWS = 512
LIMITS = {
    ("fused", "float32", "train"): (1.10, 0.10),
    ("fused", "bfloat16", "train"): (1.40, 0.15),
    ("recompute", "float32", "score"): (1.15, None),
    ("recompute", "bfloat16", "score"): (1.30, None),
}
"""(implementation, dtype, pass) -> most time over the GEMMs alone, most memory over naive's"""
SCORE_MIB = 32
"""most memory of a `score` pass of ours"""

Implementation = Callable[[Tensor, Tensor, Tensor], HeadOutput]


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> HeadOutput:
    """Everything at once, by autograd."""
    log_p = torch.log_softmax((hidden @ weight.T).float() / TEMPERATURE, dim=-1)
    return HeadOutput(log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1))


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> HeadOutput:
    """TRL's selective_log_softmax and entropy_from_logits."""
    logits = (hidden @ weight.T) / TEMPERATURE
    if logits.dtype == torch.float32:
        chosen = logits.gather(1, targets[:, None]).squeeze(1)
        log_prob = chosen - torch.stack([torch.logsumexp(row, -1) for row in logits])
    else:
        rows = zip(logits, targets, strict=True)
        log_prob = torch.stack([torch.log_softmax(row, -1)[target] for row, target in rows])
    entropies = []
    for chunk in logits.split(128):
        log_p = torch.log_softmax(chunk, -1)
        entropies.append(-(log_p.exp() * log_p).sum(-1))
    return HeadOutput(log_prob, torch.cat(entropies))


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> HeadOutput:
    """Naive by CHUNK_ROWS rows, each chunk's logits computed twice."""
    pairs = zip(hidden.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True)
    parts = [checkpoint(naive, h, weight, t, use_reentrant=False) for h, t in pairs]
    return HeadOutput(*(torch.cat(both) for both in zip(*parts, strict=True)))  # type: ignore[arg-type]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> HeadOutput:
    """The head, four GEMMs with gradients."""
    return log_prob_entropy(hidden, weight, Call.of(weight, targets, TEMPERATURE))


OTHERS, OURS = ("naive", "trl", "chunked"), ("recompute", "fused")
SCORERS: dict[str, Implementation] = {"naive": naive, "trl": trl, "chunked": chunked, "recompute": ours}
DTYPES, PASSES = ("float32", "bfloat16"), ("train", "score")


class Cell:
    """One implementation at one dtype, with its inputs."""

    def __init__(
        self, name: str, dtype: torch.dtype, rows: int, vocab: int = VOCAB, hidden: int = HIDDEN
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.name = name
        self.hidden = (0.1 * torch.randn(rows, hidden, generator=generator)).to(dtype).requires_grad_()
        self.weight = torch.randn(vocab, hidden, generator=generator).to(dtype).requires_grad_()
        self.targets = torch.randint(vocab, (rows,), generator=generator)
        self.a, self.b = torch.randn(2, rows, generator=generator)
        if name in OURS:
            self.weight.main_grad = torch.zeros(vocab, hidden)  # type: ignore[attr-defined]

    def loss(self, rows: slice, out: HeadOutput) -> Tensor:
        """Another coefficient for every row, as in reinforcement learning."""
        return (self.a[rows] * out.log_prob).sum() + (self.b[rows] * out.entropy).sum()

    def train(self) -> int:
        """Both gradients; returns their bytes."""
        inputs = (self.hidden, self.weight)
        if self.name == "fused":
            total = head_loss(*inputs, Call.of(self.weight, self.targets, TEMPERATURE), self.loss)
        else:
            total = self.loss(slice(None), SCORERS[self.name](*inputs, self.targets))
        gradients = torch.autograd.grad(total, inputs)
        owned = gradients[:1] if hasattr(self.weight, "main_grad") else gradients
        return sum(gradient.nbytes for gradient in owned)

    def score(self) -> int:
        """Log-probs and entropies, as old and reference ones are computed."""
        with torch.no_grad():
            SCORERS[self.name](self.hidden, self.weight, self.targets)
        return 0

    def floor(self, kind: str) -> Callable[[], None]:
        """The GEMMs alone, into memory that is there."""
        h, w = self.hidden.detach(), self.weight.detach()
        logits, dh, dw = h.new_zeros(len(h), len(w)), torch.zeros_like(h), torch.zeros_like(w)

        def gemms() -> None:
            torch.mm(h, w.T, out=logits)
            if kind == "train":
                torch.mm(logits, w, out=dh)
                torch.mm(logits.T, h, out=dw)

        return gemms


def measure(
    name: str, dtype: str, kind: str, rows: int, repeats: int, *, vocab: int = VOCAB, hidden: int = HIDDEN
) -> dict[str, Any]:
    """One cell, in this process."""
    torch.set_num_threads(1)
    precision = getattr(torch, dtype)
    getattr(Cell(name, precision, 8, vocab=512), kind)()  # loads the libraries
    cell = Cell(name, precision, rows, vocab, hidden)
    if name in OURS:
        cell.weight.main_grad.fill_(0.0)  # type: ignore[attr-defined]
    run = getattr(cell, kind)
    before = resident()
    extra = peak_of(run) - before
    floor = cell.floor(kind)
    floor()
    pairs = [(cpu_seconds(run), cpu_seconds(floor)) for _ in range(repeats)]
    return {
        "implementation": name,
        "dtype": dtype,
        "pass": kind,
        "ratio": round(statistics.median(ours / alone for ours, alone in pairs), 3),
        "cpu_seconds": [round(ours, 3) for ours, _ in pairs],
        "gemm_cpu_seconds": [round(alone, 3) for _, alone in pairs],
        "extra_mib": round(extra / MIB, 1),
    }


def cpu_seconds(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def resident() -> int:
    """Bytes of the resident set, after free memory went back to the system; the peak starts here."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_of(run: Callable[[], int]) -> int:
    """The largest resident set during `run`, without the bytes that it answers with."""
    outputs = run()
    return _status("VmHWM") - outputs


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def cells(rows: int, repeats: int, path: Path) -> list[dict[str, Any]]:
    """Every cell, each in a process of its own; what `path` has already is not measured again."""
    results = json.loads(path.read_text())["cells"] if path.exists() else []
    known = {(r["implementation"], r["dtype"], r["pass"]) for r in results}
    for kind, dtype, name in itertools.product(PASSES, DTYPES, ("fused", "recompute", *OTHERS)):
        if (name, dtype, kind) in known or (name, kind) == ("fused", "score"):
            continue
        known.add((name, dtype, kind))
        command = [sys.executable, __file__, "--cell", name, dtype, kind]
        command += ["--rows", str(rows), "--repeats", str(repeats)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        results.append(json.loads(done.stdout))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
        write(path, rows, results)
    return results


def write(path: Path, rows: int, results: list[dict[str, Any]]) -> None:
    """The json and the picture."""
    order = [*OTHERS, *OURS]
    results.sort(
        key=lambda r: (r["pass"] == "score", r["dtype"] != "float32", order.index(r["implementation"]))
    )
    record = {
        "benchmark": "log-prob, entropy and their gradients from hidden states and lm_head",
        "date": datetime.date.today().isoformat(),
        "hardware": {"machine": platform.machine(), "processor": processor(), "cpus": os.cpu_count()},
        "torch": torch.__version__,
        "shape": {"rows": rows, "hidden": HIDDEN, "vocabulary": VOCAB},
        "cells": results,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".svg").write_text(picture(results))


def beyond_limits(results: list[dict[str, Any]]) -> list[str]:
    """What exceeds LIMITS, in words."""
    by = {(r["implementation"], r["dtype"], r["pass"]): r for r in results}
    failed = []
    for key, (time_limit, memory_limit) in LIMITS.items():
        cell, reference = by[key], by["naive", *key[1:]]
        most = SCORE_MIB if memory_limit is None else memory_limit * reference["extra_mib"]
        if cell["ratio"] > time_limit:
            failed.append(f"{key}: {cell['ratio']} x the GEMMs, at most {time_limit}")
        if cell["extra_mib"] > most:
            failed.append(f"{key}: {cell['extra_mib']} MiB, at most {most:.0f}")
    return failed


def picture(results: list[dict[str, Any]]) -> str:
    """A panel of bars per dtype and pass: their length is time over the GEMMs alone; memory beside them."""
    longest = max(r["ratio"] for r in results)
    panels, bottom = [], 0
    for column, dtype in enumerate(DTYPES):
        for row, kind in enumerate(PASSES):
            bars = [r for r in results if (r["dtype"], r["pass"]) == (dtype, kind)]
            left, top = 24 + 440 * column, 56 + 168 * row
            panels.append(_panel(f"{dtype}, {kind}", bars, left, top, 190 / longest))
            bottom = max(bottom, top + 34 + 24 * len(bars))
    words = "Time over that of the GEMMs alone (dashed), and memory beside the gradients"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {bottom}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="#16181d" style="background: #fff">'
        f'<title>{words}</title><text x="24" y="28" font-weight="600">{words}</text>{"".join(panels)}</svg>\n'
    )


def _panel(title: str, bars: list[dict[str, Any]], left: float, top: float, unit: float) -> str:
    zero = left + 84
    body = [f'<text x="{left}" y="{top + 12}" fill="#5b606b">{title}</text>']
    for i, cell in enumerate(bars):
        y, width = top + 24 + 24 * i, cell["ratio"] * unit
        color = "#2a78d6" if cell["implementation"] in OURS else "#b9bcc4"
        body.append(
            f'<text x="{zero - 8}" y="{y + 13}" text-anchor="end">{cell["implementation"]}</text>'
            f'<rect x="{zero}" y="{y}" width="{width:.1f}" height="18" fill="{color}"/>'
            f'<text x="{zero + width + 6:.1f}" y="{y + 13}">{cell["ratio"]:.2f} x, '
            f"{cell['extra_mib']:.0f} MiB</text>"
        )
    end = top + 24 + 24 * len(bars)
    body.append(
        f'<line x1="{zero + unit:.1f}" x2="{zero + unit:.1f}" y1="{top + 20}" y2="{end}" stroke="#16181d" '
        'stroke-dasharray="3 3"/>'
    )
    return "".join(body)


def processor() -> str:
    """Its name, as the system tells it."""
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def main() -> int:
    """Measure one cell, or all: 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=output_directory, default=ROOT / "benchmarks")
    parser.add_argument(
        "--cell", nargs=3, metavar=("NAME", "DTYPE", "PASS"), help="one cell, in this process"
    )
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="of that cell")
    parser.add_argument("--vocab", type=int, default=VOCAB, help="of that cell, or of a shard")
    a = parser.parse_args()
    if a.cell:
        name, dtype, kind = a.cell
        found = measure(name, dtype, kind, a.rows, a.repeats, vocab=a.vocab, hidden=a.hidden)
        print(json.dumps(found))
        return 0
    path = a.out / f"head_{datetime.date.today().isoformat()}.json"
    results = cells(a.rows, a.repeats, path)
    failed = beyond_limits(results)
    print("\n".join(failed) or "within all limits", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
