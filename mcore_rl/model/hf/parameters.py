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
| interleaved | [2, rows, ...] of [..., rows x 2] with gate and up in turns | gate rows, then up   |
| transposed  | [rows, columns] of [columns, rows]            | the same                         |

With more tensor-parallel ranks than kv groups, the rows of qkv are cut as they lie, through groups; Megatron
gathers what the ranks computed and takes the heads of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.architecture import Architecture
from mcore_rl.model.hf.stored import TYPES
from mcore_rl.model.hf.tables import Rule, rules_of, sides

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

HF_DTYPES = TYPES
"""types of weights, as safetensors writes them; others are quantized weights, which need their scales"""

NUMBER = re.compile(r"(?<=decoder\.layers\.)(?P<layer>\d+)|(?<=\.local_experts\.)(?P<expert>\d+)")
"""the number of a layer or an expert in a Megatron name"""
_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+")


@dataclass(frozen=True)
class ParameterEntry:
    """A rule applied to one parameter: concrete names."""

    megatron: str
    hf: tuple[str, ...]
    rule: Rule

    @property
    def layer(self) -> int | None:
        """From 0; None for a parameter outside the layers."""
        return numbers_in(self.megatron).get("layer")

    @property
    def is_expert(self) -> bool:
        """The parameter belongs to one expert, so that not every rank of a stage has it."""
        return "{expert}" in self.rule.megatron


