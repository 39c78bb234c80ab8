"""How evenly sequences are spread over data-parallel ranks and packed into micro-batches.

    python benchmarks/balance.py [--seeds 5] [--out benchmarks/balance_DATE.json]

Lengths are lognormal around 4k tokens up to 32k, correlated within groups of 8 samples of one prompt;
costs are the forward FLOPs of Llama-3-70B. A method's number is the heaviest rank's cost over the mean (1 is
perfect), `bound` what the longest sequence allows, `worst` is `balance` over the bound on its worst seed,
`gap` the cost of the slowest rank in every micro-batch over the mean, as ranks that wait for each other pay.
"""

from __future__ import annotations

import argparse
import heapq
import json
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from benchmarks.outputs import output_file
from mcore_rl.data.balance import ModelShape, balance, forward_flops, max_over_mean
from mcore_rl.data.packing import lower_bound, micro_batches, pack_bins

LLAMA_3_70B = ModelShape(layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, vocab=128256, ffn=28672)
CASES = [(64, 8), (512, 8), (512, 16), (512, 64), (2048, 64), (4096, 16), (4096, 128), (4096, 512)]
BUDGET = 32768
GROUP = 8

Floats = npt.NDArray[np.float64]
Parts = Sequence[Sequence[int]]


def lognormal_lengths(samples: int, seed: int) -> npt.NDArray[np.int64]:
    """[samples] tokens per sequence."""
    rng = np.random.default_rng(seed)
    prompts = rng.normal(np.log(4096), 0.85, samples // GROUP).repeat(GROUP)
    return np.clip(np.exp(prompts + rng.normal(0, 0.47, samples)), 16, BUDGET).astype(np.int64)


def round_robin(costs: Floats, ranks: int) -> Parts:
    """Sequence i on rank i mod ranks."""
    return [range(rank, len(costs), ranks) for rank in range(ranks)]


def equal_size_karmarkar_karp(costs: Floats, ranks: int) -> Parts:
    """Largest differencing (Karmarkar and Karp 1982) on tuples of `ranks` sequences, as many on each rank."""
    order = np.argsort(costs, kind="stable").tolist()
    heap = []
    for start in range(0, len(order), ranks):
        parts = [(float(costs[i]), [i]) for i in reversed(order[start : start + ranks])]
        heap.append((parts[-1][0] - parts[0][0], start, parts))
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, key, heavy), (_, _, light) = heapq.heappop(heap), heapq.heappop(heap)
        merged = [(a + b, [*x, *y]) for (a, x), (b, y) in zip(heavy, reversed(light), strict=True)]
        merged.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], key, merged))
    return [indices for _, indices in heap[0][2]]


METHODS: dict[str, Callable[[Floats, int], Parts]] = {
    "round robin": round_robin,
    "equal-size KK": equal_size_karmarkar_karp,
    "balance": balance,
}


def measure(samples: int, ranks: int, seeds: int) -> dict[str, float]:
    """Medians over the seeds, and for `balance` the worst ratio to the bound."""
    runs: list[dict[str, float]] = []
    for seed in range(seeds):
        lengths = lognormal_lengths(samples, seed)
        costs = forward_flops(lengths, LLAMA_3_70B)
        run = {"bound": max(1.0, costs.max() * ranks / costs.sum())}
        for name, method in METHODS.items():
            start = time.process_time()
            parts = method(costs, ranks)
            run[f"{name} ms"] = 1e3 * (time.process_time() - start)
            run[name] = max_over_mean(costs, parts)
        plan = micro_batches(lengths, costs, ranks, BUDGET)
        table = np.array([[costs[one].sum() for one in rank] for rank in plan])
        run["gap"] = table.max(0).sum() / table.mean(0).sum()
        run["micro-batches above bound"] = len(plan[0]) - -(-lower_bound(lengths, BUDGET) // ranks)
        run["bins above bound"] = len(pack_bins(lengths, BUDGET)) - lower_bound(lengths, BUDGET)
        run["worst"] = run["balance"] / run["bound"]
        runs.append(run)
    result = {key: round(median(run[key] for run in runs), 5) for key in runs[0]}
    worst = {"worst": max, "bins above bound": max, "micro-batches above bound": max, "balance ms": max}
    result |= {key: round(largest(run[key] for run in runs), 5) for key, largest in worst.items()}
    return {"samples": samples, "ranks": ranks, **result}


def main() -> None:
    """Print the table and write the json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    default = Path(__file__).parent / f"balance_{date.today()}.json"
    parser.add_argument("--out", type=output_file, default=default)
    arguments = parser.parse_args()
    columns = ["bound", "round robin", "equal-size KK", "balance", "worst", "balance ms", "equal-size KK ms"]
    columns += ["gap", "bins above bound", "micro-batches above bound"]
    print("samples/ranks", *columns, sep=" | ")
    rows = []
    for samples, ranks in CASES:
        row = measure(samples, ranks, arguments.seeds)
        print(f"{samples}/{ranks}", *(row[column] for column in columns), sep=" | ", flush=True)
        rows.append(row)
    report = {
        "date": str(date.today()),
        "hardware": f"{_cpu()}, one core",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "budget": BUDGET,
        "seeds": arguments.seeds,
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def _cpu() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.machine()


if __name__ == "__main__":
    main()
