"""Supervised and preference training against TRL's SFTTrainer and DPOTrainer: gradients and weights.

    python -m benchmarks.trl_kinds --trl-python .venv-trl/bin/python [--out benchmarks]

Both sides start from one Hugging Face directory (a Qwen3 of two layers, float32), read the same rows in the
order of the file and take five steps of AdamW on eight rows each. Compared, by the names that Hugging Face
gives: the gradient of the first step, per tensor |difference| / its largest entry (at least 1e-6 of the
largest of all); and the weights at the end, |difference| / the largest movement of any weight. As a control
TRL's first gradient is taken once more with one number changed (beta of DPO by a hundredth; for SFT the
prompts trained as well), which has to be seen.

Adam divides by the size of a gradient, so that one which is all rounding moves its weight by a whole step.
The limits hold with an eps above that rounding; `usual_eps` says what is left with the default of both sides:
how many weights are beyond the limit, and how large the gradients there are beside their tensor's largest.
TRL needs an environment of its own:

    python -m venv .venv-trl && .venv-trl/bin/pip install trl==1.16.0

Writes OUT/trl_kinds_DATE.json; exits with 1 where a limit is exceeded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.outputs import output_directory

ROOT = Path(__file__).parents[1]
STEPS, ROWS, LR, BETA = 5, 8, 1e-3, 0.1
EPS, USUAL_EPS = 1e-5, 1e-8
"""of Adam: above the rounding of float32 gradients, and the default of both sides"""
LIMITS = {"gradient": 1e-5, "weights": 3e-4}
"""largest errors; the control's gradient has to exceed the first a hundred times"""
KINDS = ("sft", "dpo")
TRL = "1.16.0"


def write_task(directory: Path, eps: float) -> dict[str, Any]:
    """A model with weights, its tokenizer, and rows that both kinds read; what both sides are told."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    from examples.arithmetic import main as write_arithmetic

    sizes = ["--train", "60", "--eval", "1", "--layers", "2", "--hidden", "128"]
    assert write_arithmetic([str(directory), *sizes]) == 0
    model = directory / "model"
    set_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
    rows = [json.loads(line) for line in (directory / "train.jsonl").read_text().splitlines()]
    with (directory / "rows.jsonl").open("w") as file:
        for row in rows[: STEPS * ROWS]:
            pair = {"chosen": row["label"], "rejected": row["label"][::-1] + "1"}
            file.write(json.dumps(row | pair) + "\n")
    return {
        "model": str(model),
        "rows": str(directory / "rows.jsonl"),
        "out": str(directory),
        "steps": STEPS,
        "batch": ROWS,
        "lr": LR,
        "beta": BETA,
        "eps": eps,
        "trl": TRL,
    }


def train_ours(task: Mapping[str, Any], kind: str) -> None:
    """Leave OUT/ours_KIND_gradient.safetensors and OUT/ours_KIND_weights.safetensors; one rank, no cursor."""
    from mcore_rl.config import load_config
    from mcore_rl.model.residency import Residency
    from mcore_rl.model.weights_io import global_parameters
    from mcore_rl.training import preference, supervised
    from mcore_rl.training.model_passes import run_update
    from mcore_rl.training.reference import start_reference
    from mcore_rl.training.session import examples, start_model
    from mcore_rl.weights.buckets import gather

    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"})
    file = Path(task["out"]) / f"{kind}.toml"
    file.write_text(config_of(task, kind))
    config = load_config(file)
    with start_model(config, None) as trainer:
        optimizer, model, shape = trainer.optimizer, trainer.policy, trainer.shape
        rows = examples(trainer.prompts.prompts[: task["steps"] * task["batch"]])
        loss, residency = preference.loss_of(config), Residency({})
        given = (config, model, shape, trainer.prompts, trainer.attempt.reached)
        reference = start_reference(*given) if kind == "dpo" else None
        parameters = global_parameters(model.unwrapped)
        for step in range(task["steps"]):
            batch = rows[step * task["batch"] : (step + 1) * task["batch"]]
            if kind == "sft":
                update = supervised.supervised_update(optimizer, shape, batch, step)
            else:
                fields = preference.score(loss, reference, residency, batch, shape.tokens_per_micro_batch)
                update = preference.preference_update(optimizer, shape, loss, batch, fields, step)
            run_update(update, residency, lambda update: "")
            if step == 0:
                gradient = {name: vars(one)["main_grad"].clone() for name, one in parameters.items()}
                _save(task, f"ours_{kind}_gradient", gather(gradient, model.mapping, model.mesh))
        weights = {name: one.detach() for name, one in parameters.items()}
        _save(task, f"ours_{kind}_weights", gather(weights, model.mapping, model.mesh))


def config_of(task: Mapping[str, Any], kind: str) -> str:
    """A run's TOML."""
    of_kind = {"sft": "", "dpo": f"[preference]\nbeta = {task['beta']}\n"}[kind]
    return f"""
[run]
dir = "{task["out"]}/run_{kind}"
kind = "{"preference" if kind == "dpo" else "sft"}"
[model]
path = "{task["model"]}"
[data]
train = "{task["rows"]}"
[train]
steps = {task["steps"]}
tokens_per_micro_batch = 128
[supervised]
batch_size = {task["batch"]}
[optimizer]
lr = {task["lr"]}
eps = {task["eps"]}
clip_grad = 0.0
{of_kind}"""


