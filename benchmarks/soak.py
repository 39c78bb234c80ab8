"""Whether runs that are harmed at random, again and again, end as those that nothing disturbed.

    python -m benchmarks.soak DIRECTORY --minutes 60 [--seed 0] [--out FILE.json]   (make soak MINUTES=60)

In rounds, until the minutes are over. A round takes the next kind of run (supervised; GSPO with servers that
it starts, or with one behind a network that can be torn; GSPO beside training; preferences; adapters; agents
that are processes and ask through a gateway in the rank) and harms it at steps that are drawn too
(benchmarks/soak_harm.py): SIGKILL, SIGTERM, SIGSTOP of the launcher, a rank, the server, a worker of the
reward or an agent, a full disk, a torn network. Where that ends the run, once and with the exit code for it,
`--resume` continues it. Every harm has a witness. Fails unless, after each round, metrics (but for times),
tensors, random states and the place in the data are bit by bit those of the run that nothing disturbed;
where generation runs beside training, whose tokens depend on time, unless every step is there once, no token
is older than the bound, all samples are accounted for and none is void but those of harmed agents. No
process and no half-written checkpoint may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from benchmarks.outputs import output_file
from benchmarks.soak_harm import Cut, Target, harm, small_disk
from mcore_rl.checkpoint import committed, find
from mcore_rl.log import read_metrics
from mcore_rl.metric_names import MEASURED
from mcore_rl.rollout.processes import Embedded, LocalServer

ROOT = Path(__file__).parents[1]
MCORE_RL = [sys.executable, "-m", "mcore_rl"]
STALLED = 900.0
"""seconds without a further step after which a run counts as hung"""
STEP_TIMEOUT = 400
"""`train.step_timeout`: what a step takes on a busy machine, and less than `soak_harm.LONG`"""
GONE = 120.0
"""seconds after the end of a run in which all its processes must have ended"""
STEPS = 16
HARMS = 4
"""in a round"""
SERVERS = ("mismatch/", "behaviour/", "kl/rollout")
"""metrics of a server's log-probs, which are compared and not trained by"""
RESTARTS = 30
"""of one run; more mean that it does not get on"""


@dataclass(frozen=True)
class Kind:
    """A kind of run."""

    name: str
    config: str
    flags: tuple[str, ...] = ()
    exact: bool = True
    """it ends bitwise as without harm"""
    torn: bool = False
    """its server is not its own, and the network to it can be torn; what is said of its log-probs, whose last
    bits depend on which requests meet in it, is not compared"""
    agents: bool = False
    """its rollouts are processes of their own"""


PATIENT = (
    *("--rollout.start_timeout", "390", "--rollout.timeout", "350", "--rollout.health_timeout", "200"),
    *("--reward.timeout", "300"),
)
"""on a busy machine slow is not lost, and no sample void that nobody harmed"""
_RL = ("--rollout.prompts_per_step", "16", "--rollout.samples_per_prompt", "4", "--train.eval_every", "0")
_STALE = ("--rollout.max_staleness", "1", "--algorithm.params.correction", "tis-token")
_AGENTS = (
    *("--environment.function", "benchmarks.soak_agent:play", "--environment.max_turns", "2"),
    *("--environment.timeout", "300", "--environment.turn_timeout", "300"),
    *("--environment.max_tokens", "200", "--data.max_prompt_tokens", "64", "--reward.max_void", "0.9"),
)
_FEW = ("--rollout.prompts_per_step", "4", "--rollout.samples_per_prompt", "2", "--train.eval_every", "0")
KINDS = [
    Kind(
        "supervised", "examples/sft_tiny.toml", ("--supervised.batch_size", "16", "--train.eval_every", "0")
    ),
    Kind("gspo", "examples/gspo_tiny.toml", (*_RL, "--rollout.threads", "1")),
    Kind("gspo over a network", "examples/gspo_tiny.toml", _RL, torn=True),
    Kind(
        "gspo beside generation",
        "examples/gspo_tiny.toml",
        (*_RL, *_STALE, "--rollout.threads", "1"),
        exact=False,
    ),
    Kind(
        "preferences",
        "examples/sft_tiny.toml",
        ("--run.kind", "preference", "--supervised.batch_size", "16", "--train.eval_every", "0"),
    ),
    Kind(
        "gspo with adapters",
        "examples/gspo_tiny.toml",
        (*_RL, "--rollout.threads", "1", "--lora.rank", "4", "--lora.alpha", "8"),
    ),
    Kind(
        "agents beside generation",
        "examples/gspo_tiny.toml",
        (*_FEW, *_STALE, *_AGENTS, "--rollout.threads", "1"),
        exact=False,
        agents=True,
    ),
]


