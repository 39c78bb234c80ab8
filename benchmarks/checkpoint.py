"""How long a save keeps training waiting: in the background, in the foreground, and what a plain copy costs.

    python benchmarks/checkpoint.py DIRECTORY [--gib 1.2] [--rounds 5] [--out benchmarks/checkpoint_DATE.json]

One rank saves a state of `--gib` GiB into DIRECTORY: matrices of 64 MiB. `memcpy` copies the same tensors
into host memory that was touched before. `first` allocates the staging buffer; the other saves reuse it.
Between two background saves the writer is waited for, outside the measured time. Numbers are medians, in
seconds, of rounds that take turns, so that a busy machine disturbs all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import shutil
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.outputs import output_file
from mcore_rl.checkpoint import Checkpoints
from mcore_rl.checkpoint.pieces import Piece
from mcore_rl.model import platform
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import build_mesh

MATRIX = (4096, 4096)
LIMITS = {"background / memcpy": 1.6, "background / foreground": 0.1}


def state(gib: float) -> list[Piece]:
    """Weights and two moments of as many matrices as fit."""
    each = torch.Size(MATRIX).numel() * 4
    tensors = {f"tensor_{i}": torch.rand(MATRIX) for i in range(round(gib * 2**30 / each))}
    return [Piece(key, MATRIX, (0, 0), tensor, True) for key, tensor in tensors.items()]


def seconds(work: Callable[[], object]) -> float:
    """One call's duration."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(root: Path, pieces: list[Piece], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, by what was done."""
    mesh = build_mesh(Layout())
    host = [torch.zeros_like(piece.data) for piece in pieces]
    behind = Checkpoints(root / "background", mesh, keep=1, background=True, timeout=600.0)
    ahead = Checkpoints(root / "foreground", mesh, keep=1, background=False, timeout=600.0)
    times: dict[str, list[float]] = {"memcpy": [], "background": [], "foreground": [], "written": []}

    def copy() -> None:
        for place, piece in zip(host, pieces, strict=True):
            place.copy_(piece.data)

    with behind.open(), ahead.open():
        times["first"] = [seconds(lambda: behind.save(0, pieces, {}))]
        behind.wait()
        ahead.save(0, pieces, {})
        for step in range(1, rounds + 1):
            times["memcpy"].append(seconds(copy))
            times["background"].append(seconds(lambda: behind.save(step, pieces, {})))  # noqa: B023
            times["written"].append(times["background"][-1] + seconds(behind.wait))
            times["foreground"].append(seconds(lambda: ahead.save(step, pieces, {})))  # noqa: B023
    return times


def main() -> int:
    """0 when both limits hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gib", type=float, default=1.2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=output_file, default=Path(f"benchmarks/checkpoint_{date.today()}.json"))
    options = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    platform.install()
    root = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        store = (root / "store").as_uri()
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        pieces = state(options.gib)
        times = measure(root, pieces, options.rounds)
        dist.destroy_process_group()
    finally:
        shutil.rmtree(root)
    middle = {name: median(values) for name, values in times.items()}
    ratios = {name: middle[name.split(" / ")[0]] / middle[name.split(" / ")[1]] for name in LIMITS}
    result = {
        "date": str(date.today()),
        "machine": f"{machine.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "gib": sum(piece.data.nbytes for piece in pieces) / 2**30,
        "seconds": {name: [round(value, 4) for value in values] for name, values in times.items()},
        "median": {name: round(value, 4) for name, value in middle.items()},
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
        "limits": LIMITS,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["median"] | result["ratios"]))
    return int(any(ratios[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
