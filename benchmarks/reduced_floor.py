"""How far apart two sound engines below float32 are, and how far a wrong weight version is, by depth.

    python -m benchmarks.reduced_floor [--layers 3 12 30] [--model DIR] [--out benchmarks/...json]

What float32_floor.py measures for float32, of the same models: random Qwen3s, or the one of --model, whose
weights are rounded to bfloat16 first, as servers get them. Numbers are quantiles of 99.9 % and the largest of
the differences of log-probs of sampled tokens, beside float32 on the same weights:

- `bf16`: everything in bfloat16. Another engine in bfloat16 is as far away on its own, so that two of them
  are apart by the square root of 2 of it
- `fp8`: weights and inputs of the layers' GEMMs rounded to e4m3 in blocks of 128 x 128 and 1 x 128, the rest
  in bfloat16: a trainer in FP8, or servers of FP8 weights
- `version`: in bfloat16 after one step of Adam with a learning rate of 1e-6, whose changes reach a few of the
  weights in bfloat16 (`changed`); `other`: after one of 1e-2, other weights
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.float32_floor import STEP, p999, random_model
from benchmarks.outputs import output_file

_BLOCK = 128
_E4M3_MAX = 448.0


@torch.no_grad()
def measure(model: PreTrainedModel, sequences: int = 4, tokens: int = 256) -> dict[str, float]:
    """The differences of one model, which is changed by it."""
    master = [weight.detach().clone() for weight in model.parameters()]
    ids = torch.randint(model.config.vocab_size, (sequences, tokens))
    model.bfloat16().float()
    exact = model(ids).logits
    sampled = torch.multinomial(exact.softmax(-1).flatten(0, 1), 1).view(sequences, tokens)

    def scored() -> Tensor:
        return model(ids).logits.float().log_softmax(-1).gather(-1, sampled[..., None])[..., 0].double()

    reference = scored()
    model.bfloat16()
    bf16 = scored()
    linear: list[nn.Module] = [
        one for name, one in model.named_modules() if isinstance(one, nn.Linear) and "lm_head" not in name
    ]
    version, changed = _stepped(model, master, scored, STEP)
    other, _ = _stepped(model, master, scored, 1e4 * STEP)
    for one in linear:
        weight = one.get_parameter("weight")
        weight.copy_(_e4m3(weight, _BLOCK))
    fp8 = _with_inputs(linear, lambda hidden: _e4m3(hidden, 1), scored)
    gaps = {"bf16": bf16 - reference, "fp8": fp8 - reference}
    found = {f"{name} {what}": of(gap.abs()) for name, gap in gaps.items() for what, of in _NUMBERS.items()}
    later = {"version": version, "other": other}
    found |= {f"{name} p999": p999((score - bf16).abs()) for name, score in later.items()}
    return found | {"changed": changed}


_NUMBERS: dict[str, Callable[[Tensor], float]] = {"p999": p999, "max": lambda gap: gap.max().item()}


def _e4m3(values: Tensor, rows: int) -> Tensor:
    """Rounded in blocks of rows x 128, whose largest is 448; the last two dimensions are whole blocks."""
    shape = values.shape
    flat = values.float().reshape(-1, shape[-1])
    pad = (0, -shape[-1] % _BLOCK, 0, -len(flat) % rows)
    blocks = nn.functional.pad(flat, pad)
    blocks = blocks.view(blocks.shape[0] // rows, rows, -1, _BLOCK)
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp_min(1e-12) / _E4M3_MAX
    rounded = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
    return rounded.view(blocks.shape[0] * rows, -1)[: len(flat), : shape[-1]].reshape(shape).to(values.dtype)


def _with_inputs(
    modules: list[nn.Module], change: Callable[[Tensor], Tensor], then: Callable[[], Tensor]
) -> Tensor:
    """What `then` gives while the inputs of `modules` are changed."""
    handles = [one.register_forward_pre_hook(lambda _, given: change(given[0])) for one in modules]
    try:
        return then()
    finally:
        for handle in handles:
            handle.remove()


def _stepped(
    model: PreTrainedModel, master: list[Tensor], scored: Callable[[], Tensor], step: float
) -> tuple[Tensor, float]:
    """(Log-probs after a step of the float32 weights, the fraction of bfloat16 weights that it changes)."""
    before, changed = [weight.detach().clone() for weight in model.parameters()], 0
    for weight, exact in zip(model.parameters(), master, strict=True):
        new = exact.add(torch.randn_like(exact).sign(), alpha=step).to(weight.dtype)
        changed += int((new != weight).sum())
        weight.copy_(new)
    found = scored()
    for weight, old in zip(model.parameters(), before, strict=True):
        weight.copy_(old)
    return found, changed / sum(weight.numel() for weight in before)


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 12, 30])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=output_file)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = {f"{layers} layers": measure(random_model(layers)) for layers in arguments.layers}
    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        rows[arguments.model.name] = measure(model, 2)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    text = json.dumps({"date": date.today().isoformat(), "machine": machine, **rows}, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
