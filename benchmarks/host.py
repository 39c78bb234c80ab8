"""What the host of a rank does in a step, apart from the model: CPU-seconds and memory, on made-up rollouts.

    python benchmarks/host.py [--samples 2048] [--tokens 8192] [--out benchmarks/host_DATE.json]

64 ranks (tensor 4, pipeline 2, data 8), GSPO and PPO with 4 mini-batches; responses of `tokens` x 0.5 to 1.5
tokens, prompts of 512. The functions are those of training, in its order: the columns of all replicas become
groups, a batch, what is scored, advantages, micro-batches of this replica and metrics. Seconds are of one
thread; `peak_mib` is the rise of the resident set above what the received columns and the scores take.

`lead` is what the one rank in 8 that talks to the servers does besides, with its replica's share of replies:
JSON, its examination, samples, columns, and texts where `--tokenizer` names a model's directory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from pydantic_core import from_json
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.data_plane import random_groups
from benchmarks.outputs import output_file
from mcore_rl.algo.algorithms import Algorithm, configure
from mcore_rl.data.balance import ModelShape, forward_flops
from mcore_rl.imports import large_pages
from mcore_rl.parallel.control import from_buffers, to_buffers
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rollout.columns import Columns, pack_groups, unpack_groups
from mcore_rl.rollout.reply import Asked, parse_reply
from mcore_rl.rollout.sampler import build_group
from mcore_rl.training.advantage import Scores, compute_advantages
from mcore_rl.training.batch import (
    Batching,
    build_batch,
    by_sample,
    pack_mini_batch,
    pack_share,
    split_mini_batches,
    token_sequences,
    whole_sequence,
)
from mcore_rl.training.metrics import rollout_metrics, work_of
from mcore_rl.training.publish import probe_of
from mcore_rl.training.trainer import decode_with
from mcore_rl.types import Group, Prompt, Sample

LIMITS = {"cpu_seconds": 2.0, "peak_mib": 2048.0}
"""of a rank, a step"""
LAYOUT = Layout(tensor=4, sequence=True, pipeline=2, data=8)
MODEL = ModelShape(
    layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, vocab=150_000, ffn=28672, experts=0
)
MIB, MINI_BATCHES, REPLIES = 1 << 20, 4, 16

T = TypeVar("T")


class Clock:
    """CPU-seconds by what was done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], T]) -> T:
        """What `work` returns; its time is counted under `name`."""
        began = time.process_time()
        done = work()
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.process_time() - began, 4)
        return done


