"""Hugging Face <-> Megatron parameters: one declarative table per family, used to load, export and publish.

A rule joins one Megatron parameter to one or more HF tensors. `merge` arranges the HF tensors in a view with
the tensor-parallel axis explicit; `axis` is where tensor parallelism cuts that view (None: every rank holds
all of it).

| merge    | view                                             | Megatron's parameter             |
|----------|--------------------------------------------------|----------------------------------|
| single   | the HF tensor                                    | the same                         |
| vocab    | the HF tensor, rows padded with zeros            | the same                         |
| stack    | [2, rows, ...]: gate, up                         | gate rows of the rank, then up   |
| qkv      | [kv groups, queries per group + 2, head dim, ...] | per group: queries, key, value   |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from collections.abc import Mapping as Named
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from mcore_rl.errors import ConfigError
from mcore_rl.model.architecture import Architecture


@dataclass(frozen=True)
class Rule:
    """One line of the table; `{layer}` and `{expert}` stand for global numbers, from 0."""

    megatron: str
    hf: tuple[str, ...]
    merge: str = "single"
    axis: int | None = None
    layers: str = "all"
    """which layers have it: `all`, `dense` or `sparse` (those with a mixture of experts)"""


_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def _mlp_rules(megatron: str, hf: str, layers: str, axes: tuple[int | None, int | None]) -> tuple[Rule, Rule]:
    """The two matrices of a SwiGLU MLP; `axes`: where gate and up, and down, are cut."""
    return (
        Rule(
            f"{megatron}.linear_fc1.weight",
            (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
            "stack",
            axes[0],
            layers,
        ),
        Rule(f"{megatron}.linear_fc2.weight", (f"{hf}.down_proj.weight",), "single", axes[1], layers),
    )


_BACKBONE = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab", 0),
    Rule(f"{_LAYER}input_layernorm.weight", (f"{_HF_LAYER}input_layernorm.weight",)),
    Rule(
        f"{_LAYER}self_attention.linear_qkv.weight",
        tuple(f"{_HF_LAYER}self_attn.{x}_proj.weight" for x in "qkv"),
        "qkv",
        0,
    ),
    Rule(f"{_LAYER}self_attention.linear_proj.weight", (f"{_HF_LAYER}self_attn.o_proj.weight",), axis=1),
    Rule(f"{_LAYER}pre_mlp_layernorm.weight", (f"{_HF_LAYER}post_attention_layernorm.weight",)),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Rule("output_layer.weight", ("lm_head.weight",), "vocab", 0),
)
_QKV_BIAS = (
    Rule(
        f"{_LAYER}self_attention.linear_qkv.bias",
        tuple(f"{_HF_LAYER}self_attn.{x}_proj.bias" for x in "qkv"),
        "qkv",
        0,
    ),
)
_QK_NORM = tuple(
    Rule(f"{_LAYER}self_attention.{x}_layernorm.weight", (f"{_HF_LAYER}self_attn.{x}_norm.weight",))
    for x in "qk"
)
_DENSE_MLP = _mlp_rules(f"{_LAYER}mlp", f"{_HF_LAYER}mlp", "dense", (1, 1))
_EXPERTS = (
    Rule(f"{_LAYER}mlp.router.weight", (f"{_HF_LAYER}mlp.gate.weight",), layers="sparse"),
    *_mlp_rules(
        f"{_LAYER}mlp.experts.local_experts.{{expert}}",
        f"{_HF_LAYER}mlp.experts.{{expert}}",
        "sparse",
        (None, None),
    ),
)
TABLES: dict[str, tuple[Rule, ...]] = {
    "llama": _BACKBONE + _DENSE_MLP,
    "mistral": _BACKBONE + _DENSE_MLP,
    "qwen2": _BACKBONE + _QKV_BIAS + _DENSE_MLP,
    "qwen3": _BACKBONE + _QK_NORM + _DENSE_MLP,
    "qwen3_moe": _BACKBONE + _QK_NORM + _DENSE_MLP + _EXPERTS,
}
"""family -> rules"""

FUSED = (
    (re.compile(r"\bself_attention\.linear_qkv\.layer_norm_(?=weight$)"), "input_layernorm."),
    (re.compile(r"\bmlp\.linear_fc1\.layer_norm_(?=weight$)"), "pre_mlp_layernorm."),
    (
        re.compile(r"\bmlp\.experts\.(linear_fc[12])\.weight(\d+)$"),
        r"mlp.experts.local_experts.\2.\1.weight",
    ),
)
"""Transformer Engine's name -> that of the portable spec: it joins a norm with the linear layer that follows,
and the experts of a rank into one grouped linear layer with a numbered weight each"""

HF_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""types of weights, as safetensors writes them; others are quantized weights, which need their scales"""

_NUMBER = re.compile(r"(?<=decoder\.layers\.)(?P<layer>\d+)|(?<=\.local_experts\.)(?P<expert>\d+)")


