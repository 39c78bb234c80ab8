"""Whether adapters of rank 8 learn the tiny task as training of the weights does, each at its best rate.

    python -m benchmarks.learn_lora [--seeds 0 1] [--steps 160] [--runs runs/learn] [--out benchmarks]

Runs examples/grpo_tiny.toml from the warm starts of benchmarks/learn.py: on the first seed with every rate
of RATES, on the others with the one that ended best there; and a control of adapters with a rate of 0. A run
that finished under RUNS is not run again. Writes OUT/learn_lora_DATE.json and a picture beside it; exits with
1 where adapters end more than 0.05 below the weights in the mean of the seeds, or learn without a rate.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from benchmarks.learn import ROOT, Curve, learn, warm_start
from benchmarks.outputs import output_directory
from mcore_rl.report.picture import picture
from mcore_rl.report.svg import Line

KINDS: dict[str, dict[str, object]] = {"full": {}, "rank 8": {"lora.rank": 8, "lora.alpha": 64}}
RATES = {"full": (5e-4, 1e-3), "rank 8": (5e-4, 1e-3, 2e-3)}
MOST = 0.05
"""of accuracy, by which adapters may end below the weights"""
CONTROL_STEPS, DRIFT = 40, 0.06
"""of a run without a learning rate, and how far 1000 samples of the same policy may be apart"""


@dataclass(frozen=True)
class Run:
    """A curve and what it is of."""

    kind: str
    rate: float
    curve: Curve


def run(kind: str, rate: float, runs: Path, seed: int, steps: int) -> Run:
    """One run; a rate of 0 is a control."""
    settings = KINDS[kind] | {"optimizer.lr": rate}
    control = not rate
    variant = f"_{kind.replace(' ', '')}_{rate:g}"
    curve = learn(
        "grpo",
        runs,
        seed,
        min(steps, CONTROL_STEPS) if control else steps,
        control=control,
        variant=variant,
        settings=settings,
    )
    return Run(kind, rate, curve)


def run_all(runs: Path, seeds: list[int], steps: int) -> list[Run]:
    """Every rate on the first seed, the best of each kind on the others, and a control."""
    for seed in seeds:
        warm_start(runs, seed)
    first, *others = seeds
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(run, k, rate, runs, first, steps) for k, rates in RATES.items() for rate in rates]
        jobs.append(pool.submit(run, "rank 8", 0.0, runs, first, steps))
        tried = [job.result() for job in jobs]
        best = {kind: best_of(tried, kind) for kind in KINDS}
        more = [pool.submit(run, k, rate, runs, seed, steps) for k, rate in best.items() for seed in others]
        return tried + [job.result() for job in more]


def best_of(tried: list[Run], kind: str) -> float:
    """The learning rate that ended best."""
    return max((one for one in tried if one.kind == kind and one.rate), key=lambda one: last(one.curve)).rate


def last(curve: Curve) -> float:
    """Accuracy in the end."""
    return curve.accuracy[-1]


def ends(done: list[Run]) -> dict[str, float]:
    """Mean accuracy in the end over the seeds, of each kind at its best rate."""
    rates = {
        kind: best_of([one for one in done if one.curve.seed == done[0].curve.seed], kind) for kind in KINDS
    }
    return {
        kind: mean(last(one.curve) for one in done if (one.kind, one.rate) == (kind, rate))
        for kind, rate in rates.items()
    }


def wrong(done: list[Run]) -> list[str]:
    """What does not hold, in words."""
    found, ended = [], ends(done)
    if ended["rank 8"] < ended["full"] - MOST:
        found.append(f"adapters end at {ended['rank 8']:.3f}, the weights at {ended['full']:.3f}")
    for one in done:
        moved = last(one.curve) - one.curve.accuracy[0]
        if not one.rate and abs(moved) > DRIFT:
            found.append(f"accuracy moves by {moved:.3f} without a learning rate")
    return found


def write(done: list[Run], out: Path) -> None:
    """The json and the picture."""
    today = datetime.date.today().isoformat()
    record = {
        "benchmark": "held-out accuracy of examples/grpo_tiny.toml, the weights against adapters of rank 8",
        "date": today,
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "config": (ROOT / "examples" / "grpo_tiny.toml").read_text(),
        "settings": KINDS,
        "ends": ends(done),
        "runs": [asdict(one) for one in done],
    }
    path = out / f"learn_lora_{today}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        Line(
            f"{one.kind}, {one.rate:g}, seed {one.curve.seed}",
            list(zip(one.curve.steps, one.curve.accuracy, strict=True)),
            color=list(KINDS).index(one.kind),
            faint=not one.rate,
        )
        for one in done
    ]
    title = "adapters of rank 8 and the weights: accuracy on 1000 held-out problems"
    path.with_suffix(".svg").write_text(picture(title, lines, faint="learning rate 0"))


def main() -> int:
    """Run everything and write the curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "learn")
    parser.add_argument("--out", type=output_directory, default=ROOT / "benchmarks")
    a = parser.parse_args()
    done = run_all(a.runs, a.seeds, a.steps)
    write(done, a.out)
    failed = wrong(done)
    print("\n".join(failed) or "adapters learn as the weights do", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
