"""Data of the tiny RLHF task, which needs no download: writers of all kinds, and a judge's preferences.

    python -m examples.rlhf_tiny.task OUT_DIR [--seed 0]

A prompt is four digits and an equals sign, a response six digits. What makes a good one is known to the judge
alone (judge.py): its digits are those of the prompt. Writers differ: each has a chance, drawn anew for every
response, with which a digit of his is one of the prompt's. Written are

    OUT_DIR/sft.jsonl     {"id": ..., "prompt": "4718=", "label": "475180"}, the writers' responses
    OUT_DIR/pairs.jsonl   {"id": ..., "prompt": ..., "chosen": ..., "rejected": ...}, two of them, judged
    OUT_DIR/model         config.json and tokenizer of a tiny Qwen3, whose weights start at random

and sft.eval.jsonl and pairs.eval.jsonl, the same of prompts that are in no other file.

Two responses are a pair where their scores differ by at least a third: two of the six digits.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from examples.arithmetic import build_model_config, build_tokenizer
from examples.rlhf_tiny.judge import true_score
from mcore_rl.directories import write_whole

DIGITS = "0123456789"
PROMPT, RESPONSE = 4, 6
"""digits of each"""
HELD_OUT = 1000
"""prompts"""
CLEAR = 0.3
"""difference of the scores of a pair, at least"""


def prompts(seed: int) -> list[str]:
    """All prompts, in the seed's order."""
    every = [f"{number:0{PROMPT}d}=" for number in range(10**PROMPT)]
    random.Random(seed).shuffle(every)
    return every


def written(draw: random.Random, prompt: str) -> str:
    """A response of some writer."""
    skill = draw.random()
    known = prompt.rstrip("=")
    return "".join(draw.choice(known if draw.random() < skill else DIGITS) for _ in range(RESPONSE))


def judged(draw: random.Random, prompt: str) -> dict[str, str]:
    """Two responses of clearly different scores, the better one chosen."""
    while True:
        worse, better = sorted((written(draw, prompt) for _ in range(2)), key=lambda r: true_score(prompt, r))
        if true_score(prompt, better) - true_score(prompt, worse) >= CLEAR:
            return {"id": prompt, "prompt": prompt, "chosen": better, "rejected": worse}


def files(seed: int) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Name and rows of every file; a held-out prompt is in no other."""
    draw, every = random.Random(seed + 1), prompts(seed)
    for part, some in (("", every[HELD_OUT:]), (".eval", every[:HELD_OUT])):
        yield f"sft{part}.jsonl", [{"id": p, "prompt": p, "label": written(draw, p)} for p in some]
        yield f"pairs{part}.jsonl", [judged(draw, p) for p in some]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the task."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    tokenizer = build_tokenizer()
    model = arguments.out_dir / "model"
    model.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(model)
    build_model_config(tokenizer, layers=2, hidden=128, tied=False).save_pretrained(model)
    for name, rows in files(arguments.seed):
        write_whole(arguments.out_dir / name, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{arguments.out_dir}: a model, responses of writers, pairs of them, and prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
