"""One side of benchmarks/step.py: GRPO steps of this project, in one rank with one embedded server.

The functions of a step are those of `mcore_rl.training.loop.train`, in its order; a clock is read between
them. CPU-seconds are of the trainer and its server together, system time and all threads included but those
of gloo that wait for connections: an idle process group takes some 0.8 ms of CPU time per second of the wall.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

from mcore_rl.config import Config
from mcore_rl.config.sections import RolloutConfig
from mcore_rl.model.optimizer import Optimizer
from mcore_rl.model.step import forward_backward
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.training import model_passes
from mcore_rl.training.assemble import start
from mcore_rl.training.batch import (
    RolloutBatch,
    build_batch,
    pack_mini_batch,
    token_sequences,
    whole_sequence,
)
from mcore_rl.training.checkpoint import end_step
from mcore_rl.training.loop import learn
from mcore_rl.training.model_passes import log_probs
from mcore_rl.training.run import Run
from mcore_rl.types import Prompt, Sample, VersionSpan
from mcore_rl.weights.buckets import gather

ADVANTAGES = (1.5, -0.5, 0.25, -2.0)
"""of the witness's sequences, in turn; their mean is not 0, or the loss would be"""


class FixedLength(RolloutConfig):
    """Every response has `max_new_tokens` tokens, as TRL's have with `min_new_tokens`."""

    @property
    def sampling_params(self) -> dict[str, Any]:
        """Rollout's parameters, and an end-of-sequence token ends nothing."""
        return {**super().sampling_params, "ignore_eos": True}


def reward(sample: Sample) -> float:
    """Follows from the response alone; the samples of a group differ."""
    return score_text(sample.text)


def score_text(text: str) -> float:
    """Some number in [0, 1); TRL's side computes the same."""
    return sum(map(ord, text)) % 97 / 97


class Clock:
    """CPU-seconds of this process and of its rollout servers; made when all process groups are there."""

    def __init__(self, servers: Sequence[psutil.Process]) -> None:
        self.servers = servers
        self.listeners = [
            _thread_clock(thread) for thread in Path("/proc/self/task").iterdir() if _idles(thread)
        ]
        """of threads that ask their sockets a hundred times a second, whatever the step does"""

    def __call__(self) -> float:
        """Since they were started."""
        served = sum(sum(server.cpu_times()[:2]) for server in self.servers)
        return served + time.process_time() - self.idle()

    def idle(self) -> float:
        """Time of the listeners, which are not counted: it is that of the wall."""
        return sum(map(time.clock_gettime, self.listeners))


def _idles(thread: Path) -> bool:
    return (thread / "comm").read_text().strip() == "gloo_tcp_loop"


def _thread_clock(thread: Path) -> int:
    """The number that Linux gives the CPU clock of a thread (MAKE_THREAD_CPUCLOCK in its sources)."""
    return (~int(thread.name) << 3) | 6


