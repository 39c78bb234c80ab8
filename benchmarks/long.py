"""What a run of thousands of steps keeps: memory, descriptors, threads, shared memory and disk, step by step.

    python -m benchmarks.long [--steps 2000] [--runs runs/long] [--out benchmarks]

GSPO on the demo's tiny model with a server of its own: every step samples, asks the processes of the reward,
trains and publishes; every 50th is a checkpoint. Every 20 steps all processes of the run are looked at.
Writes OUT/long_DATE.json and a picture of the memory beside it. Fails if anything that should stay is larger
in the last fifth of the run than in the second one: by one descriptor, thread, mapping of shared memory or
file of run.dir, or by a hundredth of memory or disk. What is meant to grow is left out: the lines of
metrics.jsonl and events.jsonl, and the samples that are kept.
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
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.outputs import output_directory
from mcore_rl.report.picture import picture
from mcore_rl.report.svg import Line

ROOT = Path(__file__).parents[1]
EVERY = 20
"""steps between two looks"""
FEWEST = 10
"""looks of which fifths can be compared"""
STALLED = 1200.0
ROLES = {"rank": "-m mcore_rl train", "server": "-m mcore_rl.server", "reward": "-m mcore_rl.rewards"}
GROWS = {"metrics.jsonl", "events.jsonl", "samples", "server.log"}
"""in run.dir: logs, and what is kept of the steps"""
MIB = 1 << 20
FLAGS = (
    *("--parallel.tensor", "1", "--rollout.prompts_per_step", "4", "--rollout.samples_per_prompt", "2"),
    *("--rollout.threads", "1", "--rollout.dump", "0", "--rollout.start_timeout", "500"),
    *("--algorithm.mini_batches", "1", "--train.eval_every", "0"),
    *("--reward.workers", "1"),  # more of them start once one is busy, at any step
    *("--checkpoint.every", "50", "--checkpoint.keep", "2"),
)


def role_of(process: psutil.Process) -> str | None:
    """What a process of the run is; None for one that is not of these, or has ended."""
    with suppress(psutil.Error):
        line = " ".join(process.cmdline())
        return next((role for role, says in ROLES.items() if says in line), "other")
    return None


def look(run: subprocess.Popen[bytes], directory: Path) -> dict[str, float]:
    """Memory of its own, descriptors, threads and the like by role, and files.

    A share of what is shared, such as the pages of torch's libraries, would change with whatever else runs.
    """
    launcher = psutil.Process(run.pid)
    seen: dict[str, float] = {}
    for process in [launcher, *launcher.children(recursive=True)]:
        role = "launcher" if process.pid == run.pid else role_of(process)
        if role is None:
            continue
        with suppress(psutil.Error, OSError):
            measured = {
                "memory_mib": process.memory_full_info().uss / MIB,
                "descriptors": process.num_fds(),
                "threads": process.num_threads(),
                "shared_memory_maps": Path(f"/proc/{process.pid}/maps").read_text().count("/dev/shm/"),
                "processes": 1,
            }
            for key, value in measured.items():
                seen[f"{role}/{key}"] = seen.get(f"{role}/{key}", 0.0) + value
    found = [Path(at, name) for at, _, names in os.walk(directory) for name in names]  # some may be gone
    files = [path for path in found if path.relative_to(directory).parts[0] not in GROWS]
    sizes = [size for path in files if (size := size_of(path)) is not None]
    return seen | {"disk/mib": sum(sizes) / MIB, "disk/files": len(sizes)}


def size_of(path: Path) -> int | None:
    """Bytes of a file that may go while it is looked at."""
    with suppress(OSError):
        return path.stat().st_size if path.is_file() else None
    return None


def watched(directory: Path, steps: int) -> Iterator[tuple[list[dict[str, float]], float]]:
    """A run from its beginning to its end: after each look all of them, with their `step`, and seconds."""
    flags = [*FLAGS, "--model.path", directory.parent / "warm_start/model", "--run.dir", directory]
    flags += ["--data.train", directory.parent / "data/train.jsonl", "--train.steps", steps]
    flags += ["--data.eval", directory.parent / "data/eval.jsonl"]
    command = [sys.executable, "-m", "mcore_rl", "train", "examples/gspo_tiny.toml", *map(str, flags)]
    looks: list[dict[str, float]] = []
    began = changed = time.monotonic()
    with directory.with_suffix(".log").open("wb") as log:
        run = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        while run.poll() is None:
            done = steps_done(directory)
            if done and (not looks or done >= looks[-1]["step"] + EVERY):
                with suppress(psutil.NoSuchProcess):
                    looks.append({"step": float(done), **look(run, directory)})
                    yield looks, time.monotonic() - began
                changed = time.monotonic()
            if time.monotonic() - changed > STALLED:
                raise SystemExit(f"no {EVERY} steps in {STALLED:.0f} s: {log.name}")
            time.sleep(0.1)
    finally:
        end(run)
    if run.returncode:
        raise SystemExit(f"the run ended with {run.returncode}: {log.name}")


def end(run: subprocess.Popen[bytes]) -> None:
    """End a run that is still there, and what it started."""
    if run.poll() is None:
        run.terminate()
        with suppress(subprocess.TimeoutExpired):
            run.wait(timeout=60)
    run.kill()


def steps_done(directory: Path) -> int:
    """The last step in metrics.jsonl, which another process may be writing."""
    with suppress(OSError, IndexError, ValueError), (directory / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 16384))
        return int(json.loads(file.read().splitlines()[-1])["step"])
    return 0


def fifths(looks: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Quantity -> its median in the second and in the last fifth of the looks."""
    size = len(looks) // 5
    parts = looks[size : 2 * size], looks[-size:]
    keys = sorted({key for one in looks for key in one} - {"step"})
    second, last = ([statistics.median(one.get(key, 0.0) for one in part) for key in keys] for part in parts)
    return dict(zip(keys, zip(second, last, strict=True), strict=True))


