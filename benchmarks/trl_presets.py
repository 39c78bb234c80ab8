"""The presets named after TRL against its GRPOTrainer: weights after five updates on one rollout.

    python -m benchmarks.trl_presets --trl-python .venv-trl/bin/python [--out benchmarks]

Both sides start from one Hugging Face directory (a Qwen3 of two layers, float32) and are given the same
rollout: 4 prompts, 4 responses each, their token ids and rewards. TRL's trainer is asked by the setting that
docs/algorithms.md names for the preset, and takes five updates of AdamW on it (`num_iterations`), so that
ratios leave 1; here `learn` does. Without vLLM TRL corrects no mismatch, so `correction` is `none`. Compared:
|difference| / the largest movement of any weight. As a control each is also compared with TRL's trainer by
another setting. benchmarks/trl_kinds.py says why Adam's eps is above the rounding of a gradient (1e-3 here,
where gradients are larger; `smaller_eps` says what is left with 1e-4), and what environment TRL needs.

Writes OUT/trl_presets_DATE.json; exits with 1 where a limit is exceeded.
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
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.outputs import output_directory
from benchmarks.trl_kinds import LIMITS, ROOT, TRL, write_task

PROMPTS, SAMPLES, UPDATES, LR, LONGEST = 4, 4, 5, 1e-3, 8
EPS, SMALLER_EPS = 1e-3, 1e-4
"""of Adam: above the rounding of these losses' float32 gradients, and a tenth of it"""
_SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "trl-grpo": {},
    "trl-grpo-paper": {"loss_type": "grpo"},
    "trl-dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "trl-dr-grpo": {"loss_type": "dr_grpo"},
    "trl-gspo": {"loss_type": "grpo", **_SEQUENCE},
    "trl-luspo": {"loss_type": "luspo", **_SEQUENCE},
    "trl-sapo": {"loss_type": "sapo"},
    "trl-cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "trl-vespo": {"loss_type": "vespo"},
}
"""preset -> how TRL is asked for it"""
UNCORRECTED = ("trl-vespo",)
"""presets that have no correction anyway"""
CONTROL = 10 * LIMITS["weights"]
"""the least that another setting has to be away"""


def write_rollout(directory: Path, eps: float) -> dict[str, Any]:
    """What both sides are told: the model, prompts, responses of 1 to LONGEST tokens, and rewards."""
    from transformers import AutoTokenizer

    task = write_task(directory, eps)
    rows = [json.loads(line) for line in Path(task["rows"]).read_text().splitlines()][:PROMPTS]
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    special = set(tokenizer.all_special_ids)
    words = [number for number in tokenizer.get_vocab().values() if number not in special]
    rng = np.random.default_rng(1)
    prompts = [row["prompt"] for row in rows]
    count = PROMPTS * SAMPLES
    return task | {
        "batch": count,
        "steps": UPDATES,
        "lr": LR,
        "samples": SAMPLES,
        "max_new_tokens": LONGEST,
        "prompts": prompts,
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts for _ in range(SAMPLES)],
        "responses": [rng.choice(words, rng.integers(1, LONGEST + 1)).tolist() for _ in range(count)],
        "rewards": rng.choice([0.0, 0.25, 1.0], count).tolist(),
        "settings": {name: dict(own) for name, own in SETTINGS.items()},
    }


def train_ours(task: Mapping[str, Any], name: str) -> None:
    """Leave OUT/ours_NAME.safetensors; the loop's own `learn`, on one rank."""
    from mcore_rl.algo.algorithms import configure
    from mcore_rl.config import load_config
    from mcore_rl.model.residency import Residency
    from mcore_rl.model.weights_io import global_parameters
    from mcore_rl.training.assemble import build_models, learner_parts, policy_updates, waiting_parts
    from mcore_rl.training.batch import build_batch, by_sample, sampled_with, token_sequences
    from mcore_rl.training.loop import learn
    from mcore_rl.training.model_passes import log_probs
    from mcore_rl.training.run import Learner
    from mcore_rl.training.setup import start_trainer
    from mcore_rl.types import Group, Prompt, Sample, VersionSpan
    from mcore_rl.weights.buckets import gather

    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"})
    file = Path(task["out"]) / f"{name}.toml"
    file.write_text(config_of(task, name))
    config = load_config(file)
    algorithm = configure(config.algorithm.name, config.algorithm.params)
    groups = []
    for g, text in enumerate(task["prompts"]):
        prompt = Prompt(str(g), text, tuple(task["prompt_ids"][g * SAMPLES]), "")
        samples = []
        for k in range(SAMPLES):
            its, reward = task["responses"][g * SAMPLES + k], task["rewards"][g * SAMPLES + k]
            given = (tuple(its), (0.0,) * len(its), "", "stop", (VersionSpan("0", 0, len(its)),), reward)
            samples.append(Sample.of_response(f"{g}@1/{k}", prompt, *given))
        groups.append(Group(f"{g}@1", tuple(samples)))
    with start_trainer(config, optimizer_steps=policy_updates(config), resume=None) as trainer:
        models = build_models(trainer, algorithm, rewards=False)
        learner = Learner(**learner_parts(trainer, models, Residency(waiting_parts(config, models))))
        batch = build_batch(groups)
        scored = log_probs(trainer.policy, token_sequences(batch.samples), trainer.shape, trainer.temperature)
        own = by_sample(scored, batch.samples)
        learn(learner, replace(batch, samples=tuple(map(sampled_with, batch.samples, own))), 1)
        model = trainer.policy
        weights = {key: one.detach() for key, one in global_parameters(model.unwrapped).items()}
        whole = gather(weights, model.mapping, model.mesh)
        found = {key: one.contiguous().clone() for key, one in whole.items()}
        save_file(found, Path(task["out"]) / f"ours_{name}.safetensors")


