"""Time and memory of a student's exact divergence from its teacher, beside the form that holds the logits.

    python -m benchmarks.distill [--rows 1024] [--repeats 3] [--out benchmarks]

A pass computes the divergence of every row over the whole vocabulary and its gradients in the student's
hidden states and weight, for a student of 1024 and a teacher of 1536. Time is CPU-seconds of one thread over
those of the student's own three GEMMs in the same process, run by turns: the median of the ratios (the
teacher's one GEMM alone is 0.5). Memory is the rise of the resident set, without the gradients, over that of
the naive form, which materialises the logits of both models in float32. Every cell has a process of its own.

Writes OUT/distill_DATE.json; exits with 1 where a limit is exceeded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.head import HIDDEN, MIB, ROOT, VOCAB, cpu_seconds, peak_of, processor, resident
from benchmarks.outputs import output_directory
from mcore_rl.algo.distillation import ForwardKL, JensenShannon, ReverseKL
from mcore_rl.parallel.head import Call
from mcore_rl.parallel.head.divergence import Teacher, divergence_loss

TEACHER_HIDDEN = 1536
KINDS = {"forward": ForwardKL(), "reverse": ReverseKL(), "jsd": JensenShannon(0.5)}
DTYPES = ("float32", "bfloat16")
MOST_TIME, MOST_MEMORY = 2.2, 0.2


def naive(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence of every row from logits [R, V], by autograd."""
    log_p, log_q = torch.log_softmax(student.float(), -1), torch.log_softmax(teacher.float(), -1)
    if kind == "forward":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if kind == "reverse":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0))
    return 0.5 * ((log_q.exp() * (log_q - log_m)).sum(-1) + (log_p.exp() * (log_p - log_m)).sum(-1))


class Cell:
    """One form of one divergence at one dtype, with its inputs."""

    def __init__(self, name: str, kind: str, dtype: torch.dtype, rows: int, vocab: int = VOCAB) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(scale: float, *shape: int) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator)).to(dtype)

        self.name, self.kind = name, kind
        self.hidden = normal(0.1, rows, HIDDEN).requires_grad_()
        self.weight = normal(1.0, vocab, HIDDEN).requires_grad_()
        self.teacher = Teacher(normal(0.1, rows, TEACHER_HIDDEN), normal(1.0, vocab, TEACHER_HIDDEN))
        if name == "ours":
            self.weight.main_grad = torch.zeros(vocab, HIDDEN)  # type: ignore[attr-defined]

    def run(self) -> int:
        """Both gradients; returns their bytes."""
        if self.name == "ours":
            call = Call.of(self.weight, torch.zeros(len(self.hidden), dtype=torch.int64))
            total = divergence_loss(
                self.hidden, self.weight, self.teacher, call, KINDS[self.kind], lambda rows, x: x.sum()
            )
        else:
            teacher = self.teacher.hidden @ self.teacher.weight.T
            total = naive(self.kind, self.hidden @ self.weight.T, teacher).sum()
        gradients = torch.autograd.grad(total, (self.hidden, self.weight))
        owned = gradients[:1] if self.name == "ours" else gradients
        return sum(gradient.nbytes for gradient in owned)

    def gemms(self) -> None:
        """The student's three GEMMs alone."""
        h, w = self.hidden.detach(), self.weight.detach()
        logits = h @ w.T
        torch.mm(logits, w)
        torch.mm(logits.T, h)


def measure(name: str, kind: str, dtype: str, rows: int, repeats: int) -> dict[str, Any]:
    """One cell, in this process."""
    torch.set_num_threads(1)
    precision = getattr(torch, dtype)
    Cell(name, kind, precision, 8, vocab=512).run()  # loads the libraries
    cell = Cell(name, kind, precision, rows)
    if name == "ours":
        cell.weight.main_grad.fill_(0.0)  # type: ignore[attr-defined]
    before = resident()
    extra = peak_of(cell.run) - before
    cell.gemms()
    pairs = [(cpu_seconds(cell.run), cpu_seconds(cell.gemms)) for _ in range(repeats)]
    return {
        "form": name,
        "divergence": kind,
        "dtype": dtype,
        "ratio": round(statistics.median(ours / alone for ours, alone in pairs), 3),
        "extra_mib": round(extra / MIB, 1),
    }


def cell_apart(name: str, kind: str, dtype: str, rows: int, repeats: int) -> dict[str, Any]:
    """One cell, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.distill", "--cell", name, kind, dtype]
    command += ["--rows", str(rows), "--repeats", str(repeats)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=ROOT)
    return json.loads(done.stdout)


def beyond_limits(cells: list[dict[str, Any]]) -> list[str]:
    """What exceeds the limits, in words."""
    by = {(c["form"], c["divergence"], c["dtype"]): c for c in cells}
    failed = []
    for (form, *key), cell in by.items():
        most = MOST_MEMORY * by["naive", key[0], key[1]]["extra_mib"]
        if form == "ours" and cell["ratio"] > MOST_TIME:
            failed.append(f"{key}: {cell['ratio']} x the student's GEMMs, at most {MOST_TIME}")
        if form == "ours" and cell["extra_mib"] > most:
            failed.append(f"{key}: {cell['extra_mib']} MiB, at most {most:.0f}")
    return failed


def main() -> int:
    """Measure one cell, or all: 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=output_directory, default=ROOT / "benchmarks")
    parser.add_argument(
        "--cell", nargs=3, metavar=("FORM", "DIVERGENCE", "DTYPE"), help="one cell, in this process"
    )
    a = parser.parse_args()
    if a.cell:
        form, kind, dtype = a.cell
        print(json.dumps(measure(form, kind, dtype, a.rows, a.repeats)))
        return 0
    cells = []
    for dtype in DTYPES:
        for kind in KINDS:
            for form in ("naive", "ours"):
                cells.append(cell_apart(form, kind, dtype, a.rows, a.repeats))
                print(json.dumps(cells[-1]), file=sys.stderr, flush=True)
    date = datetime.date.today().isoformat()
    record = {
        "benchmark": "a student's exact divergence from its teacher, with gradients",
        "date": date,
        "hardware": {"machine": platform.machine(), "processor": processor(), "cpus": os.cpu_count()},
        "torch": torch.__version__,
        "shape": {"rows": a.rows, "hidden": HIDDEN, "teacher_hidden": TEACHER_HIDDEN, "vocabulary": VOCAB},
        "cells": cells,
    }
    (a.out / f"distill_{date}.json").write_text(json.dumps(record, indent=1) + "\n")
    failed = beyond_limits(cells)
    print("\n".join(failed) or "within all limits", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
