"""What it costs to score samples in the processes of a reward function.

    python benchmarks/rewards.py [--samples 2048] [--workers 4] [--seconds 0.05] [--tokens 512] [--out FILE]

`time over ideal` is the wall time of a function that sleeps, over samples x seconds / workers; `milliseconds
of CPU` is what the trainer's process spends for a sample of a function that returns at once, all of it; both
with workers that run already.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import time
from datetime import date
from pathlib import Path

from benchmarks.data_plane import random_groups
from mcore_rl.rewards import RewardFunction, RewardPool, Task
from mcore_rl.types import Group, Sample

LIMITS = {"time over ideal": 1.15, "milliseconds of CPU": 1.0}


def at_once(sample: Sample) -> float:
    """One number."""
    return float(len(sample.text))


def sleeping(sample: Sample) -> float:
    """One number, as from a service that takes a while."""
    time.sleep(float(os.environ["SLEEP"]))
    return 1.0


def measure(function: str, groups: list[Group], workers: int) -> tuple[float, float]:
    """(seconds, CPU-seconds of this process) of scoring all groups; every worker runs before."""
    task = Task((RewardFunction(f"benchmarks.rewards:{function}"),), {}, 4.0, None)
    with RewardPool(task, workers=workers) as pool:
        pool.score(groups[: 16 * workers])
        began, cpu = time.monotonic(), time.process_time()
        _, reasons = pool.score(groups)
        took = time.monotonic() - began, time.process_time() - cpu
    assert not reasons.counts, reasons
    return took


def main() -> None:
    """Measure and report; exit 1 beyond a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    os.environ["SLEEP"] = str(a.seconds)
    groups, _ = random_groups(a.samples, a.tokens)
    seconds, _ = measure("sleeping", groups, a.workers)
    _, cpu = measure("at_once", groups, a.workers)
    found = {
        "time over ideal": round(seconds / (a.samples * a.seconds / a.workers), 3),
        "milliseconds of CPU": round(cpu / a.samples * 1e3, 3),
    }
    result = {
        "date": date.today().isoformat(),
        "machine": f"{machine.machine()}, {os.cpu_count()} cores",
        "samples": a.samples,
        "mean tokens": a.tokens,
        "workers": a.workers,
        "seconds of a call": a.seconds,
        **found,
        "limits": LIMITS,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if a.out:
        a.out.write_text(text + "\n")
    if any(found[name] > limit for name, limit in LIMITS.items()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
