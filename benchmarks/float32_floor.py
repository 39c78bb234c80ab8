"""How far apart two sound float32 engines are, and how far a wrong weight version is, by depth.

    python benchmarks/float32_floor.py [--layers 3 12 30 64] [--model DIR] [--out benchmarks/...json]

The limit `publish.tolerance_p999` must lie between the two. Each line is of one model: random Qwen3s whose
logits have a standard deviation of 4, about that of a language model, or the one of --model. Tokens are drawn
from the model itself after a random context, since sampled tokens are what a run compares. Numbers are
quantiles of 99.9 % of the differences of log-probs:

- `rounding`: whole sequences, as a trainer computes them, in float32 against float64
- `engines`: the same in float32 against 32 tokens at a time with a cache, as a server computes them
- `version`: the same in float32 after every weight has moved by 1e-6, up or down by chance. A step of Adam
  with a learning rate of 1e-6 moves them so far, and not by chance: its changes add up, and are larger.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from benchmarks.outputs import output_file

LOGIT_STD = 4.0
STEP = 1e-6
CHUNK = 32


def random_model(layers: int, hidden: int = 192, vocab: int = 4096) -> PreTrainedModel:
    """A Qwen3 whose logits vary as much as those of a trained model."""
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        head_dim=64,
        tie_word_embeddings=False,
        initializer_range=hidden**-0.5,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(LOGIT_STD)
    return model


@torch.no_grad()
def measure(model: PreTrainedModel, sequences: int = 4, tokens: int = 512) -> dict[str, float]:
    """The three differences of one model, which is changed by it."""
    ids = torch.randint(model.config.vocab_size, (sequences, tokens))
    exact = model.double()(ids).logits
    sampled = torch.multinomial(exact.softmax(-1).flatten(0, 1), 1).view(sequences, tokens)
    model.float()
    whole, in_chunks = model(ids).logits, _in_chunks(model, ids)
    for weight in model.parameters():
        weight.add_(torch.randn_like(weight).sign(), alpha=STEP)
    scores = [_log_probs(logits, sampled) for logits in (exact, whole, in_chunks, model(ids).logits)]
    names = {"rounding": (1, 0), "engines": (1, 2), "version": (1, 3)}
    found = {name: p999((scores[a] - scores[b]).abs()) for name, (a, b) in names.items()}
    return {"logit std": round(exact.std().item(), 2)} | found


def p999(gap: Tensor) -> float:
    """What 99.9 % of the differences are within."""
    return gap.flatten().kthvalue(math.ceil(0.999 * gap.numel())).values.item()


def _in_chunks(model: PreTrainedModel, ids: Tensor) -> Tensor:
    parts, cache = [], None
    for part in ids.split(CHUNK, dim=1):
        out = model(part, past_key_values=cache, use_cache=True)
        parts.append(out.logits)
        cache = out.past_key_values
    return torch.cat(parts, dim=1)


def _log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """float64 of what was computed in the precision of `logits`."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].double()


def main() -> None:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 12, 30, 64])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=output_file)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if arguments.model:
        models = {str(arguments.model): AutoModelForCausalLM.from_pretrained(arguments.model).eval()}
        rows = {name: measure(model) for name, model in models.items()}
    else:
        rows = {f"{layers} layers": measure(random_model(layers)) for layers in arguments.layers}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    text = json.dumps({"date": date.today().isoformat(), "machine": machine, **rows}, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
