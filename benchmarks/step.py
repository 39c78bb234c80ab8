"""CPU-seconds of GRPO steps: this project against TRL's GRPOTrainer, the same model, prompts and tokens.

    python benchmarks/step.py --trl-python .venv-trl/bin/python [--sizes small large] [--steps 9]
        [--out benchmarks/step_DATE.json]

Both sides start from one Hugging Face directory (a Qwen2 of 3.08 M parameters, vocabulary 8192, float32) and
take one optimizer step per rollout: 2 prompts, 8 responses of a fixed length each, no KL, Adam. They are
processes of one thread that take turns step by step, so that a busy machine disturbs both alike; a figure is
the median after one step of warm-up. What is counted is CPU time (user and system, all threads; gloo's idle
listeners excepted, whose time is that of the wall):

- generate: TRL's call of `model.generate`; here the rollout, which is the embedded server's CPU time and that
  of the trainer while it asks, HTTP included.
- publish: weights to the server and the comparison of log-probs. TRL samples from the model in training.
- train: everything else of the step, from rewards to metrics that are written.

The sizes `real` and `real_128` (16 and 128 responses of 32 tokens) take SmolLM2-135M-Instruct, which `make
real-model` downloads. `peak_mib` is the largest memory of the trainer's process in the steps; a step of 128
has 8 micro-batches on both sides.

Before the first step both sides compute loss and gradient of the same random sequences (different lengths,
ratios beyond both sides of the clip), which have to agree; with one advantage changed they must not. `fixed`
is what a step costs whatever its size: the train part with a null model (one layer of 16 channels, responses
of one token), less Megatron's passes through it and its update, which are `smallest` with them. TRL needs an
environment of its own:

    python -m venv .venv-trl && .venv-trl/bin/pip install -c constraints.txt torch transformers trl==1.16.0
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.outputs import output_file

ROOT = Path(__file__).parents[1]
LIMITS = {"train": 2.1, "step": 1.7, "fixed_ms": 5.0, "loss_error": 1e-5, "gradient_error": 1e-4}
"""how often faster than TRL; milliseconds; errors of the witness"""
REAL_LIMITS = {
    "real": {"train": 1 / 0.70, "step": 1 / 0.85, "less_memory": 1 / 0.8},
    "real_128": {"train": 1 / 0.65, "step": 1 / 0.72, "less_memory": 1 / 0.8},
}
"""of a model whose cost is its GEMMs, which both sides have"""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Size:
    """What one step samples and trains on."""

    prompt_tokens: int
    new_tokens: int
    """of each response"""
    layers: int = 4
    hidden: int = 128
    vocab: int = 8192
    prompts_per_step: int = 2
    samples_per_prompt: int = 8
    lr: float = 1e-5
    probe_sequences: int = 1
    """compared after a publish, but for publish.probe_share: of 16, where the default is 8 of 512"""
    sequences: int = 16
    """of a micro-batch, on both sides"""
    model: str = ""
    """a directory whose model takes the place of the one of these sizes"""


REAL = "runs/real/model"
"""SmolLM2-135M-Instruct, as `make real-model` leaves it"""
SIZES = {"small": Size(32, 64), "large": Size(64, 256)}
SIZES |= {
    "real": Size(45, 32, probe_sequences=8, model=REAL),
    "real_128": Size(45, 32, prompts_per_step=16, probe_sequences=8, model=REAL),
}
FIXED = Size(4, 1, layers=1, hidden=16, vocab=64)


def write_task(directory: Path, size: Size) -> dict[str, Any]:
    """Model, tokenizer of one token per letter, and prompts; returns what both sides are told."""
    paths = {"model": "model", "prompts": "prompts.jsonl", "witness": "witness", "run_dir": "run"}
    task = asdict(size) | {name: str(directory / path) for name, path in paths.items()}
    _write_prompts(directory, string.digits if size.model else string.ascii_lowercase, size.prompt_tokens)
    if size.model:  # its tokenizer has a token for every digit
        return task | {"model": str(ROOT / size.model)}
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, set_seed

    known = ["<pad>", "<eos>", "<unk>", *map(chr, range(ord("a"), ord("z") + 1))]
    known += [f"word{i}" for i in range(len(known), size.vocab)]
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(known)}, merges=[], **special)
    set_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=size.vocab,
            hidden_size=size.hidden,
            intermediate_size=4 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    return task


def _write_prompts(directory: Path, letters: str, tokens: int) -> None:
    drawn = random.Random(0)
    with (directory / "prompts.jsonl").open("w") as file:
        for row in range(64):
            prompt = "".join(drawn.choices(letters, k=tokens))
            file.write(json.dumps({"id": str(row), "prompt": prompt, "label": ""}) + "\n")


class Side:
    """A process that takes one step whenever it is asked."""

    def __init__(self, python: str, script: str, task: dict[str, Any], log: Path) -> None:
        self.name, self.log = script, log
        self._file = log.open("wb")
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
        if script == "step_mcore.py":  # as its command does; TRL has no such thing
            environment |= {"THP_MEM_ALLOC_ENABLE": "1"}
        self._process = subprocess.Popen(
            [python, str(ROOT / "benchmarks" / script), json.dumps(task)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._file,
            text=True,
        )
        self.ready = self._answer()
        """what it said of itself once it was set up"""

    def step(self) -> dict[str, float]:
        """CPU-seconds by what was done, and tokens."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """The end of its input is the end of the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._file.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise SystemExit(f"{self.name} ended:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)


@contextmanager
def sides(size: Size, pythons: dict[str, str]) -> Iterator[list[Side]]:
    """The processes of one size; the first leaves the witness that later ones compare with."""
    opened: list[Side] = []
    with tempfile.TemporaryDirectory(prefix="mcore_rl_step_") as scratch:
        task = write_task(Path(scratch), size)
        try:
            for script, python in pythons.items():
                opened.append(Side(python, script, task, Path(scratch) / f"{script}.log"))
            yield opened
        finally:
            for side in opened:
                side.close()


def measure(opened: Sequence[Side], steps: int) -> list[list[dict[str, float]]]:
    """[sides][steps]: the sides take turns, after one step each that is not counted."""
    rounds = [[side.step() for side in opened] for _ in range(steps + 1)]
    return [list(answers) for answers in zip(*rounds[1:], strict=True)]


def summary(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians in seconds."""
    whole = [{**one, "step": one["generate"] + one["train"] + one["publish"]} for one in steps]
    return {name: round(median(one[name] for one in whole), 5) for name in whole[0]}


def compare(size: Size, steps: int, trl_python: str) -> dict[str, Any]:
    """Both sides at one size."""
    with sides(size, {"step_mcore.py": sys.executable, "step_trl.py": trl_python}) as opened:
        about = opened[1].ready
        ours, trl = measure(opened, steps)
    middle = {"mcore_rl": summary(ours), "trl": summary(trl)}
    ratios = {
        name: round(middle["trl"][name] / middle["mcore_rl"][name], 3)
        for name in ("train", "generate", "step")
    }
    memory = {side: max(one["peak_mib"] for one in its) for side, its in (("ours", ours), ("trl", trl))}
    ratios["less_memory"] = round(memory["trl"] / memory["ours"], 3)
    steps_of = {"mcore_rl": ours, "trl": trl}
    return {"size": asdict(size), "median": middle, "faster": ratios, "steps": steps_of, **about}


def fixed_ms(steps: int) -> dict[str, float]:
    """Milliseconds of the train part where nothing is to be computed: without Megatron, and with it."""
    with sides(FIXED, {"step_mcore.py": sys.executable}) as opened:
        (ours,) = measure(opened, steps)
    middle = summary(ours)
    return {"fixed": round(1000 * middle["driver"], 2), "smallest": round(1000 * middle["train"], 2)}


def missed(result: dict[str, Any]) -> list[str]:
    """Limits that do not hold."""
    fixed = result["milliseconds"]["fixed"]
    found = [] if fixed <= LIMITS["fixed_ms"] else [f"fixed cost {fixed} ms"]
    for name, one in result["sizes"].items():
        limits = LIMITS | REAL_LIMITS.get(name, {})
        found += [
            f"{name}: {part} {one['faster'][part]} x"
            for part in ("train", "step", "less_memory")
            if part in limits and one["faster"][part] < limits[part]
        ]
        found += [
            f"{name}: witness {error} {one['witness'][error]:.1e}"
            for error in ("loss_error", "gradient_error")
            if not one["witness"][error] <= LIMITS[error] < one["control"][error]
        ]
        if len({one["median"][side]["tokens"] for side in ("mcore_rl", "trl")}) > 1:
            found.append(f"{name}: the sides did not train on equally many tokens")
    return found


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'CPU-seconds':12}{'':10}{'generate':>10}{'publish':>10}{'train':>10}{'step':>10}"]
    for name, one in result["sizes"].items():
        for side, values in one["median"].items():
            parts = "".join(f"{values[part]:10.3f}" for part in ("generate", "publish", "train", "step"))
            lines.append(f"{name:12}{side:10}{parts}")
        faster = one["faster"]
        lines.append(
            f"{'':12}{'faster':10}{faster['generate']:9.2f}x{'':10}{faster['train']:9.2f}x{faster['step']:9.2f}x"
        )
    fixed, smallest = result["milliseconds"]["fixed"], result["milliseconds"]["smallest"]
    return "\n".join([*lines, f"fixed cost of a step: {fixed} ms, {smallest} ms with the smallest model"])


def main() -> int:
    """0 when every limit holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="an interpreter that has TRL")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "large"])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--out", type=output_file, default=ROOT / "benchmarks" / f"step_{date.today()}.json")
    options = parser.parse_args()
    result = {
        "date": str(date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {name: version(name) for name in ("torch", "megatron-core", "transformers")},
        "limits": LIMITS,
        "milliseconds": fixed_ms(options.steps),
        "sizes": {name: compare(SIZES[name], options.steps, options.trl_python) for name in options.sizes},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    problems = missed(result)
    print("\n".join(f"LIMIT MISSED: {problem}" for problem in problems))
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
