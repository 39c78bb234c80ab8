"""What the stages of tools/gpu_check.sh share: a json that is written after every measurement, and clocks.

Needs torch alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DATASHEET = {"H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""part of a GPU's name -> bf16 FLOP/s without sparsity, by its maker"""


class Record:
    """The json of one stage; a measurement that fails is in it with its error, and the next one runs."""

    def __init__(self, stage: str, out: Path, *, rehearsal: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = _unused(out, f"gpu_{stage}_{datetime.date.today().isoformat()}{'_rehearsal' * rehearsal}")
        self.failed: list[str] = []
        self.found: dict[str, Any] = {
            "stage": stage,
            "date": datetime.date.today().isoformat(),
            "rehearsal": rehearsal,
            "hardware": hardware(),
            "torch": torch.__version__,
            "measured": {},
            "errors": {},
        }
        self._write()

    def measure(self, name: str, call: Callable[[], Any]) -> Any:
        """The answer of `call`, which is written down; None where it fails."""
        begin = time.perf_counter()
        try:
            answer = call()
        except Exception as error:  # the stage goes on: minutes on a GPU are few
            self.failed.append(name)
            self.found["errors"][name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            answer = None
        else:
            self.found["measured"][name] = answer
        print(f"{time.perf_counter() - begin:6.1f} s  {name}: {answer}", file=sys.stderr, flush=True)
        self._write()
        return answer

    def skip(self, name: str, why: str) -> None:
        """Write down why something was not measured."""
        self.found.setdefault("skipped", {})[name] = why
        self._write()

    def _write(self) -> None:
        """Whole or not at all: the stage may be killed at any moment, and has what it measured before."""
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.found, indent=1) + "\n")
        beside.replace(self.path)


def _unused(out: Path, name: str) -> Path:
    """A file of this process alone, whatever runs beside it or ran before: NAME.json, NAME_2.json, ..."""
    number = 1
    while True:
        path = out / f"{name}{f'_{number}' if number > 1 else ''}.json"
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            number += 1


def hardware() -> dict[str, Any]:
    """What this runs on."""
    if not CUDA:
        return {"gpu": None, "machine": platform.machine()}
    properties = torch.cuda.get_device_properties(0)
    return {"gpu": properties.name, "memory_gib": round(properties.total_memory / (1 << 30), 1)}


def datasheet_flops() -> float | None:
    """bf16 FLOP/s by the GPU's maker; None where it is not in DATASHEET."""
    name = torch.cuda.get_device_name() if CUDA else ""
    return next((flops for part, flops in DATASHEET.items() if part in name), None)


def milliseconds(run: Callable[[], object]) -> float:
    """Of one call: by CUDA events on a GPU, by the wall's clock elsewhere."""
    if not CUDA:
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def compared(run: Callable[[], object], alone: Callable[[], object], repeats: int) -> dict[str, float]:
    """Medians of both after a fifth of them as warm-up, by turns, and of their ratio."""
    warm = max(1, repeats // 5)
    pairs = [(milliseconds(run), milliseconds(alone)) for _ in range(warm + repeats)][warm:]
    return {
        "ms": round(median(ours for ours, _ in pairs), 4),
        "gemms_ms": round(median(theirs for _, theirs in pairs), 4),
        "ratio": round(median(ours / theirs for ours, theirs in pairs), 4),
    }


def extra_mib(run: Callable[[], object]) -> float | None:
    """The peak above what was allocated before, after a first run that fills workspaces; None on a CPU."""
    run()
    if not CUDA:
        run()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / MIB, 1)


def arguments(about: str) -> argparse.ArgumentParser:
    """The options of every stage."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU, the same code")
    return parser