def _save(task: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]) -> None:
    whole = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    save_file(whole, Path(task["out"]) / f"{name}.safetensors")


def errors_of(directory: Path, kind: str) -> dict[str, float]:
    """How far the two sides are from each other."""

    def read(name: str) -> dict[str, Tensor]:
        return load_file(directory / f"{name}.safetensors")

    start, ours, theirs = read("model/model"), read(f"ours_{kind}_weights"), read(f"trl_{kind}_weights")
    moved = max((theirs[name] - start[name]).abs().max().item() for name in theirs)
    gaps = {name: (theirs[name] - ours[name]).abs() / moved for name in theirs}
    beyond = {name: gap > LIMITS["weights"] for name, gap in gaps.items()}
    gradient = read(f"trl_{kind}_gradient")
    sizes = [(one.abs() / one.abs().max())[beyond[name]] for name, one in gradient.items()]
    return {
        "gradient": of_gradients(read(f"ours_{kind}_gradient"), gradient),
        "weights": max(gap.max().item() for gap in gaps.values()),
        "beyond": sum(int(its.sum()) for its in beyond.values()),
        "of": sum(its.numel() for its in beyond.values()),
        "gradients_beyond": torch.cat([torch.zeros(1), *sizes]).max().item(),
        "movement": moved,
        "control": of_gradients(read(f"ours_{kind}_gradient"), read(f"control_{kind}_gradient")),
    }


def of_gradients(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Largest over tensors of |difference| / max(its largest entry, 1e-6 of the largest of all)."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    largest = max(tensor.abs().max().item() for tensor in theirs.values())
    return max(
        ((ours[name] - tensor).abs().max() / max(tensor.abs().max().item(), 1e-6 * largest)).item()
        for name, tensor in theirs.items()
    )


def exceeded(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What is beyond its limit, in words."""
    failed = [
        f"{kind}: {name} {errors[name]:.1e}, at most {limit:g}"
        for kind, errors in found.items()
        for name, limit in LIMITS.items()
        if not errors[name] <= limit
    ]
    blind = [kind for kind, errors in found.items() if not errors["control"] > 100 * LIMITS["gradient"]]
    return failed + [f"{kind}: the control is not seen" for kind in blind]


def compare(trl_python: str, eps: float) -> dict[str, dict[str, float]]:
    """The errors of every kind, of runs with this eps."""
    with tempfile.TemporaryDirectory(prefix="mcore_rl_trl_") as scratch:
        task = write_task(Path(scratch), eps)
        for kind in KINDS:
            train_ours(task, kind)
        command = [trl_python, str(ROOT / "benchmarks" / "trl_trainers.py"), json.dumps(task)]
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(command, check=True, env=os.environ | quiet)
        return {kind: errors_of(Path(scratch), kind) for kind in KINDS}


def main() -> int:
    """Train on both sides and compare: 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl-python", required=True, help="an interpreter that has TRL")
    parser.add_argument("--out", type=output_directory, default=ROOT / "benchmarks")
    options = parser.parse_args()
    found, usual = (compare(options.trl_python, eps) for eps in (EPS, USUAL_EPS))
    record = {
        "benchmark": "SFT and DPO against TRL's trainers: the same model, rows and updates",
        "date": date.today().isoformat(),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "versions": {"torch": torch.__version__, "megatron-core": version("megatron-core"), "trl": TRL},
        "steps": STEPS,
        "limits": LIMITS,
        "eps": EPS,
        "errors": found,
        "usual_eps": {"eps": USUAL_EPS, "errors": usual},
    }
    (options.out / f"trl_kinds_{record['date']}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["errors"] | {"usual_eps": usual}, indent=1))
    failed = exceeded(found)
    print("\n".join(failed) or "within all limits", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