class Soak:
    """Rounds in one directory, which must not be there yet."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self._drawn = root, random.Random(seed)
        self._whole: dict[str, Path] = {}
        """name of a kind -> its run without harm, where there was one"""
        root.mkdir(parents=True)
        self._prepare()

    def _prepare(self) -> None:
        """The demo's problems, and a policy that answers some of them."""
        data = self.root / "data"
        command = [sys.executable, "examples/arithmetic.py", data, "--seed", "0"]
        subprocess.run(command, cwd=ROOT, check=True, timeout=600)
        rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
        pairs = [
            {"prompt": row["prompt"], "chosen": row["label"], "rejected": row["label"][::-1] + "0"}
            for row in rows
        ]
        (data / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        start = [
            "examples/sft_tiny.toml",
            "--model.path",
            data / "model",
            "--run.dir",
            self.root / "warm_start",
        ]
        flags = ["--data.train", data / "train.jsonl", "--train.steps", "100", "--train.eval_every", "0"]
        with (self.root / "warm_start.log").open("wb") as log:
            command = [*MCORE_RL, "train", *start, *flags]
            subprocess.run(command, cwd=ROOT, check=True, timeout=1800, stdout=log, stderr=log)

    @staticmethod
    def kind(number: int) -> Kind:
        """What the round of this number runs."""
        return KINDS[number % len(KINDS)]

    def round(self, number: int) -> dict[str, Any]:
        """A run that is harmed, beside one that is not: what was done, and what came of it."""
        kind = self.kind(number)
        if kind.exact and kind.name not in self._whole:
            self._whole[kind.name] = self._undisturbed(kind)
        with small_disk(self.root / f"round_{number}", 512) as disk:
            directory = self.root / f"round_{number}" / "run"
            with self._way(kind, directory) as way:
                harms = self._harmed(kind, directory, disk, way)
            gone(directory)
            shutil.copytree(
                directory, self.root / f"round_{number}_end", ignore=shutil.ignore_patterns("*.distcp")
            )
            found = {"kind": kind.name, "harms": harms, "partial_checkpoints": partial(directory)}
            found["ended_as_said"] = all(map(ended_as_said, harms))
            if not committed(directory / "checkpoints") or steps_done(directory) < STEPS:
                found["finished"] = False
            elif kind.exact:
                found |= compare(self._whole[kind.name], directory, SERVERS if kind.torn else ())
            else:
                found |= accounted(directory, sum(one["of"] == "agent" for one in harms))
        return found

    def _undisturbed(self, kind: Kind) -> Path:
        directory = self.root / kind.name.replace(" ", "_") / "run"
        shutil.rmtree(directory.parent, ignore_errors=True)  # of a round that went wrong
        directory.parent.mkdir()
        with self._way(kind, directory) as way:
            run = self._start(kind, directory, way)
            wait(run, directory, None)
        if run.returncode != 0:
            raise SystemExit(f"the run without harm ended with {run.returncode}: {log_of(directory)}")
        return directory

    @contextmanager
    def _way(self, kind: Kind, directory: Path) -> Iterator[Cut | None]:
        """A server of nobody's run, and the network to it, where the kind asks for one."""
        if not kind.torn:
            yield None
            return
        log = log_of(directory).with_suffix(".server.log")
        model = self.root / "warm_start/model"
        with LocalServer(model, Embedded(threads=1), log_file=log, start_timeout=STEP_TIMEOUT) as server:
            way = Cut(server.url)
            try:
                yield way
            finally:
                way.close()

    def _harmed(
        self, kind: Kind, directory: Path, disk: Path | None, way: Cut | None
    ) -> list[dict[str, Any]]:
        drawn = self._drawn
        run, restarts = self._start(kind, directory, way), 0
        harms: list[dict[str, Any]] = []
        due = sorted(drawn.sample(range(2, STEPS - 1), HARMS))
        while True:
            if wait(run, directory, due[0] if due else None):
                time.sleep(drawn.uniform(0, 0.5))
                done = steps_done(directory)
                due = [step for step in due[1:] if step > done] or due[1:][-1:]
                found = harm(Target(run, disk, way), drawn)
                if found:
                    harms.append({"step": done, **found})
                continue
            if run.returncode == 0:
                return harms
            if not harms:
                raise SystemExit(f"it ended with {run.returncode} before any harm: {log_of(directory)}")
            harms[-1].setdefault("exit_codes", []).append(run.returncode)
            restarts += 1
            if restarts > RESTARTS:
                raise SystemExit(f"{RESTARTS} restarts did not bring it to its end: {log_of(directory)}")
            gone(directory)
            run = self._start(kind, directory, way, "--resume")

    def _start(self, kind: Kind, directory: Path, way: Cut | None, *resume: str) -> subprocess.Popen[bytes]:
        """A run whose output is appended to a file beside its directory."""
        data = self.root / "data"
        model = data / "model" if kind.name == "supervised" else self.root / "warm_start/model"
        rows = data / ("pairs.jsonl" if kind.name == "preferences" else "train.jsonl")
        flags = ["--model.path", model, "--data.train", rows, "--run.dir", directory]
        flags += ["--optimizer.warmup_steps", "0", "--checkpoint.every", "1", "--checkpoint.keep", "3"]
        flags += ["--train.step_timeout", STEP_TIMEOUT]
        if kind.config == "examples/gspo_tiny.toml":
            flags += ["--data.eval", data / "eval.jsonl", *PATIENT]
        else:
            flags += ["--model.random_init", "true" if kind.name == "supervised" else "false"]
        if kind.agents:
            flags += ["--environment.args.run", directory]
        if way is not None:
            flags += ["--rollout.urls", json.dumps([way.url])]
        with log_of(directory).open("ab") as log:
            return subprocess.Popen(
                [
                    *MCORE_RL,
                    "train",
                    kind.config,
                    *map(str, flags),
                    *kind.flags,
                    "--train.steps",
                    str(STEPS),
                    *resume,
                ],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )


def log_of(directory: Path) -> Path:
    """What a run says; not on the disk that is filled."""
    return directory.parent.parent / f"{directory.parent.name}_{directory.name}.log"


def steps_done(directory: Path) -> int:
    """The last step in metrics.jsonl, which another process may be writing."""
    with suppress(FileNotFoundError, IndexError, ValueError):
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
            raise SystemExit(f"no step after step {last} in {STALLED:.0f} s: {log_of(directory)}")
        time.sleep(0.02)
    return False


def gone(directory: Path) -> None:
    """No process that names the directory is left after a while."""
    end = time.monotonic() + GONE
    while left := [each for each in psutil.process_iter(["cmdline"]) if str(directory) in named_by(each)]:
        if time.monotonic() > end:
            raise SystemExit(f"processes are left: {left}")
        time.sleep(0.1)


def end_all(directory: Path) -> None:
    """Ends what a round that went wrong has left."""
    for each in psutil.process_iter(["cmdline"]):
        if f"{directory}/" in named_by(each):
            with suppress(psutil.NoSuchProcess):
                each.kill()


def named_by(process: psutil.Process) -> str:
    """The command line that `process_iter` read."""
    return " ".join(process.info["cmdline"] or [])


def partial(directory: Path) -> list[str]:
    """Half-written checkpoints that are left."""
    return [path.name for path in (directory / "checkpoints").glob("*.partial*")]


def ended_as_said(harm: dict[str, Any]) -> bool:
    """Whether a harm ended the run once at most, with the exit code for what a restart goes on from."""
    code = -9 if (harm["harm"], harm["of"]) == ("SIGKILL", "launcher") else 75
    return harm.get("exit_codes", []) in ([], [code])


def accounted(directory: Path, harmed: int) -> dict[str, Any]:
    """Whether every step is there once, every token young enough, and no sample lost or counted twice.

    Args:
        directory: the run's.
        harmed: its agents that were; no other rollout may be void.
    """
    lines = read_metrics(directory / "metrics.jsonl")
    last = lines[-1]
    void = int(sum(line.get("void", 0.0) for line in lines))
    parts = {key: last[key] for key in last if key.startswith("async/") and key != "async/asked"}
    return {
        "steps_once": [line["step"] for line in lines] == list(range(STEPS + 1)),
        "young_enough": max(line.get("staleness/max", 0.0) for line in lines) <= 1.0,
        "samples_equal": last["async/asked"] == sum(parts.values()),
        "void": void,
        "void_are_the_harmed": void <= harmed,
    }


def compare(one: Path, other: Path, apart: tuple[str, ...]) -> dict[str, Any]:
    """What the two directories hold, and whether it is the same, but for metrics that begin with `apart`."""
    lines, tensors, documents = [], [], []
    for directory in (one, other):
        measured = read_metrics(directory / "metrics.jsonl")
        lines.append(
            [{key: line[key] for key in line if not key.startswith((*MEASURED, *apart))} for line in measured]
        )
        found = find(directory / "checkpoints", str(directory / f"checkpoints/step_{STEPS}"))
        documents.append({key: found.document[key] for key in ("updates", "state", "rng", "layout")})
        tensors.append(stored(found.path))
    same = tensors[0].keys() == tensors[1].keys()
    return {
        "metric_lines": [len(each) for each in lines],
        "metrics_equal": lines[0] == lines[1],
        "tensors": len(tensors[0]),
        "tensors_equal": same and all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0]),
        "documents_equal": documents[0] == documents[1],
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