def config_of(task: Mapping[str, Any], name: str) -> str:
    """A run's TOML."""
    params = "" if name in UNCORRECTED else 'params = { correction = "none" }'
    return f"""
[run]
dir = "{task["out"]}/run_{name}"
[model]
path = "{task["model"]}"
[data]
train = "{task["rows"]}"
max_prompt_tokens = 32
[rollout]
prompts_per_step = {PROMPTS}
samples_per_prompt = {SAMPLES}
max_new_tokens = {LONGEST}
[algorithm]
name = "{name}"
epochs = {UPDATES}
mini_batches = 1
{params}
[train]
steps = 1
tokens_per_micro_batch = 256
[optimizer]
lr = {task["lr"]}
eps = {task["eps"]}
clip_grad = 0.0
"""


def compare(trl_python: str, eps: float) -> dict[str, dict[str, float]]:
    """Of every preset: the error of the weights, the largest movement, and the error of the control."""
    with tempfile.TemporaryDirectory(prefix="mcore_rl_trl_") as scratch:
        directory = Path(scratch)
        task = write_rollout(directory, eps)
        (directory / "task.json").write_text(json.dumps(task))
        for name in SETTINGS:
            train_ours(task, name)
        command = [trl_python, str(ROOT / "benchmarks" / "trl_grpo_trainer.py"), str(directory / "task.json")]
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(command, check=True, env=os.environ | quiet)
        start = load_file(directory / "model" / "model.safetensors")
        names = list(SETTINGS)
        theirs = {name: load_file(directory / f"trl_{name}.safetensors") for name in names}
        found = {}
        for number, name in enumerate(names):
            ours, other = load_file(directory / f"ours_{name}.safetensors"), names[number - 1]
            moved = max((one - start[key]).abs().max().item() for key, one in theirs[name].items())
            error, control = (
                max((one - ours[key]).abs().max().item() for key, one in theirs[which].items()) / moved
                for which in (name, other)
            )
            found[name] = {"weights": error, "movement": moved, "control": control}
        return found


def main() -> int:
    """Train on both sides and compare: 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl-python", required=True, help="an interpreter that has TRL")
    parser.add_argument("--out", type=output_directory, default=ROOT / "benchmarks")
    options = parser.parse_args()
    found, smaller = (compare(options.trl_python, eps) for eps in (EPS, SMALLER_EPS))
    record = {
        "benchmark": f"presets against TRL's GRPOTrainer: weights after {UPDATES} updates on one rollout",
        "date": date.today().isoformat(),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count()},
        "versions": {"torch": torch.__version__, "megatron-core": version("megatron-core"), "trl": TRL},
        "limits": {"weights": LIMITS["weights"], "control at least": CONTROL},
        "settings": {name: dict(own) for name, own in SETTINGS.items()},
        "eps": EPS,
        "errors": found,
        "smaller_eps": {"eps": SMALLER_EPS, "errors": smaller},
    }
    (options.out / f"trl_presets_{record['date']}.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, its in found.items():
        print(f"{name:16} " + "  ".join(f"{key} {value:.1e}" for key, value in its.items()))
    failed = [name for name, its in found.items() if not its["weights"] <= LIMITS["weights"]]
    blind = [name for name, its in found.items() if not its["control"] >= CONTROL]
    print(f"beyond the limit: {failed}; blind: {blind}" if failed or blind else "within all limits")
    return 1 if failed or blind else 0


if __name__ == "__main__":
    sys.exit(main())
