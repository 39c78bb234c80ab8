"""What it costs to hand sampled groups from a replica's lead to its ranks.

    python benchmarks/data_plane.py [--samples 256] [--tokens 6000] [--rounds 20] [--out benchmarks/...json]

The code is that of training: `rollout.columns` and `parallel.control`. `lead` is pack_groups and pickling,
`rank` is unpickling, unpack_groups and a tensor of every sample's tokens and log-probs; both in microseconds
of CPU time per sample, medians of rounds. Bytes are all that is sent, per response token; a prompt's tokens
are not sent, since every rank has read them. `memcpy` is one copy of the same bytes, for comparison; the
groups' broadcast by gloo is not part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from statistics import median
from typing import TypeVar

import numpy as np
import torch

from benchmarks.outputs import output_file
from mcore_rl.parallel.control import from_buffers, to_buffers
from mcore_rl.rollout.columns import pack_groups, unpack_groups
from mcore_rl.types import Group, Prompt, Sample, VersionSpan

LIMITS = {"microseconds per sample": 20.0, "bytes per token": 9.0}
GROUP, PROMPT_TOKENS, VOCAB = 8, 512, 150_000

T = TypeVar("T")


def random_groups(samples: int, tokens: int, seed: int = 0) -> tuple[list[Group], dict[str, Prompt]]:
    """Groups of 8, as a rollout leaves them: responses of `tokens` x 0.5 to 1.5 tokens, two versions each."""
    rng = np.random.default_rng(seed)
    prompts, groups = {}, []
    for g in range(-(-samples // GROUP)):
        ids = tuple(rng.integers(VOCAB, size=PROMPT_TOKENS).tolist())
        prompt = prompts[f"p{g}"] = Prompt(f"p{g}", "word " * PROMPT_TOKENS, ids, "label")
        made = [_sample(rng, prompt, f"p{g}@1/{k}", tokens) for k in range(min(GROUP, samples - g * GROUP))]
        groups.append(Group(f"p{g}@1", tuple(made)))
    return groups, prompts


def _sample(rng: np.random.Generator, prompt: Prompt, id: str, tokens: int) -> Sample:
    n = int(tokens * rng.uniform(0.5, 1.5))
    return Sample.of_response(
        id=id,
        prompt=prompt,
        token_ids=rng.integers(VOCAB, size=n, dtype=np.int32),
        log_probs=-rng.exponential(size=n).astype(np.float32),
        text="word " * n,
        finish_reason="stop",
        versions=(VersionSpan("3", 0, n // 2), VersionSpan("4", n // 2, n)),
        reward=float(rng.integers(2)),
    )


def tensors(groups: Sequence[Group]) -> list[torch.Tensor]:
    """Tokens and log-probs of every sample."""
    samples = [sample for group in groups for sample in group.samples]
    return [torch.from_numpy(part) for s in samples for part in (s.token_ids, s.log_probs)]


def hand_over(groups: Sequence[Group], prompts: Mapping[str, Prompt]) -> list[Group]:
    """The groups as another rank has them, in this process."""
    return unpack_groups(from_buffers(*to_buffers(pack_groups(groups))), prompts)


def bytes_per_token(groups: Sequence[Group]) -> float:
    """All that is sent, over the response tokens of the groups."""
    rest, memory = to_buffers(pack_groups(groups))
    sent = len(rest) + sum(one.numel() for one in memory)
    return sent / sum(len(sample.token_ids) for group in groups for sample in group.samples)


def cpu_seconds(work: Callable[[], T]) -> tuple[float, T]:
    """CPU time of this thread, and the result."""
    began = time.thread_time()
    result = work()
    return time.thread_time() - began, result


def measure(samples: int, tokens: int, rounds: int) -> dict[str, float]:
    """Medians over rounds of the same groups, so that the allocator has touched its memory before."""
    groups, prompts = random_groups(samples, tokens)
    seconds: dict[str, list[float]] = {"lead": [], "rank": [], "memcpy": []}
    for _ in range(rounds + 2):  # the first two warm up
        lead, (rest, memory) = cpu_seconds(lambda: to_buffers(pack_groups(groups)))
        copy, arrived = cpu_seconds(lambda memory=memory: [one.clone() for one in memory])
        rank, got = cpu_seconds(
            lambda rest=rest, arrived=arrived: tensors(unpack_groups(from_buffers(rest, arrived), prompts))
        )
        for name, value in (("lead", lead), ("rank", rank), ("memcpy", copy)):
            seconds[name].append(value)
        del memory, arrived, got
    found = {name: median(values[2:]) / samples * 1e6 for name, values in seconds.items()}
    return {
        "lead microseconds per sample": round(found["lead"], 2),
        "rank microseconds per sample": round(found["rank"], 2),
        "microseconds per sample": round(found["lead"] + found["rank"], 2),
        "memcpy microseconds per sample": round(found["memcpy"], 2),
        "bytes per token": round(bytes_per_token(groups), 3),
    }


def main() -> None:
    """Measure and report; exit 1 beyond a limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=output_file)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.samples, arguments.tokens, arguments.rounds)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{machine.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "samples": arguments.samples,
        "mean tokens": arguments.tokens,
        "rounds": arguments.rounds,
        **found,
        "limits": LIMITS,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    if any(found[name] > limit for name, limit in LIMITS.items()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