class ParameterMap:
    """The table of one model: names both ways, and the tensors of one tensor-parallel rank."""

    def __init__(self, arch: Architecture, vocab_rows: int) -> None:
        """`vocab_rows`: vocabulary including padding (spec.padded_vocab)."""
        self.arch = arch
        self.vocab_rows = vocab_rows
        self._rules = {rule.megatron: rule for rule in rules_of(arch)}
        self._sides = sides(arch)

    def entries(self) -> list[ParameterEntry]:
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

    def _of_layer(self, rule: Rule, layer: int) -> list[ParameterEntry]:
        if "{expert}" not in rule.megatron or self.arch.experts is None:
            return [_entry(rule, layer=layer)]
        return [_entry(rule, layer=layer, expert=expert) for expert in range(self.arch.experts.count)]

    def entry(self, megatron: str) -> ParameterEntry:
        """The entry of a global Megatron name; a tied output layer answers with the embedding's HF tensor."""
        template = self.template(megatron)
        if template not in self._rules:
            raise ConfigError(
                f"parameter {megatron!r} has no rule in the {self.arch.family} table of model/hf/tables.py"
            )
        numbers = numbers_in(megatron)
        entry = _entry(self._rules[template], **numbers)
        if self.arch.tied and megatron == "output_layer.weight":
            return ParameterEntry(megatron, ("model.embed_tokens.weight",), entry.rule)
        return entry

    @staticmethod
    def template(megatron: str) -> str:
        """A global Megatron name with `{layer}` and `{expert}` in the place of its numbers."""
        return NUMBER.sub(lambda match: f"{{{match.lastgroup}}}", megatron)

    def shapes(self, rule: Rule) -> list[tuple[int, ...]]:
        """The shapes of the HF tensors that one parameter becomes, in the rule's order.

        Raises:
            ConfigError: the rule names a side that this table does not know.
        """
        shapes = self.piece_shapes(rule)
        return [(sum(shape[0] for shape in shapes), *shapes[0][1:])] if rule.joined else shapes

    def piece_shapes(self, rule: Rule) -> list[tuple[int, ...]]:
        """The shapes of what one parameter is made of, whether or not it lies in one HF tensor."""
        unknown = {side for shape in rule.shapes for side in shape.split()} - self._sides.keys()
        if unknown:
            raise ConfigError(
                f"{rule.megatron}: no model has a side {min(unknown)!r}; name it in model.hf.tables.sides"
            )
        return [tuple(self._sides[side] for side in shape.split()) for shape in rule.shapes]

    def _pieces(self, rule: Rule, hf: Sequence[Tensor]) -> list[Tensor]:
        """Views of HF tensors: what one parameter is made of."""
        if not rule.joined:
            return list(hf)
        return list(hf[0].split([shape[0] for shape in self.piece_shapes(rule)]))

    def shape(self, rule: Rule) -> tuple[int, ...]:
        """The shape of the parameter of one rank that has all of it, without padding."""
        parts = self.shapes(rule)
        if rule.merge in ("interleaved", "transposed"):
            return parts[0][::-1]
        return (sum(part[0] for part in parts), *parts[0][1:])

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every HF tensor that a checkpoint of this model must hold, with its shape."""
        return {
            name: shape
            for entry in self.entries()
            for name, shape in zip(entry.hf, self.shapes(entry.rule), strict=True)
        }

    def problems(self, found: Mapping[str, tuple[tuple[int, ...], str]]) -> list[str]:
        """What keeps HF tensors, `found` by name as (shape, type in safetensors), from being this model.

        HF tensors that become one parameter must have one floating-point type: gate and up; query, key and
        value; the experts of a layer. Others may differ, as norms in float32 beside matrices in bfloat16.
        """
        expected = self.hf_shapes()
        tied = f"config.json has tie_word_embeddings = {str(self.arch.tied).lower()}"
        why = {"lm_head.weight": f" ({tied})"}
        problems = [f"missing {name}{why.get(name, '')}" for name in sorted(expected.keys() - found.keys())]
        problems += [
            f"unexpected {name}{why.get(name, '')}" for name in sorted(found.keys() - expected.keys())
        ]
        for name in sorted(expected.keys() & found.keys()):
            shape, dtype = found[name]
            if shape != expected[name]:
                problems.append(f"{name} has shape {shape}, config.json asks for {expected[name]}")
            if dtype not in HF_DTYPES:
                problems.append(f"{name} has type {dtype}, not one of {', '.join(HF_DTYPES)}")
        return problems + self._mixed({name: dtype for name, (_, dtype) in found.items()})

    def _mixed(self, types: Mapping[str, str]) -> list[str]:
        """The HF tensors of another type than one with which they become one parameter."""
        first: dict[str, str] = {}
        problems = []
        for entry in self.entries():
            parameter = _EXPERT.sub("*", entry.megatron)
            for name in entry.hf:
                like = first.setdefault(parameter, name) if name in types else name
                if types.get(like) != types.get(name):
                    problems.append(f"{name} has type {types[name]}, {like} {types[like]}")
        return problems

    def to_shard(self, entry: ParameterEntry, hf: Iterable[Tensor], rank: int, size: int) -> Tensor:
        """HF tensors of one entry -> the parameter of tensor-parallel `rank` of `size`."""
        merge, axis = entry.rule.merge, entry.rule.axis
        view = self._merge(merge, self._pieces(entry.rule, list(hf)))
        if self._is_cut_through(entry.rule, size):
            return self._flatten(merge, view).chunk(size)[rank]
        if axis is not None:
            view = view.chunk(size, dim=axis)[rank]
        return self._flatten(merge, view)

    def _is_cut_through(self, rule: Rule, size: int) -> bool:
        return rule.merge == "qkv" and size > self.arch.kv_heads

    def place(
        self, entry: ParameterEntry, shard: Tensor, rank: int, size: int, out: Sequence[Tensor]
    ) -> None:
        """Copy the parameter of tensor-parallel `rank` of `size` to where it belongs in HF tensors `out`.

        The inverse of `to_shard`, one rank's shard at a time and into memory that is there. A tensor of `out`
        may have another type, which the copy rounds to.
        """
        rule = entry.rule
        pieces = self._pieces(rule, out)
        if self._is_cut_through(rule, size):
            return self._place_rows(shard, rank, pieces)
        for part, tensor in zip(self.parts(entry, shard, size), pieces, strict=True):
            if rule.axis is None:
                tensor.view(part.shape).copy_(part)
                continue
            axis = rule.axis - 1 if rule.merge == "stack" else rule.axis  # of one part, without the stack's
            whole = tensor.view(self.arch.kv_heads, *part.shape[1:]) if rule.merge == "qkv" else tensor
            begin = rank * part.shape[axis]
            live = max(0, min(part.shape[axis], whole.shape[axis] - begin))  # less the vocabulary's padding
            whole.narrow(axis, min(begin, whole.shape[axis]), live).copy_(part.narrow(axis, 0, live))

    def _place_rows(self, shard: Tensor, rank: int, out: Sequence[Tensor]) -> None:
        """Some rows of query, key and value, which may begin and end within a head, to their places."""
        width, per_group = self.arch.head_dim, self.arch.heads // self.arch.kv_heads
        begin, end = rank * len(shard), (rank + 1) * len(shard)
        for number in range(begin // width, -(-end // width)):  # heads in Megatron's order
            group, place = divmod(number, per_group + 2)
            query = place < per_group
            tensor = out[0] if query else out[place - per_group + 1]
            head = tensor.narrow(0, (group * per_group + place if query else group) * width, width)
            first, last = max(begin, number * width), min(end, (number + 1) * width)
            head[first - number * width : last - number * width].copy_(shard[first - begin : last - begin])

    def parts(self, entry: ParameterEntry, shard: Tensor, size: int) -> list[Tensor]:
        """What one of `size` tensor-parallel ranks has of each piece of a parameter: views of it.

        Those of query, key and value are [kv groups of the rank, heads per group, head dim, ...].
        """
        merge = entry.rule.merge
        if merge == "stack":
            return list(shard.view(2, -1, *shard.shape[1:]))
        if merge == "interleaved":
            return [shard.view(2, -1, *shard.shape[1:]).transpose(0, 1).flatten(0, 1).t()]
        if merge == "transposed":
            return [shard.t()]
        if merge == "qkv":
            groups = shard.view(self.arch.kv_heads // size, -1, self.arch.head_dim, *shard.shape[1:])
            return list(groups.split([self.arch.heads // self.arch.kv_heads, 1, 1], dim=1))
        return [shard]

    # --- the arrangements ---

    def _merge(self, merge: str, hf: list[Tensor]) -> Tensor:
        if merge == "vocab":
            return torch.nn.functional.pad(hf[0], (0, 0, 0, self.vocab_rows - hf[0].shape[0]))
        if merge == "stack":
            return torch.stack(hf)
        if merge == "interleaved":
            return hf[0].t().unflatten(0, (-1, 2)).transpose(0, 1)
        if merge == "transposed":
            return hf[0].t()
        if merge == "qkv":
            groups = self.arch.kv_heads
            return torch.cat([x.view(groups, -1, self.arch.head_dim, *x.shape[1:]) for x in hf], dim=1)
        return hf[0]

    def _flatten(self, merge: str, view: Tensor) -> Tensor:
        if merge in ("stack", "interleaved"):
            return view.flatten(0, 1)
        return view.flatten(0, 2) if merge == "qkv" else view


def numbers_in(name: str) -> dict[str, int]:
    """{"layer": ..., "expert": ...}, as far as they occur in a Megatron name."""
    return {match.lastgroup or "": int(match[0]) for match in NUMBER.finditer(name)}


def _entry(rule: Rule, **numbers: int) -> ParameterEntry:
    return ParameterEntry(
        rule.megatron.format(**numbers), tuple(name.format(**numbers) for name in rule.hf), rule
    )


def canonical(name: str) -> str:
    """A parameter's name in the portable spec, whichever spec it comes from; see FUSED."""
    for pattern, replacement in FUSED:
        name = pattern.sub(replacement, name)
    return name


VALUE_HEAD = Rule("value_head.weight", ("score.weight",), ("one hidden",))
"""[1, H]; the HF name is that of transformers' sequence classifiers."""


class CriticParameterMap(ParameterMap):
    """The policy's table with the value head in place of the output layer."""

    def __init__(self, arch: Architecture, vocab_rows: int) -> None:
        """Take what ParameterMap takes."""
        super().__init__(arch, vocab_rows)
        del self._rules["output_layer.weight"]
        self._rules[VALUE_HEAD.megatron] = VALUE_HEAD
