"""An agent with a tool, without a download: products that a tiny model cannot compute, and a calculator.

    python examples/calculator.py OUT_DIR [--seed 0]

writes OUT_DIR/model (config.json, a tokenizer with a chat template and a response template),
OUT_DIR/demonstrations.jsonl for a supervised warm start, of which half of the conversations call the tool,
and OUT_DIR/train.jsonl and OUT_DIR/eval.jsonl, with lines such as

    {"id": "417*86", "prompt": [{"role": "user", "content": "417*86"}], "label": "35862"}

The tool is `calculate` below: `environment.args.tools = ["examples.calculator:calculate"]`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

ROLES = ("<user>", "<assistant>", "<tool>")
OPEN, CLOSE = '<call>{"name": "calculate", "arguments": {"expression": "', '"}}</call>'
PAD, EOS = "<pad>", "<eos>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}"
    '<call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</call>'
    "{% endfor %}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
RESPONSE_TEMPLATE = {
    "start_anchor": "<assistant>",
    "fields": {
        "content": {"close": EOS},
        "tool_calls": {
            "open": "<call>",
            "close": "</call>",
            "content": "json",
            "repeats": True,
            "transform": {
                "type": "function",
                "function": {"name": "{content.name}", "arguments": "{content.arguments}"},
            },
        },
    },
}


def calculate(expression: str) -> str:
    """Multiply two whole numbers.

    Args:
        expression: such as 12*34.
    """
    numbers = re.fullmatch(r"(\d{1,9})\*(\d{1,9})", expression)
    if numbers is None:
        raise ValueError("write two whole numbers with a * between them")
    return str(int(numbers[1]) * int(numbers[2]))


def problems(seed: int) -> Iterator[tuple[int, int]]:
    """Pairs of numbers of three and of two digits, each once, in the seed's order."""
    pairs = [(left, right) for left in range(100, 1000) for right in range(10, 100)]
    random.Random(seed).shuffle(pairs)
    return iter(pairs)


def row(pair: tuple[int, int]) -> dict[str, Any]:
    """A prompt and its label."""
    text = f"{pair[0]}*{pair[1]}"
    return {
        "id": text,
        "prompt": [{"role": "user", "content": text}],
        "label": calculate(text),
    }


def demonstration(pair: tuple[int, int], *, calls: bool) -> dict[str, Any]:
    """A whole conversation, which asks the calculator or not."""
    made = row(pair)
    answer = {"role": "assistant", "content": made.pop("label")}
    if calls:
        function = {"name": "calculate", "arguments": {"expression": made["id"]}}
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function}],
        }
        made["prompt"] += [call, {"role": "tool", "content": answer["content"]}]
    made["prompt"].append(answer)
    return made


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; the frame of a call is two tokens, so that calls are short."""
    marks = [PAD, EOS, *ROLES, OPEN, CLOSE]
    characters = [chr(code) for code in range(32, 127)]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*marks, *characters])}))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens([AddedToken(mark, special=True) for mark in marks[:5]])
    inner.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks[5:]])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=EOS)
    made.chat_template = CHAT_TEMPLATE
    made.response_template = RESPONSE_TEMPLATE
    return made


def build_model_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """A dense Qwen3 of 2 layers; initializer_range as in examples/arithmetic.py."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=round(128**-0.5, 4),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.get_vocab()[EOS],
        pad_token_id=tokenizer.get_vocab()[PAD],
        dtype="float32",
        architectures=["Qwen3ForCausalLM"],
    )


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object on each line."""
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the task."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    model = arguments.out_dir / "model"
    model.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(model)
    build_model_config(tokenizer).save_pretrained(model)
    left = problems(arguments.seed)
    shown = [demonstration(next(left), calls=k % 2 == 0) for k in range(12_000)]
    write_lines(arguments.out_dir / "demonstrations.jsonl", shown)
    write_lines(arguments.out_dir / "train.jsonl", [row(next(left)) for _ in range(6000)])
    write_lines(arguments.out_dir / "eval.jsonl", [row(next(left)) for _ in range(500)])
    print(f"{arguments.out_dir}: demonstrations, training and held-out problems, and a model's config")
    return 0


if __name__ == "__main__":
    sys.exit(main())
