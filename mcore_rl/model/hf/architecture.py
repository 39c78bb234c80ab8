"""HF config.json -> the numbers of a decoder: complete, or refused by the name of the field.

Which fields are read, must have one value or do not matter is the table in model.hf.families; any other field
is refused: a new one may mean anything.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_rl import strict_json
from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.families import FAMILIES, Family, is_known, only_values
from mcore_rl.model.hf.fields import KINDS, ROPE_KINDS, check_kinds, shown
from mcore_rl.terminal import joined, listed, quoted, short


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: softmax router, no shared expert, no capacity limit, no auxiliary loss."""

    count: int
    per_token: int
    """experts that each token is sent to"""
    intermediate: int
    normalized: bool
    """the weights of a token's experts sum to 1"""
    sparse_layers: tuple[bool, ...]
    """[layers] True where the MLP is a mixture"""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of slow rotary frequencies (`llama3`); see model.policy.rotary_frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int
    """longest sequence of the pretraining before the stretch"""


@dataclass(frozen=True)
class Architecture:
    """The numbers of a decoder that change its maths, read from config.json."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """hidden size of the MLP in dense layers"""
    vocab: int
    rope_theta: float
    norm_eps: float
    tied: bool
    """the output layer is the embedding"""
    qk_norm: bool
    qkv_bias: bool
    init_std: float
    rope_scaling: RopeScaling | None = None
    experts: Experts | None = None

    def is_sparse(self, layer: int) -> bool:
        """True where the MLP of `layer` (from 0) is a mixture of experts."""
        return self.experts is not None and self.experts.sparse_layers[layer]


def read_hf_config(path: Path) -> dict[str, Any]:
    """The dictionary in `path`/config.json; ConfigError when it is missing or not JSON."""
    return read_json_object(Path(path) / "config.json")


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model directory.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or holds something else than an object.
    """
    if os.path.exists(file) and not os.path.isfile(file):  # to read a pipe could take for ever
        raise ConfigError(f"{file}: not a plain file; fetch the file again")
    try:
        content = strict_json.parse(file.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{file}: not found; give the path of a Hugging Face model directory") from None
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; check the path and its rights") from None
    except strict_json.JsonError as error:
        raise ConfigError(f"{file}:{error.line}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: holds a {type(content).__name__}, not an object; fetch the file again")
    return content


def read_architecture(path: Path) -> Architecture:
    """Read `path`/config.json; ConfigError names a field that changes the maths and is not supported."""
    return architecture_of(read_hf_config(path), str(Path(path) / "config.json"))


def architecture_of(hf: dict[str, Any], where: str = "config.json") -> Architecture:
    """The architecture of a config.json that is already read; `where` begins every message.

    Raises:
        ConfigError: as read_architecture.
    """
    kind = hf.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ConfigError(
            f"{where}: model_type {shown(kind)} is not supported; supported: {', '.join(FAMILIES)}"
        )
    hf = family.defaults | hf
    _refuse_unknown(hf, family, where)
    check_kinds(hf, KINDS, where)
    # From here on null is as good as absent: every field has its type or none.
    hf = {name: value for name, value in hf.items() if value is not None}
    _check_layer_types(hf, where)
    rope = _read_rope(hf, where)
    try:
        arch = Architecture(
            family=hf["model_type"],
            layers=hf["num_hidden_layers"],
            hidden=hf["hidden_size"],
            heads=hf["num_attention_heads"],
            kv_heads=_kv_heads(hf),
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            intermediate=hf["intermediate_size"],
            vocab=hf["vocab_size"],
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=_read_scaling(rope, where),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tied=hf.get("tie_word_embeddings", False),
            qk_norm=family.qk_norm,
            qkv_bias=family.qkv_bias,
            init_std=hf.get("initializer_range", 0.02),
            experts=_read_experts(hf, where) if family.sparse else None,
        )
    except KeyError as error:
        raise ConfigError(f"{where}: field {error} is missing; fetch the published file again") from None
    _check_numbers(arch, where)
    if arch.experts is not None:
        _check_experts(arch.experts, where)
    return arch


def _kv_heads(hf: dict[str, Any]) -> int:
    """Files of the first Llama have no such field: every head has its own keys and values."""
    if hf["model_type"] == "llama" and "num_key_value_heads" not in hf:
        return hf["num_attention_heads"]
    return hf["num_key_value_heads"]


def _refuse_unknown(hf: dict[str, Any], family: Family, where: str) -> None:
    for name, value in only_values(family).items():
        if hf.get(name, value) != value:
            raise ConfigError(f"{where}: {name} = {shown(hf[name])} is not supported, only {shown(value)}")
    others = {n: hf[n] for n in sorted(hf) if hf[n] is not None and not is_known(n, family)}
    if others:
        fields = joined(f"{short(name)} = {shown(value)}" for name, value in others.items())
        raise ConfigError(
            f"{where}: {fields}: no supported field of {hf['model_type']!r}; take it out if it does not "
            "change what the model computes"
        )


def _check_layer_types(hf: dict[str, Any], where: str) -> None:
    kinds = hf.get("layer_types", [])
    windows = sorted(set(kinds) - {"full_attention"})
    if windows:
        raise ConfigError(f"{where}: layer_types {listed(windows)} are not supported, only full_attention")
    if kinds and len(kinds) != hf.get("num_hidden_layers", len(kinds)):
        raise ConfigError(
            f"{where}: layer_types names {len(kinds)} layers, num_hidden_layers is "
            f"{hf['num_hidden_layers']}; correct the one that is wrong"
        )


_THETA = 10000.0
"""what transformers takes for an absent rope_theta, of every family here"""
_SCALING = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def _read_rope(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """The rotary parameters: rope_theta and rope_scaling of transformers 4, or rope_parameters of 5."""
    theta, old, new = hf.get("rope_theta"), hf.get("rope_scaling", {}), hf.get("rope_parameters", {})
    for name, parameters in (("rope_scaling", old), ("rope_parameters", new)):
        check_kinds(parameters, ROPE_KINDS, f"{where}: {name}")
    rope = {"rope_theta": _THETA if theta is None else theta} | old | new
    differ = any(name not in new or new[name] != value for name, value in old.items())
    if (old and new and differ) or theta not in (None, rope.get("rope_theta")):
        raise ConfigError(f"{where}: rope_parameters contradicts rope_scaling or rope_theta; keep one")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(f"{where}: rope_type {quoted(kind)} is not supported, only 'default' and 'llama3'")
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial not in (None, 1.0):
        raise ConfigError(f"{where}: partial_rotary_factor = {partial} is not supported, only 1.0")
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    unknown = rope.keys() - known - (_SCALING if kind == "llama3" else set())
    if unknown:
        raise ConfigError(
            f"{where}: rope fields {listed(sorted(unknown))} are not supported with rope_type {quoted(kind)}"
        )
    return rope | {"rope_type": kind}


def _read_scaling(rope: dict[str, Any], where: str) -> RopeScaling | None:
    if rope["rope_type"] == "default":
        return None
    scaling = RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_positions=rope["original_max_position_embeddings"],
    )
    if not 0 < scaling.low_freq_factor < scaling.high_freq_factor or scaling.factor < 1:
        raise ConfigError(f"{where}: rope scaling needs 0 < low_freq_factor < high_freq_factor, factor >= 1")
    return scaling


def _read_experts(hf: dict[str, Any], where: str) -> Experts:
    if hf.get("num_local_experts", hf.get("num_experts")) != hf.get(
        "num_experts", hf.get("num_local_experts")
    ):
        raise ConfigError(f"{where}: num_experts contradicts num_local_experts; keep one")
    dense, step = hf.get("mlp_only_layers", []), hf.get("decoder_sparse_step", 1)
    return Experts(
        count=hf["num_experts" if "num_local_experts" not in hf else "num_local_experts"],
        per_token=hf["num_experts_per_tok"],
        intermediate=hf["moe_intermediate_size"],
        normalized=hf.get("norm_topk_prob", False),
        sparse_layers=tuple(
            layer not in dense and (layer + 1) % step == 0 for layer in range(hf["num_hidden_layers"])
        ),
    )


def _check_numbers(arch: Architecture, where: str) -> None:
    if arch.heads % arch.kv_heads:
        raise ConfigError(
            f"{where}: {arch.kv_heads} key/value heads do not divide {arch.heads} attention heads; correct "
            "num_key_value_heads"
        )
    if arch.head_dim % 2 or arch.head_dim < 1:
        raise ConfigError(
            f"{where}: head_dim = {arch.head_dim} is odd or 0, and rotary embeddings turn pairs; correct "
            "head_dim, or hidden_size where it is hidden_size / num_attention_heads"
        )


def _check_experts(experts: Experts, where: str) -> None:
    if experts.per_token > experts.count:
        raise ConfigError(
            f"{where}: num_experts_per_tok = {experts.per_token} of num_experts = {experts.count}; correct "
            "the one that is wrong"
        )
    if experts.normalized and experts.per_token == 1:
        # The weight of the only expert is 1 whatever the router says; Megatron-Core refuses to build it.
        raise ConfigError(
            f"{where}: num_experts_per_tok = 1 with norm_topk_prob = true gives every token the weight 1, so "
            "that the router would get no gradient, and Megatron-Core has no such router; take a model with "
            "2 or more experts per token, or with norm_topk_prob = false"
        )