class Stopwatch:
    """CPU-seconds of this thread inside some functions, since they were last asked for.

    On a CPU autograd computes in the thread that asks; other threads are gloo's.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, and its time is counted."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - began

        return timed

    def take(self) -> float:
        """The seconds; starts anew."""
        taken, self.seconds = self.seconds, 0.0
        return taken


def config_of(task: dict[str, Any]) -> Config:
    """A run of as many steps as are asked for; nothing is evaluated or saved."""
    rollout = FixedLength(
        prompts_per_step=task["prompts_per_step"],
        samples_per_prompt=task["samples_per_prompt"],
        max_new_tokens=task["new_tokens"],
        threads=1,
    )
    config = Config.model_validate(
        {
            "run": {"dir": Path(task["run_dir"])},
            "model": {"path": Path(task["model"])},
            "data": {"train": (Path(task["prompts"]),), "max_prompt_tokens": task["prompt_tokens"]},
            "reward": {"function": "benchmarks.step_mcore:reward"},
            "algorithm": {"name": "grpo", "mini_batches": 1},
            "optimizer": {"lr": task["lr"], "beta2": 0.999},
            "train": {
                "steps": 1_000_000,
                "step_timeout": 100_000,  # on a busy machine a step of the real model takes many minutes
                "tokens_per_micro_batch": task["sequences"] * (task["prompt_tokens"] + task["new_tokens"]),
            },
            "publish": {"probe_sequences": task["probe_sequences"]},
        }
    )
    return config.model_copy(update={"rollout": rollout})


def steps(run: Run) -> Iterator[dict[str, float]]:
    """CPU-seconds of one step after another, by what was done."""
    clock = Clock([psutil.Process(cast(Any, server.process).pid) for server in run.servers.fleet.local])
    megatron = Stopwatch()
    model_passes.forward_backward = megatron.of(model_passes.forward_backward)
    Optimizer.step = megatron.of(Optimizer.step)
    run.publisher.publish(0, run.trainer.probe_prompts())
    step = 0
    while True:
        step += 1
        times = [clock()]
        batch = build_batch(run.generation.collect(step))
        times.append(clock())
        learned = learn(run, batch, step)
        times.append(clock())
        sampled = (whole_sequence(sample) for sample in batch.samples)
        published = run.publisher.publish(step, sampled, learned.work.tokens)
        times.append(clock())
        run.log(step, learned.metrics | published)
        end_step(run.trainer, run.contents, run.residency, step)
        times.append(clock())
        generate, train, sync, log = (b - a for a, b in pairwise(times))
        tokens = sum(len(sample.token_ids) for sample in batch.samples)
        yield {
            "generate": generate,
            "train": train + log,
            "publish": sync,
            "tokens": tokens,
            "peak_mib": peak_mib(),
            "driver": train + log - megatron.take(),
        }


def forget_peak() -> None:
    """The largest memory is that from here on: comparing the sides' gradients is no part of a step."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The largest resident set since then."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def witness(run: Run, directory: Path, count: int) -> None:
    """`count` random sequences with the loss and the gradient that this project computes for them.

    DIRECTORY/batch.safetensors holds prompts, responses, their lengths, advantages and old log-probs (off the
    present ones by noise that reaches both sides of the clip), DIRECTORY/gradient.safetensors the answer.
    """
    batch = random_batch(run, count)
    sequences = token_sequences(batch.samples)
    policy, optimizer, shape = run.trainer.policy, run.trainer.optimizer, run.trainer.shape
    own = log_probs(policy, sequences, shape, run.trainer.temperature)
    rng = np.random.default_rng(1)
    old = [(values + 0.3 * rng.standard_normal(values.shape)).astype(np.float32) for values in own]
    advantages = [ADVANTAGES[i % len(ADVANTAGES)] for i in range(len(sequences))]
    fields = {"advantage": advantages, "old_log_prob": old}
    micro_batches = pack_mini_batch(
        batch, np.arange(len(sequences)), run.algorithm, shape, policy.mesh, fields
    )
    optimizer.zero_grad()
    sums = forward_backward(policy, micro_batches, run.objective, run.trainer.temperature)
    losses = [value for one in sums for key, value in one.items() if key.name == "loss/policy"]
    loss = torch.stack(losses).sum()
    parameters = global_parameters(policy.unwrapped)
    mains = {name: cast(Any, parameter).main_grad for name, parameter in parameters.items()}
    gradient = {name: g.contiguous() for name, g in gather(mains, policy.mapping, policy.mesh).items()}
    directory.mkdir(parents=True)
    save_file(gradient | {"loss": loss.reshape(1)}, directory / "gradient.safetensors")
    longest = max(len(sample.token_ids) for sample in batch.samples)

    def padded(rows) -> torch.Tensor:
        return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])

    recorded = {
        "prompts": torch.tensor([sample.prompt.token_ids for sample in batch.samples]),
        "responses": padded([torch.tensor(sample.token_ids) for sample in batch.samples]),
        "lengths": torch.tensor([len(sample.token_ids) for sample in batch.samples]),
        "advantages": torch.tensor(advantages),
        "old_log_probs": padded([torch.from_numpy(values) for values in old]),
    }
    save_file(recorded, directory / "batch.safetensors")


def random_batch(run: Run, sequences: int) -> RolloutBatch:
    """A batch of as many sequences as a micro-batch has, the responses of different lengths."""
    rng = np.random.default_rng(0)
    vocab, rollout = run.trainer.policy.arch.vocab, run.trainer.config.rollout
    samples = []
    for i in range(sequences):
        prompt = rng.integers(2, vocab, run.trainer.config.data.max_prompt_tokens)
        length = int(rng.integers(1, rollout.max_new_tokens + 1))
        tokens = tuple(rng.integers(2, vocab, length).tolist())
        asked = Prompt(str(i), "", tuple(prompt.tolist()), "")
        zeros, spans = (0.0,) * length, (VersionSpan("0", 0, length),)
        samples.append(Sample.of_response(str(i), asked, tokens, zeros, "", "stop", spans, 0.0))
    return RolloutBatch(tuple(samples), tuple(sample.id for sample in samples))


def main() -> None:
    """A step for every line on stdin, its times as a line of JSON on stdout; ends with stdin."""
    task = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is no answer
    torch.set_num_threads(1)
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"})
    with start(config_of(task)) as run:
        witness(run, Path(task["witness"]), task["sequences"])
        print("{}", file=answers)
        forget_peak()
        for _, times in zip(sys.stdin, steps(run), strict=False):
            print(json.dumps(times), file=answers)


if __name__ == "__main__":
    main()