def sound(round: dict[str, Any]) -> bool:
    """Whether a round ended as it must, and every harm of it was done."""
    verdicts = [value for value in round.values() if isinstance(value, bool)]
    return (
        all(verdicts)
        and not round.get("partial_checkpoints")
        and all(one["witness"] for one in round["harms"])
    )


def main() -> int:
    """Write the rounds as JSON after each of them; 1 if anything of any is not as it must be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=output_file)
    given = parser.parse_args()
    soak = Soak(given.directory.resolve(), given.seed)
    began = time.monotonic()
    rounds: list[dict[str, Any]] = []
    answer: dict[str, Any] = {}
    while not rounds or time.monotonic() - began < 60 * given.minutes:
        try:
            rounds.append(soak.round(len(rounds)))
        except SystemExit as error:
            print(error, file=sys.stderr, flush=True)
            end_all(soak.root)
            rounds.append({"kind": soak.kind(len(rounds)).name, "harms": [], "ended": False})
        minutes = (time.monotonic() - began) / 60
        done = [one for each in rounds for one in each["harms"]]
        print(
            f"round {len(rounds)} ({rounds[-1]['kind']}): {'sound' if sound(rounds[-1]) else 'NOT SOUND'}; "
            f"{len(done)} harms in {minutes:.1f} of {given.minutes:g} minutes",
            file=sys.stderr,
            flush=True,
        )
        answer = {
            "date": date.today().isoformat(),
            "seed": given.seed,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "minutes": round(minutes, 1),
            "load": [round(each, 1) for each in os.getloadavg()],
            "harms": len(done),
            "sound": all(map(sound, rounds)),
            "rounds": rounds,
        }
        if given.out:
            given.out.write_text(json.dumps(answer, indent=1) + "\n")
    print(json.dumps(answer, indent=1))
    return int(not all(map(sound, rounds)))


if __name__ == "__main__":
    raise SystemExit(main())
