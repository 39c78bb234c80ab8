"""A verifiable task that needs no download: arithmetic problems, a tokenizer and a tiny Qwen3 to learn them.

    python examples/arithmetic.py OUT_DIR [--seed 0] [--digits 2] [--operations +]

writes OUT_DIR/train.jsonl and OUT_DIR/eval.jsonl, with lines such as

    {"id": "47+85", "prompt": "47+85=", "label": "132"}

and OUT_DIR/model with config.json and tokenizer (weights start at random: model.random_init = true).

Whether a problem is held out follows from a hash of the problem alone, so that an evaluation problem is never
trained on, whatever the seeds; a+b and b+a are always on the same side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import operator
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
HELD_OUT = 0.2
PAD, EOS = "<pad>", "<eos>"


class Problem(NamedTuple):
    """left operation right"""

    left: int
    operation: str
    right: int

    @property
    def text(self) -> str:
        """The sum as a person writes it, without the equals sign."""
        return f"{self.left}{self.operation}{self.right}"

    @property
    def held_out(self) -> bool:
        """On the evaluation side; the mirror image of a sum or product is on the same side."""
        left, right = (self.left, self.right) if self.operation == "-" else sorted((self.left, self.right))
        digest = hashlib.sha256(f"{left}{self.operation}{right}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64

    def record(self) -> dict[str, str]:
        """A line of the prompt file."""
        answer = OPERATIONS[self.operation](self.left, self.right)
        return {"id": self.text, "prompt": f"{self.text}=", "label": str(answer)}


def shuffled(operations: str, digits: int, seed: int) -> Iterator[Problem]:
    """Each problem of numbers with so many digits once (a million of them at most), in the seed's order."""
    smallest = 10 ** (digits - 1)
    numbers = 10**digits - smallest
    total = len(operations) * numbers**2
    for index in random.Random(seed).sample(range(total), min(total, 1_000_000)):
        pair, operation = divmod(index, len(operations))
        left, right = divmod(pair, numbers)
        yield Problem(smallest + left, operations[operation], smallest + right)


def split(problems: Iterator[Problem], train: int, held_out: int) -> tuple[list[Problem], list[Problem]]:
    """The first `train` and `held_out` problems of either side."""
    sides: tuple[list[Problem], list[Problem]] = ([], [])
    for problem in problems:
        side, limit = (sides[1], held_out) if problem.held_out else (sides[0], train)
        if len(side) < limit:
            side.append(problem)
        if len(sides[0]) == train and len(sides[1]) == held_out:
            break
    return sides


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; a character it does not know is an error, never a silent unknown token."""
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *"0123456789", *OPERATIONS, "="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def build_model_config(
    tokenizer: PreTrainedTokenizerFast, layers: int, hidden: int, tied: bool
) -> Qwen3Config:
    """A dense Qwen3 with heads of 32 and two query heads per key-value head, of which there are 2, 4, 6, ...

    initializer_range is 1/sqrt(hidden): Qwen's own 0.02, made for wide models, keeps one of hidden 192 on a
    plateau for hundreds of steps.
    """
    key_value_heads = 2 * -(-hidden // 128)
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2 * key_value_heads,
        num_key_value_heads=key_value_heads,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=round(hidden**-0.5, 4),
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()[EOS],
        pad_token_id=tokenizer.get_vocab()[PAD],
        dtype="float32",
        architectures=["Qwen3ForCausalLM"],
    )


def write_lines(path: Path, problems: list[Problem]) -> None:
    """All or nothing: a reader never sees half a file."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(problem.record()) + "\n" for problem in problems), encoding="utf-8")
    os.replace(partial, path)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with 2 where it asks for what cannot be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--digits", type=int, default=2, help="of both operands")
    parser.add_argument("--operations", default="+", help="any of + - *")
    parser.add_argument("--train", type=int, default=6000, help="training problems")
    parser.add_argument("--eval", type=int, default=1000, help="held-out problems")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=192, help="a multiple of 64")
    parser.add_argument("--tied", action="store_true", help="share the embedding with the output layer")
    arguments = parser.parse_args(argv)
    if not set(arguments.operations) <= set(OPERATIONS) or len(set(arguments.operations)) != len(
        arguments.operations
    ):
        parser.error(f"--operations {arguments.operations}: use each of {' '.join(OPERATIONS)} at most once")
    if min(arguments.digits, arguments.train, arguments.eval, arguments.layers, arguments.hidden) < 1:
        parser.error("--digits, --train, --eval, --layers and --hidden are at least 1")
    if arguments.hidden % 64:
        parser.error(f"--hidden {arguments.hidden}: use a multiple of 64")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Write the task; 0 when done, 2 when it asks for more problems than there are."""
    arguments = parse_arguments(argv)
    problems = shuffled(arguments.operations, arguments.digits, arguments.seed)
    train, held_out = split(problems, arguments.train, arguments.eval)
    for name, got, wanted in (("train", train, arguments.train), ("eval", held_out, arguments.eval)):
        if len(got) < wanted:
            print(
                f"only {len(got)} problems for --{name} {wanted}; lower it, or raise --digits",
                file=sys.stderr,
            )
            return 2
    tokenizer = build_tokenizer()
    model = arguments.out_dir / "model"
    model.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(model)
    build_model_config(tokenizer, arguments.layers, arguments.hidden, arguments.tied).save_pretrained(model)
    write_lines(arguments.out_dir / "train.jsonl", train)
    write_lines(arguments.out_dir / "eval.jsonl", held_out)
    print(
        f"{arguments.out_dir}: {len(train)} training and {len(held_out)} held-out problems such as "
        f"{train[0].text}={train[0].record()['label']}, a tokenizer of {len(tokenizer)} characters, and a "
        f"Qwen3 of {arguments.layers} layers and hidden size {arguments.hidden}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
