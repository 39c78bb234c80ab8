"""The other side of benchmarks/trl_kinds.py: TRL's trainers, in an environment of their own."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]  # of TRL's environment
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]


class FirstGradient(TrainerCallback):
    """Keeps the gradient of the first step."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before any weight changes; nothing is clipped."""
        if state.global_step == 0:
            named = kwargs["model"].named_parameters()
            save_file({name: one.grad.clone() for name, one in named if one.grad is not None}, self.file)


def settings(task: dict[str, Any], steps: int) -> dict[str, Any]:
    """What both trainers are told: float32, nothing recomputed, saved or shuffled, Adam as ours."""
    return {
        "output_dir": f"{task['out']}/trl",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": task["batch"],
        "train_sampling_strategy": "sequential",
        "learning_rate": task["lr"],
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "adam_epsilon": task["eps"],
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "max_steps": steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def train(task: dict[str, Any], kind: str, name: str, steps: int, **changed: Any) -> None:
    """Leave OUT/NAME_KIND_gradient.safetensors and OUT/NAME_KIND_weights.safetensors."""
    rows = [json.loads(line) for line in Path(task["rows"]).read_text().splitlines()]
    keys = {"sft": {"prompt": "prompt", "completion": "label"}}
    keys["dpo"] = {key: key for key in ("prompt", "chosen", "rejected")}
    data = Dataset.from_list([{key: row[of] for key, of in keys[kind].items()} for row in rows])
    config, trainer = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer)}[kind]
    own = {"beta": task["beta"]} if kind == "dpo" else {}
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    trainer(
        model=model,
        args=config(**{**settings(task, steps), **own, **changed}),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
        callbacks=[FirstGradient(Path(task["out"]) / f"{name}_{kind}_gradient.safetensors")],
    ).train()
    weights = {key: one.detach().clone() for key, one in model.named_parameters()}
    save_file(weights, Path(task["out"]) / f"{name}_{kind}_weights.safetensors")


def main() -> None:
    """Train both kinds, and take the gradients of the controls.

    Raises:
        RuntimeError: this is another version of TRL than the one that is compared.
    """
    task = json.loads(sys.argv[1])
    if version("trl") != task["trl"]:
        raise RuntimeError(f"TRL {version('trl')} is installed; the comparison is with {task['trl']}")
    for kind in ("sft", "dpo"):
        train(task, kind, "trl", task["steps"])
    train(task, "sft", "control", 1, completion_only_loss=False)
    train(task, "dpo", "control", 1, beta=1.01 * task["beta"])


if __name__ == "__main__":
    main()