def status(name: str) -> float:
    """MiB of VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def step(
    received: Sequence[tuple[bytes, list[torch.Tensor]]],
    prompts: Mapping[str, Prompt],
    algorithm: Algorithm,
    tokens: int,
) -> dict[str, Any]:
    """A step of one rank, from what it received to what it logs."""
    clock, mesh = Clock(), cast(Mesh, SimpleNamespace(layout=LAYOUT, dp_rank=0))
    shape = Batching(MINI_BATCHES, 16384, int(1.5 * tokens), partial(forward_flops, shape=MODEL), 16)
    rng = np.random.default_rng(0)
    whole = build_batch([group for one in received for group in unpack_groups(_columns(one), prompts)])
    bounds = np.cumsum([0, *(sample.trained_tokens for sample in whole.samples)])
    del whole
    said = -rng.exponential(size=int(bounds[-1])).astype(np.float32)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")

    groups = clock("groups", lambda: [g for one in received for g in unpack_groups(_columns(one), prompts)])
    batch = clock("batch", lambda: build_batch(groups))
    samples = batch.samples
    parts = clock("batch", lambda: split_mini_batches(len(samples), MINI_BATCHES, (0, 1)))
    sequences = clock("score", lambda: token_sequences(samples))
    numbers = clock("score", lambda: np.split(np.arange(int(bounds[-1])), bounds[1:-1]))
    clock("score", lambda: pack_share(sequences, {"number": numbers}, shape, mesh))
    scored = clock("score", lambda: by_sample(np.split(said, bounds[1:-1]), samples))
    old = dict(enumerate(scored))
    scores = Scores(old, scored if algorithm.kl_in_reward else (), scored if algorithm.needs_critic else ())
    advantages = clock("advantages", lambda: compute_advantages(batch, algorithm, scores))
    for visit, part in enumerate(parts):
        fields = {**advantages.fields, **({"old_log_prob": old} if visit else {})}
        clock("pack", partial(pack_mini_batch, batch, part, algorithm, shape, mesh, fields))
    clock("metrics", lambda: rollout_metrics(batch, advantages.fields["advantage"], len(samples)))
    clock("metrics", lambda: work_of(token_sequences(samples), shape))
    clock("metrics", lambda: probe_of(map(whole_sequence, samples), 8))
    return {
        "cpu_seconds": round(sum(clock.seconds.values()), 3),
        "by_part": clock.seconds,
        "peak_mib": round(status("VmHWM") - before, 1),
    }


def _columns(received: tuple[bytes, list[torch.Tensor]]) -> Columns:
    return from_buffers(*received)


def lead(groups: Sequence[Group], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """What a lead does for its share, by some of its replies; CPU-seconds a step."""
    clock, samples = Clock(), [sample for group in groups for sample in group.samples]
    few = samples[:REPLIES]
    raw = json.dumps([_reply(sample) for sample in few]).encode()
    said = clock("json", lambda: from_json(raw, cache_strings=False))
    asked = [Asked(s.id, s.id, s.prompt.token_ids, len(s.token_ids), MODEL.vocab) for s in few]
    replies = clock("examine", lambda: list(map(parse_reply, said, asked)))
    clock("samples", lambda: build_group("g", few[0].prompt, replies, lambda ids: ""))
    if tokenizer is not None:
        known = [np.asarray(s.token_ids) % len(tokenizer) for s in few]
        clock("texts", lambda: [decode_with(tokenizer, ids) for ids in known])
    share = sum(len(s.token_ids) for s in samples) / sum(len(s.token_ids) for s in few)
    found = {name: round(seconds * share, 3) for name, seconds in clock.seconds.items()}
    columns = Clock()
    columns("columns", lambda: to_buffers(pack_groups(groups)))
    found |= columns.seconds
    return {"cpu_seconds": round(sum(found.values()), 3), "by_part": found}


def _reply(sample: Sample) -> dict[str, Any]:
    ids, log_probs = sample.token_ids, sample.log_probs
    pairs = zip(np.asarray(log_probs).tolist(), np.asarray(ids).tolist(), strict=True)
    spans = sample.segments[0].versions
    meta = {
        "id": sample.id,
        "finish_reason": {"type": "stop"},
        "output_token_logprobs": [[log_prob, token, None] for log_prob, token in pairs],
        "weight_versions": [{"version": v, "start": start, "end": end} for v, start, end in spans],
    }
    return {"output_ids": np.asarray(ids).tolist(), "text": "", "meta_info": meta}


def main() -> int:
    """0 when every limit holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--tokenizer", type=AutoTokenizer.from_pretrained)
    parser.add_argument(
        "--out", type=output_file, default=Path(__file__).parent / f"host_{date.today()}.json"
    )
    options = parser.parse_args()
    large_pages()  # as every command does; torch looks at its first tensor
    torch.set_num_threads(1)
    received: list[Any] = []
    prompts: dict[str, Prompt] = {}
    share: list[Group] = []
    for replica in range(LAYOUT.data):
        groups, its = random_groups(options.samples // LAYOUT.data, options.tokens, seed=replica)
        groups, its = _renamed(groups, f"{replica}.")
        prompts |= its
        received.append(to_buffers(pack_groups(groups)))
        share = groups
        del groups
    result: dict[str, Any] = {
        "date": str(date.today()),
        "machine": f"{machine.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "samples": options.samples,
        "response_tokens": int(sum(_columns(one).ends[2][-1] for one in received)),
        "lead": lead(share, options.tokenizer),
    }
    del share
    for name in ("gspo", "ppo"):
        result[name] = step(received, prompts, configure(name, {}), options.tokens)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    missed = [
        f"{name}: {what} {result[name][what]}, at most {limit}"
        for name in ("gspo", "ppo")
        for what, limit in LIMITS.items()
        if result[name][what] > limit
    ]
    print("\n".join(f"LIMIT MISSED: {one}" for one in missed))
    return int(bool(missed))


def _renamed(groups: Sequence[Group], prefix: str) -> tuple[list[Group], dict[str, Prompt]]:
    """The groups of another replica, which has other prompts."""
    prompts = {g.samples[0].prompt.id: g.samples[0].prompt for g in groups}
    new = {name: replace(prompt, id=prefix + name) for name, prompt in prompts.items()}
    renamed = [
        Group(
            prefix + g.id,
            tuple(replace(s, id=prefix + s.id, prompt=new[s.prompt.id]) for s in g.samples),
        )
        for g in groups
    ]
    return renamed, {prompt.id: prompt for prompt in new.values()}


if __name__ == "__main__":
    raise SystemExit(main())