def grown(looks: Sequence[Mapping[str, float]]) -> list[str]:
    """What does not stay."""
    return [
        key
        for key, (before, after) in fifths(looks).items()
        if after - before > (0.01 * before if key.endswith("mib") else 0.5)
    ]


def record_of(looks: Sequence[Mapping[str, float]], seconds: float) -> dict[str, Any]:
    """What is written of so many looks."""
    keys = sorted({key for one in looks for key in one})
    return {
        "benchmark": "what a long run keeps: examples/gspo_tiny.toml with " + " ".join(FLAGS),
        "date": datetime.date.today().isoformat(),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "steps": int(looks[-1]["step"]),
        "seconds": round(seconds),
        "grown": grown(looks),
        "second_and_last_fifth": {key: [round(one, 2) for one in two] for key, two in fifths(looks).items()},
        "looks": {key: [round(one.get(key, 0.0), 2) for one in looks] for key in keys},
    }


def write(looks: Sequence[Mapping[str, float]], seconds: float, out: Path) -> dict[str, Any]:
    """The record and its picture, after every look: a run that is ended early leaves what it came to."""
    record = record_of(looks, seconds)
    path = out / f"long_{record['date']}.json"
    path.write_text(json.dumps(record) + "\n")
    lines = [
        Line(role, [(one["step"], one.get(f"{role}/memory_mib", 0.0)) for one in looks], color=color)
        for color, role in enumerate(("rank", "server", "launcher", "reward"))
    ]
    title = f"{record['steps']} steps: MiB of memory by process"
    path.with_suffix(".svg").write_text(picture(title, lines))
    return record


def main() -> int:
    """Run it, write the record; 1 if anything grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "long")
    parser.add_argument("--out", type=output_directory, default=ROOT / "benchmarks")
    given = parser.parse_args()
    prepare(given.runs.absolute())
    record: dict[str, Any] = {}
    for looks, seconds in watched(given.runs.absolute() / "run", given.steps):
        record = write(looks, seconds, given.out) if len(looks) >= FEWEST else {}
    print(json.dumps(record["second_and_last_fifth"], indent=1), record["grown"], sep="\n")
    return int(bool(record["grown"]))


def prepare(runs: Path) -> None:
    """The demo's problems and a policy that answers some of them, unless they are there."""
    if not (runs / "warm_start/model").exists():
        sources: list[Any] = [sys.executable, "examples/arithmetic.py", runs / "data", "--seed", "0"]
        subprocess.run(sources, cwd=ROOT, check=True, timeout=600)
        flags = ["--model.path", runs / "data/model", "--data.train", runs / "data/train.jsonl"]
        flags += ["--run.dir", runs / "warm_start", "--train.steps", "100", "--train.eval_every", "0"]
        command: list[Any] = [sys.executable, "-m", "mcore_rl", "train", "examples/sft_tiny.toml", *flags]
        subprocess.run(command, cwd=ROOT, check=True, timeout=1800)


if __name__ == "__main__":
    raise SystemExit(main())