@dataclass(frozen=True)
class Entry:
    """A rule applied to one parameter: concrete names."""

    megatron: str
    hf: tuple[str, ...]
    rule: Rule

    @property
    def layer(self) -> int | None:
        """From 0; None for a parameter outside the layers."""
        return _numbers(self.megatron).get("layer")

    @property
    def is_expert(self) -> bool:
        """The parameter belongs to one expert, so that not every rank of a stage has it."""
        return "{expert}" in self.rule.megatron


class Mapping:
    """The table of one model: names both ways, and the tensors of one tensor-parallel rank."""

    def __init__(self, arch: Architecture, vocab_rows: int) -> None:
        """`vocab_rows`: vocabulary including padding (spec.padded_vocab)."""
        self.arch = arch
        self.vocab_rows = vocab_rows
        self._rules = {rule.megatron: rule for rule in TABLES[arch.family]}

    def entries(self) -> list[Entry]:
        """Every parameter of the whole model in a fixed order, a tied output layer left out."""
        rules = [
            r for r in self._rules.values() if not (self.arch.tied and r.megatron == "output_layer.weight")
        ]
        once = [_entry(rule) for rule in rules if "{layer}" not in rule.megatron]
        per_layer = [rule for rule in rules if "{layer}" in rule.megatron]
        return once + [
            entry
            for layer in range(self.arch.layers)
            for rule in per_layer
            if rule.layers in ("all", "sparse" if self.arch.is_sparse(layer) else "dense")
            for entry in self._of_layer(rule, layer)
        ]

    def _of_layer(self, rule: Rule, layer: int) -> list[Entry]:
        if "{expert}" not in rule.megatron or self.arch.experts is None:
            return [_entry(rule, layer=layer)]
        return [_entry(rule, layer=layer, expert=expert) for expert in range(self.arch.experts.count)]

    def entry(self, megatron: str) -> Entry:
        """The entry of a global Megatron name; a tied output layer answers with the embedding's HF tensor."""
        template = _NUMBER.sub(lambda match: f"{{{match.lastgroup}}}", megatron)
        if template not in self._rules:
            raise ConfigError(
                f"parameter {megatron!r} has no rule in the {self.arch.family} table of model/mapping.py"
            )
        numbers = _numbers(megatron)
        entry = _entry(self._rules[template], **numbers)
        if self.arch.tied and megatron == "output_layer.weight":
            return Entry(megatron, ("model.embed_tokens.weight",), entry.rule)
        return entry

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every HF tensor that a checkpoint of this model must hold, with its shape."""
        return {name: self.hf_shape(name) for entry in self.entries() for name in entry.hf}

    def problems(self, found: Named[str, tuple[tuple[int, ...], str]]) -> list[str]:
        """What keeps HF tensors, `found` by name as (shape, type in safetensors), from being this model.

        All must have one floating-point type: gate and up, or query, key and value, become one parameter.
        """
        expected = self.hf_shapes()
        tied = f"config.json has tie_word_embeddings = {str(self.arch.tied).lower()}"
        why = {"lm_head.weight": f" ({tied})"}
        problems = [f"missing {name}{why.get(name, '')}" for name in sorted(expected.keys() - found.keys())]
        problems += [
            f"unexpected {name}{why.get(name, '')}" for name in sorted(found.keys() - expected.keys())
        ]
        common = Counter(dtype for _, dtype in found.values()).most_common(1)[0][0] if found else ""
        for name in sorted(expected.keys() & found.keys()):
            shape, dtype = found[name]
            if shape != expected[name]:
                problems.append(f"{name} has shape {shape}, config.json asks for {expected[name]}")
            if dtype not in HF_DTYPES:
                problems.append(f"{name} has type {dtype}, not one of {', '.join(HF_DTYPES)}")
            elif dtype != common:
                problems.append(f"{name} has type {dtype}, most others {common}")
        return problems

    def to_shard(self, entry: Entry, hf: Iterable[Tensor], rank: int, size: int) -> Tensor:
        """HF tensors of one entry -> the parameter of tensor-parallel `rank` of `size`."""
        view = self._merge(entry.rule.merge, list(hf))
        if entry.rule.axis is not None:
            view = view.chunk(size, dim=entry.rule.axis)[rank]
        return self._flatten(entry.rule.merge, view)

    def to_hf(self, entry: Entry, shards: list[Tensor]) -> list[Tensor]:
        """The parameters of all tensor-parallel ranks, in rank order -> HF tensors of the entry."""
        rule = entry.rule
        views = [self._unflatten(rule.merge, shard, len(shards)) for shard in shards]
        view = views[0] if rule.axis is None else torch.cat(views, dim=rule.axis)
        return [tensor.contiguous() for tensor in self._split(rule.merge, view)]

    def place(self, entry: Entry, shard: Tensor, rank: int, size: int, out: list[Tensor]) -> None:
        """Copy the parameter of tensor-parallel `rank` of `size` to where it belongs in HF tensors `out`.

        What `to_hf` makes of the shards of all ranks, one at a time and into memory that is there.
        """
        rule = entry.rule
        parts = self._parts(rule.merge, self._unflatten(rule.merge, shard, size))
        for part, tensor in zip(parts, out, strict=True):
            if rule.axis is None:
                tensor.view(part.shape).copy_(part)
                continue
            axis = rule.axis - 1 if rule.merge == "stack" else rule.axis  # of one part, without the stack's
            whole = tensor.view(self.arch.kv_heads, *part.shape[1:]) if rule.merge == "qkv" else tensor
            begin = rank * part.shape[axis]
            live = max(0, min(part.shape[axis], whole.shape[axis] - begin))  # less the vocabulary's padding
            whole.narrow(axis, min(begin, whole.shape[axis]), live).copy_(part.narrow(axis, 0, live))

    # --- the four arrangements ---

    def _merge(self, merge: str, hf: list[Tensor]) -> Tensor:
        if merge == "vocab":
            return torch.nn.functional.pad(hf[0], (0, 0, 0, self.vocab_rows - hf[0].shape[0]))
        if merge == "stack":
            return torch.stack(hf)
        if merge == "qkv":
            groups = self.arch.kv_heads
            return torch.cat([x.view(groups, -1, self.arch.head_dim, *x.shape[1:]) for x in hf], dim=1)
        return hf[0]

    def _split(self, merge: str, view: Tensor) -> list[Tensor]:
        if merge == "vocab":
            return [view[: self.arch.vocab]]
        if merge == "qkv":
            return [x.flatten(0, 2) for x in self._parts(merge, view)]
        return self._parts(merge, view)

    def _parts(self, merge: str, view: Tensor) -> list[Tensor]:
        """A shard's view -> its part of each HF tensor, not copied."""
        if merge == "stack":
            return list(view)
        if merge == "qkv":
            return list(view.split([self.arch.heads // self.arch.kv_heads, 1, 1], dim=1))
        return [view]

    def _flatten(self, merge: str, view: Tensor) -> Tensor:
        return {"stack": lambda: view.flatten(0, 1), "qkv": lambda: view.flatten(0, 2)}.get(
            merge, lambda: view
        )()

    def _unflatten(self, merge: str, shard: Tensor, ranks: int) -> Tensor:
        if merge == "stack":
            return shard.view(2, -1, *shard.shape[1:])
        if merge == "qkv":
            return shard.view(self.arch.kv_heads // ranks, -1, self.arch.head_dim, *shard.shape[1:])
        return shard

    def hf_shape(self, name: str) -> tuple[int, ...]:
        """Of one HF tensor."""
        a = self.arch
        intermediate = a.experts.intermediate if a.experts and ".experts." in name else a.intermediate
        endings: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (a.vocab, a.hidden),
            "lm_head.weight": (a.vocab, a.hidden),
            "q_proj.weight": (a.heads * a.head_dim, a.hidden),
            "k_proj.weight": (a.kv_heads * a.head_dim, a.hidden),
            "v_proj.weight": (a.kv_heads * a.head_dim, a.hidden),
            "o_proj.weight": (a.hidden, a.heads * a.head_dim),
            "q_proj.bias": (a.heads * a.head_dim,),
            "k_proj.bias": (a.kv_heads * a.head_dim,),
            "v_proj.bias": (a.kv_heads * a.head_dim,),
            "q_norm.weight": (a.head_dim,),
            "k_norm.weight": (a.head_dim,),
            "gate_proj.weight": (intermediate, a.hidden),
            "up_proj.weight": (intermediate, a.hidden),
            "down_proj.weight": (a.hidden, intermediate),
            "mlp.gate.weight": (a.experts.count if a.experts else 0, a.hidden),
        }
        return next((shape for ending, shape in endings.items() if name.endswith(ending)), (a.hidden,))


def _numbers(name: str) -> dict[str, int]:
    """{"layer": ..., "expert": ...}, as far as they occur in a Megatron name."""
    return {match.lastgroup or "": int(match[0]) for match in _NUMBER.finditer(name)}


def _entry(rule: Rule, **numbers: int) -> Entry:
    return Entry(rule.megatron.format(**numbers), tuple(name.format(**numbers) for name in rule.hf), rule)


def canonical(name: str) -> str:
    """A parameter's name in the portable spec, whichever spec it comes from; see FUSED."""
    for pattern, replacement in FUSED:
        name = pattern.sub(replacement, name)
    return name


def global_parameters(chunks: Iterable[GPTModel]) -> dict[str, torch.nn.Parameter]:
    """Global Megatron name -> parameter, of all model chunks on this rank (unwrapped GPTModels).

    Megatron numbers layers within a chunk and experts within a rank; here both are global, from 0. The names
    are canonical: those of the portable spec, also where Transformer Engine fuses modules.
    """
    named: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            named[_globalize(name, chunk)] = parameter
    return named


def _globalize(name: str, chunk: GPTModel) -> str:
    name = canonical(name)
    numbers = _numbers(name)
    if not numbers:
        return name
    layer: Any = chunk.decoder.layers[numbers["layer"]]
    known = {"layer": layer.layer_number - 1}
    if "expert" in numbers:
        known["expert"] = layer.mlp.local_expert_indices[numbers["expert"]]
    return _NUMBER.sub(lambda match: str(known[match.lastgroup or ""]), name)
