"""What it costs to score samples in the processes of a reward function.

    python benchmarks/rewards.py [--samples 2048] [--workers 4] [--seconds 0.05] [--tokens 512] [--steps 200]
        [--out FILE]

`time over ideal` is the wall time of a function that sleeps, over samples x seconds / workers; `streamed` the
same of groups that arrive evenly over as long as the pool needs for all, and `seconds after the last` what is
left to wait for then. `milliseconds of CPU` is what the trainer's process spends for a sample of a function
that returns at once, all of it. All with workers that run already.

`steps` are scored by a function that in one sample of each does what user code does sooner or later; what the
process holds at the first and the last of them must not grow: `processes`, `descriptors`, `resident MiB`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import sys
import time
from collections import Counter
from datetime import date

import psutil

from benchmarks.data_plane import random_groups
from benchmarks.outputs import output_file
from mcore_rl.rewards import RewardFunction, RewardPool, Task
from mcore_rl.types import Group, Prompt, Sample, VersionSpan

LIMITS = {"time over ideal": 1.15, "streamed": 1.15, "milliseconds of CPU": 1.0}
MAY_GROW = {"processes": 0, "descriptors": 0, "resident MiB": 8.0}


def at_once(sample: Sample) -> float:
    """One number."""
    return float(len(sample.text))


def sleeping(sample: Sample) -> float:
    """One number, as from a service that takes a while."""
    time.sleep(float(os.environ["SLEEP"]))
    return 1.0


def misbehaving(sample: Sample) -> float:
    """One number; the first sample of every group does one of these things."""
    if not sample.id.endswith("/0"):
        return 1.0
    match int(sample.prompt.id) % 8:
        case 0:
            raise ValueError("no number in it")
        case 1:
            sys.exit(3)
        case 2:
            os._exit(0)
        case 3:
            time.sleep(600)
        case 4:
            print("\n" * (2 << 20), flush=True)
        case 5:
            return float("nan")
        case 6:
            return float(len(bytearray(1 << 40)))
        case _:
            os.fork()
    return 1.0


def pool_of(function: str, workers: int, timeout: float = 60.0) -> RewardPool:
    """A pool that calls a function of this file."""
    task = Task((RewardFunction(f"benchmarks.rewards:{function}"),), {}, 4.0, None, timeout=timeout)
    return RewardPool(task, workers=workers)


def measure(function: str, groups: list[Group], workers: int) -> tuple[float, float]:
    """(seconds, CPU-seconds of this process) of scoring all groups; every worker runs before."""
    with pool_of(function, workers) as pool:
        pool.score(groups[: 16 * workers])
        began, cpu = time.monotonic(), time.process_time()
        _, reasons = pool.score(groups)
        took = time.monotonic() - began, time.process_time() - cpu
    assert not reasons.counts, reasons
    return took


def streamed(groups: list[Group], workers: int, span: float) -> tuple[float, float]:
    """(seconds from the first arrival to the last reward, seconds of it after the last arrival)."""
    with pool_of("sleeping", workers) as pool:
        pool.score(groups[: 16 * workers])
        began = time.monotonic()
        for number, group in enumerate(groups):
            time.sleep(max(0.0, began + span * number / len(groups) - time.monotonic()))
            pool.begin(group.id, lambda group=group: group)
        arrived = time.monotonic()
        _, reasons = pool.finish([group.id for group in groups])
        ended = time.monotonic()
    assert not reasons.counts, reasons
    return ended - began, ended - arrived


def held() -> dict[str, float]:
    """What this process holds, and what runs below it."""
    me = psutil.Process()
    return {
        "processes": len(me.children(recursive=True)),
        "descriptors": me.num_fds(),
        "resident MiB": round(me.memory_info().rss / 2**20, 1),
    }


def many_steps(steps: int, workers: int) -> dict[str, list[float]]:
    """What is held after the first tenth of so many steps, and after the last; void samples by reason."""
    prompts = [Prompt(str(number), "", (1,), "") for number in range(8)]
    spans = (VersionSpan("0", 0, 1),)
    before, counts = held(), Counter[str]()
    with pool_of("misbehaving", workers, timeout=1.0) as pool:
        for step in range(steps):
            prompt = prompts[step % 8]
            name = f"{prompt.id}@{step}"
            samples = (
                Sample.of_response(f"{name}/{k}", prompt, (2,), (-0.5,), "x", "stop", spans)
                for k in range(32)
            )
            _, reasons = pool.score([Group(name, tuple(samples))])
            counts += reasons.counts
            if step == steps // 10:
                before = held()
        after = held()
    return {
        **{name: [before[name], after[name]] for name in before},
        **{f"void/{reason}": [count] for reason, count in counts.items()},
    }


def main() -> None:
    """Measure and report; exit 1 beyond a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=output_file)
    a = parser.parse_args()
    os.environ["SLEEP"] = str(a.seconds)
    groups, _ = random_groups(a.samples, a.tokens)
    seconds, _ = measure("sleeping", groups, a.workers)
    _, cpu = measure("at_once", groups, a.workers)
    ideal = a.samples * a.seconds / a.workers
    stream, after = streamed(groups, a.workers, ideal)
    steps = many_steps(a.steps, a.workers)
    found = {
        "time over ideal": round(seconds / ideal, 3),
        "streamed": round(stream / ideal, 3),
        "seconds after the last": round(after, 3),
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
        "steps": a.steps,
        "at the first and the last of them": steps,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if a.out:
        a.out.write_text(text + "\n")
    grown = [name for name, most in MAY_GROW.items() if steps[name][1] - steps[name][0] > most]
    if grown or any(found[name] > limit for name, limit in LIMITS.items()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
