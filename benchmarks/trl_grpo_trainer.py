"""The other side of benchmarks/trl_presets.py: TRL's GRPOTrainer, in an environment of its own."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]  # of TRL's environment
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]
from trl_trainers import settings  # pyright: ignore[reportMissingImports]  # a script beside this one


def train(task: dict[str, Any], name: str, own: dict[str, Any]) -> None:
    """Leave OUT/trl_NAME.safetensors: weights after all updates on the one rollout of the task."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        assert prompts == [prompt for prompt in task["prompts"] for _ in range(task["samples"])]
        return {"prompt_ids": task["prompt_ids"], "completion_ids": task["responses"], "logprobs": None}

    def reward(completions: list[str], **_: Any) -> list[float]:
        assert len(completions) == len(task["rewards"])
        return task["rewards"]

    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    GRPOTrainer(
        model=model,
        args=GRPOConfig(
            **settings(task, task["steps"]),
            num_generations=task["samples"],
            steps_per_generation=1,
            num_iterations=task["steps"],
            max_completion_length=task["max_new_tokens"],
            shuffle_dataset=False,
            **own,
        ),
        reward_funcs=reward,
        rollout_func=rollout,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in task["prompts"]]),
        processing_class=AutoTokenizer.from_pretrained(task["model"]),
    ).train()
    weights = {key: one.detach().clone() for key, one in model.named_parameters()}
    save_file(weights, Path(task["out"]) / f"trl_{name}.safetensors")


def main() -> None:
    """Train by every setting of the task.

    Raises:
        RuntimeError: this is another version of TRL than the one that is compared.
    """
    task = json.loads(Path(sys.argv[1]).read_text())
    if version("trl") != task["trl"]:
        raise RuntimeError(f"TRL {version('trl')} is installed; the comparison is with {task['trl']}")
    for name, own in task["settings"].items():
        train(task, name, own)


if __name__ == "__main__":
    main()
