"""Tokens per CPU-second: the engine of the embedded server against transformers' generate().

    python -m benchmarks.decode [--model runs/real/model] [--rounds 3] [--out benchmarks]

Cases: one sequence of 64 tokens, and 64 sequences of 16 tokens, which are 8 samples of each of 8 prompts of
45 tokens, as a step of examples/real_grpo.toml asks for. Both sides sample in float32 on one thread, in one
process and in turns after a round that does not count; large pages are on for both. `generate` gets the same
64 prompts as a batch and gives no log-probs, which the engine does; with them it costs more. Medians. Writes
OUT/decode_DATE.json; exits with 1 where the engine is less than LEAST times as fast at 64 sequences.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read when torch is imported

import torch
from transformers import AutoModelForCausalLM

from benchmarks.outputs import output_directory
from mcore_rl.server.engine import Engine
from mcore_rl.server.kv_cache import build_cache
from mcore_rl.server.sequence import Limits, Sequence, Wanted

ROOT = Path(__file__).parents[1]
LEAST = 2.5
"""times generate()'s tokens per CPU-second, at 64 sequences"""
PROMPT_TOKENS = 45
CASES = {"1 x 64": (1, 1, 64), "64 x 16": (8, 8, 16)}
"""prompts, samples of each, tokens of each sample"""

Prompts = list[list[int]]


def by_engine(engine: Engine, prompts: Prompts, new_tokens: int) -> None:
    """Samples with the engine of the embedded server; equal prompts are prefilled once."""
    limits = Limits(new_tokens, new_tokens, 1.0, 1.0, 0.0, 0, frozenset())
    asked = [
        Sequence(str(i), str(i), list(prompt), limits, i, Wanted(log_probs=True))
        for i, prompt in enumerate(prompts)
    ]
    engine.submit(asked)
    while engine.running or engine.waiting:
        engine.step()
    assert all(len(one.output_ids) == new_tokens for one in asked)


@torch.inference_mode()
def by_generate(model: torch.nn.Module, prompts: Prompts, new_tokens: int) -> None:
    """Samples with transformers; the prompts are equally long, so that none is padded."""
    ids = torch.tensor(prompts)
    limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    sampled = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "pad_token_id": 0}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **limits, **sampled)  # type: ignore[operator]
    assert out.shape[1] == ids.shape[1] + new_tokens


def cpu_seconds(call: Callable[[], None]) -> float:
    """What it takes, of all threads of this process."""
    began = time.process_time()
    call()
    return time.process_time() - began


def measure(path: str, rounds: int) -> dict[str, dict[str, float]]:
    """Of each case: tokens per CPU-second of both sides, and how often faster the engine is."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    engine = Engine(model, build_cache(model, 1 << 15), max_running=256)
    drawn, found = random.Random(0), {}
    for name, (distinct, samples, new_tokens) in CASES.items():
        unlike = [[drawn.randrange(1000, 10000) for _ in range(PROMPT_TOKENS)] for _ in range(distinct)]
        prompts = [prompt for prompt in unlike for _ in range(samples)]
        taken: dict[str, list[float]] = {"engine": [], "generate": []}
        for _ in range(rounds + 1):
            taken["engine"].append(cpu_seconds(lambda p=prompts, n=new_tokens: by_engine(engine, p, n)))
            taken["generate"].append(cpu_seconds(lambda p=prompts, n=new_tokens: by_generate(model, p, n)))
        seconds = {side: median(its[1:]) for side, its in taken.items()}
        rates = {side: round(len(prompts) * new_tokens / one, 1) for side, one in seconds.items()}
        found[name] = rates | {"faster": round(seconds["generate"] / seconds["engine"], 2)}
        print(f"{name}: {found[name]}", flush=True)
    return found


def main() -> int:
    """0 when the limit holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "runs" / "real" / "model"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=output_directory, default=ROOT / "benchmarks")
    options = parser.parse_args()
    found = measure(options.model, options.rounds)
    today = datetime.date.today().isoformat()
    record = {
        "benchmark": "tokens per CPU-second on one thread, float32, SmolLM2-135M-Instruct",
        "date": today,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "least": LEAST,
        "cases": found,
    }
    (options.out / f"decode_{today}.json").write_text(json.dumps(record, indent=1) + "\n")
    return int(found["64 x 16"]["faster"] < LEAST)


if __name__ == "__main__":
    raise SystemExit(main())
