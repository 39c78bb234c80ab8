"""Whether a run that is killed again and again ends as the run that nothing interrupted.

    python benchmarks/soak.py DIRECTORY [--steps 100] [--kills 12] [--seed 0] [--out FILE.json]

The demo (GSPO at TP=2 with the embedded server) runs twice in DIRECTORY. In the second run a process, drawn
from the launcher, the ranks and the server, is killed with SIGKILL at steps that are drawn too, in the middle
of whatever is going on; where that ends the run, `--resume` continues it. Fails unless metrics (but for
times), tensors, random states and the place in the data are equal bit by bit, and no process and no
half-written checkpoint is left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from mcore_rl.checkpoint import find
from mcore_rl.log import read_metrics
from mcore_rl.metric_names import MEASURED

ROOT = Path(__file__).parents[1]
MCORE_RL = [sys.executable, "-m", "mcore_rl"]
STALLED = 300.0
"""Seconds without a further step after which a run counts as hung."""


def prepare(root: Path) -> None:
    """The demo's problems, and a policy that answers some of them."""
    data = root / "data"
    subprocess.run([sys.executable, "examples/arithmetic.py", data, "--seed", "0"], cwd=ROOT, check=True)
    start = ["examples/sft_tiny.toml", "--model.path", data / "model", "--run.dir", root / "warm_start"]
    subprocess.run(
        [*MCORE_RL, "train", *start, *files(root), "--train.steps", "100", "--train.eval_every", "0"],
        cwd=ROOT,
        check=True,
    )


def files(root: Path) -> list[Any]:
    """The flags of [data]."""
    return ["--data.train", root / "data/train.jsonl", "--data.eval", root / "data/eval.jsonl"]


def start(root: Path, directory: Path, steps: int, *flags: str) -> subprocess.Popen[bytes]:
    """A run of the demo, whose output is appended to a file beside its directory."""
    demo = ["examples/gspo_tiny.toml", "--model.path", root / "warm_start/model", "--run.dir", directory]
    small = ["--rollout.prompts_per_step", "16", "--rollout.threads", "1", "--train.eval_every", "0"]
    saved = ["--train.steps", str(steps), "--checkpoint.every", "2", "--checkpoint.keep", "3"]
    with directory.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*MCORE_RL, "train", *map(str, [*demo, *files(root)]), *small, *saved, *flags],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def steps_done(directory: Path) -> int:
    """The last step in metrics.jsonl, which another process may be writing."""
    with suppress(FileNotFoundError, IndexError):
        return int(json.loads((directory / "metrics.jsonl").read_bytes().splitlines()[-1])["step"])
    return 0


def wait(run: subprocess.Popen[bytes], directory: Path, step: int | None) -> bool:
    """True once `step` is done while the run goes on, False once the run has ended."""
    last, since = -1, time.monotonic()
    while run.poll() is None:
        done = steps_done(directory)
        if step is not None and done >= step:
            return True
        if done != last:
            last, since = done, time.monotonic()
        if time.monotonic() - since > STALLED:
            raise SystemExit(f"no step after step {last} in {STALLED:.0f} s: {directory.with_suffix('.log')}")
        time.sleep(0.02)
    return False


def soak(root: Path, directory: Path, steps: int, kills: int, seed: int) -> list[dict[str, Any]]:
    """The faults, with who was killed, when, and the exit code if the run ended of it."""
    drawn = random.Random(seed)
    run = start(root, directory, steps)
    faults: list[dict[str, Any]] = []
    for step in sorted(drawn.sample(range(2, steps - 2), kills)):
        while not wait(run, directory, step):
            faults[-1]["exit_code"] = run.returncode
            if run.returncode == 0:
                raise SystemExit(f"the run ended with 0 before step {step}")
            gone(directory)
            run = start(root, directory, steps, "--resume")
        time.sleep(drawn.uniform(0, 1))
        process = psutil.Process(run.pid)
        victim = drawn.choice([process, *process.children(recursive=True)])
        with suppress(psutil.NoSuchProcess):
            faults.append({"step": steps_done(directory), "victim": role(victim)})
            victim.kill()
        time.sleep(1.0)
    while wait(run, directory, None) or run.returncode != 0:
        faults[-1]["exit_code"] = run.returncode
        gone(directory)
        run = start(root, directory, steps, "--resume")
    return faults


def role(process: psutil.Process) -> str:
    """The command line of a process, short."""
    return " ".join(process.cmdline()[1:5])


def gone(directory: Path) -> None:
    """No process that names the directory is left after half a minute."""
    end = time.monotonic() + 30
    while left := [each for each in psutil.process_iter(["cmdline"]) if str(directory) in named_by(each)]:
        if time.monotonic() > end:
            raise SystemExit(f"processes are left: {left}")
        time.sleep(0.1)


def named_by(process: psutil.Process) -> str:
    """The command line that `process_iter` read."""
    return " ".join(process.info["cmdline"] or [])


def compare(one: Path, other: Path, steps: int) -> dict[str, Any]:
    """What the two directories hold, and whether it is the same."""
    lines, tensors, documents = [], [], []
    for directory in (one, other):
        measured = read_metrics(directory / "metrics.jsonl")
        lines.append([{key: line[key] for key in line if not key.startswith(MEASURED)} for line in measured])
        found = find(directory / "checkpoints", str(directory / f"checkpoints/step_{steps}"))
        documents.append({key: found.document[key] for key in ("updates", "state", "rng", "layout")})
        tensors.append(stored(found.path))
    partial = [path.name for path in (other / "checkpoints").glob("*.partial*")]
    same = tensors[0].keys() == tensors[1].keys()
    return {
        "metric_lines": [len(each) for each in lines],
        "metrics_equal": lines[0] == lines[1],
        "tensors": len(tensors[0]),
        "tensors_equal": same and all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0]),
        "documents_equal": documents[0] == documents[1],
        "partial_checkpoints": partial,
    }


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, without Megatron."""
    reader = FileSystemReader(checkpoint)
    state = {
        key: torch.empty(of.size, dtype=of.properties.dtype)
        for key, of in reader.read_metadata().state_dict_metadata.items()
        if isinstance(of, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


def main() -> int:
    """Print the faults and the comparison as JSON; 1 if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    root = given.directory.resolve()
    root.mkdir(parents=True)
    prepare(root)
    whole = start(root, root / "whole", given.steps)
    wait(whole, root / "whole", None)
    if whole.returncode != 0:
        raise SystemExit(f"the run without faults ended with {whole.returncode}: {root / 'whole.log'}")
    faults = soak(root, root / "killed", given.steps, given.kills, given.seed)
    gone(root / "killed")
    result = compare(root / "whole", root / "killed", given.steps)
    answer = {"date": date.today().isoformat(), "steps": given.steps, "faults": faults, **result}
    print(json.dumps(answer, indent=1))
    if given.out:
        given.out.write_text(json.dumps(answer, indent=1) + "\n")
    equal = result["metrics_equal"] and result["tensors_equal"] and result["documents_equal"]
    return 0 if equal and not result["partial_checkpoints"] and len(faults) == given.kills else 1


if __name__ == "__main__":
    raise SystemExit(main())
