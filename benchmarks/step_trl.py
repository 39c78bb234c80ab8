"""The other side of benchmarks/step.py: the same steps by TRL's GRPOTrainer, in an environment of its own.

CPU-seconds are of this process, all threads, system time included.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]  # of TRL's environment
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]


def cpu_seconds() -> float:
    """CPU-seconds of this process since it was started."""
    return time.process_time()


def forget_peak() -> None:
    """The largest memory is that from here on: comparing the sides' gradients is no part of a step."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The largest resident set since then."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def reward(completions: list[str], **_: Any) -> list[float]:
    """The reward of step_mcore.score_text."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


class Turns(TrainerCallback):
    """One step for every line on stdin; from one end of a step to the next, logging included."""

    def __init__(self, answers: TextIO, model: Any) -> None:
        self.answers, self.generate_seconds, self.tokens = answers, 0.0, 0
        self._generate, model.generate = model.generate, self.generate

    def generate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The model's own, with the clock read before and after."""
        began = cpu_seconds()
        tokens = self._generate(*args, **kwargs)
        self.generate_seconds += cpu_seconds() - began
        self.tokens += tokens.shape[0] * (tokens.shape[1] - kwargs["input_ids"].shape[1])
        return tokens

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Waits for the first line."""
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Answers and waits for the next line."""
        whole = cpu_seconds() - self._began
        times = {"generate": self.generate_seconds, "train": whole - self.generate_seconds}
        answer = {**times, "publish": 0.0, "tokens": self.tokens, "peak_mib": peak_mib()}
        print(json.dumps(answer), file=self.answers)
        self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        self._began, self.generate_seconds, self.tokens = cpu_seconds(), 0.0, 0


def build(task: dict[str, Any]) -> GRPOTrainer:
    """The trainer: float32, nothing recomputed, nothing saved; what is not said here is TRL's default."""
    samples = task["prompts_per_step"] * task["samples_per_prompt"]
    lines = Path(task["prompts"]).read_text().splitlines()
    settings = GRPOConfig(
        output_dir=task["run_dir"],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=min(samples, task["sequences"]),
        gradient_accumulation_steps=max(1, samples // task["sequences"]),
        num_generations=task["samples_per_prompt"],
        max_completion_length=task["new_tokens"],
        generation_kwargs={"min_new_tokens": task["new_tokens"]},
        loss_type="grpo",
        beta=0.0,
        learning_rate=task["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=1_000_000,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32),
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": json.loads(line)["prompt"]} for line in lines]),
        processing_class=AutoTokenizer.from_pretrained(task["model"], padding_side="left"),
    )


def witness(trainer: GRPOTrainer, directory: Path) -> dict[str, dict[str, float]]:
    """How far loss and gradient are from those that step_mcore.py left; `control` has one other advantage."""
    batch, expected = (
        load_file(directory / "batch.safetensors"),
        load_file(directory / "gradient.safetensors"),
    )
    inputs = {
        "prompt_ids": batch["prompts"],
        "prompt_mask": torch.ones_like(batch["prompts"]),
        "completion_ids": batch["responses"],
        "completion_mask": (torch.arange(batch["responses"].shape[1]) < batch["lengths"][:, None]).long(),
        "advantages": batch["advantages"],
        "old_per_token_logps": batch["old_log_probs"],
    }
    trainer.current_gradient_accumulation_steps = 1
    other = batch["advantages"].clone()
    other[0] += 0.1
    return {
        "witness": errors(trainer, inputs, expected),
        "control": errors(trainer, inputs | {"advantages": other}, expected),
    }


def errors(
    trainer: GRPOTrainer, inputs: dict[str, Any], expected: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Difference of the losses, and the largest of a gradient, relative to that tensor's largest entry."""
    model = trainer.model.train()
    model.zero_grad()
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    gradients = dict(model.named_parameters())
    missing = set(gradients) ^ (set(expected) - {"loss"})
    if missing:
        raise SystemExit(f"the sides have other parameters: {sorted(missing)}")
    largest = max(
        float((parameter.grad - expected[name]).abs().max() / expected[name].abs().max())
        for name, parameter in gradients.items()
    )
    model.zero_grad()
    trainer._metrics["train"].clear()
    return {
        "loss": float(loss.detach()),
        "loss_error": abs(float(loss.detach()) - float(expected["loss"])),
        "gradient_error": largest,
    }


def main() -> None:
    """Says what the witness found, then takes a step for every line on stdin."""
    task = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is no answer
    torch.set_num_threads(1)
    trainer = build(task)
    about = witness(trainer, Path(task["witness"]))
    versions = {name: version(name) for name in ("trl", "torch", "transformers", "accelerate", "datasets")}
    print(json.dumps({**about, "trl_versions": versions}), file=answers)
    forget_peak()
    trainer.add_callback(Turns(answers, trainer.model))
    trainer.train()


if __name__ == "__main__":
    main()
