"""HF config.json -> the numbers of a decoder: complete, or refused by the name of the field.

Which fields are read, must have one value or do not matter is the table in model.hf.families; any other field
is refused: a new one may mean anything.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mcore_rl import strict_json
from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.experts import Experts, check_experts, read_experts
from mcore_rl.model.hf.families import FAMILIES, PREDICTING, Family, is_known, only_values
from mcore_rl.model.hf.fields import KINDS, check_kinds, shown
from mcore_rl.model.hf.rope import Rotary, read_rotary
from mcore_rl.model.hf.windows import NO_WINDOWS, Windows, read_windows, two_ropes
from mcore_rl.terminal import joined, short


@dataclass(frozen=True)
class Scales:
    """Constants that multiply what passes through the model."""

    embedding: float = 1.0
    residual: float = 1.0
    """what attention and the MLP add to the residual stream"""
    attention: float | None = None
    """of query times key; None for 1 / sqrt(head_dim)"""
    logits: float = 1.0
    """divides them"""
    rounded: bool = False
    """the constant of the embedding is rounded to the model's type"""
    attention_cap: float | None = None
    """scores s of attention become cap tanh(s / cap)"""
    logits_cap: float | None = None
    """the same of logits"""


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
    """hidden size of the MLP in dense layers; 0 where all layers are mixtures"""
    vocab: int
    rotary: Rotary
    norm_eps: float
    tied: bool
    """the output layer is the embedding"""
    qk_norm: bool
    """RMSNorm of every query and key head"""
    qkv_bias: bool
    init_std: float
    experts: Experts | None = None
    whole_qk_norm: bool = False
    """RMSNorm of all query channels together, and of all key channels"""
    input_norms: bool = True
    """RMSNorm of what attention and the MLP read"""
    output_norms: bool = False
    """RMSNorm of what attention and the MLP add to the residual stream"""
    unturned_layers: frozenset[int] = frozenset()
    """layers without rotary embedding, from 0"""
    scales: Scales = Scales()
    windows: Windows = NO_WINDOWS
    local_rotary: Rotary | None = None
    """that of layers with a window, where it is another one"""
    output_bias: bool = False
    """of attention's output projection"""
    mlp_bias: bool = False
    centered_norms: bool = False
    """the weights of norms are stored less 1"""
    activation: str = "silu"
    """of the gate in an MLP: key of model.activations"""
    gate_limit: float | None = None
    """the gate is at most this, before its activation; what it multiplies lies within it on both sides"""
    gate_slope: float = 1.0
    """of the sigmoid in the activation of a gate with a limit"""
    sinks: bool = False
    """a score of every head that takes part in the softmax, without a value"""
    predicting_layers: int = field(default=0, compare=False)
    """layers behind the last one that a checkpoint may have, and that have no part in this model"""

    def is_sparse(self, layer: int) -> bool:
        """True where the MLP of `layer` (from 0) is a mixture of experts."""
        return self.experts is not None and self.experts.sparse_layers[layer]

    def rotary_of(self, layer: int) -> Rotary:
        """How `layer` (from 0) turns queries and keys, if it does."""
        windowed = self.windows.of(layer) is not None
        return self.local_rotary if self.local_rotary is not None and windowed else self.rotary

    @property
    def longest(self) -> int | None:
        """Tokens of a sequence up to which this is what the model computes; None for any length."""
        ropes = [self.rotary] + ([self.local_rotary] if self.local_rotary is not None else [])
        return min((rope.longest for rope in ropes if rope.longest is not None), default=None)

    @property
    def has_shared_expert(self) -> bool:
        """True where an MLP beside the experts reads every token."""
        return self.experts is not None and self.experts.shared > 0


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


def positions_of(path: Path) -> int | None:
    """Tokens that a sequence of the model in `path` may have; None where config.json does not tell."""
    limits = (read_hf_config(path).get("max_position_embeddings"), read_architecture(path).longest)
    return min((limit for limit in limits if limit is not None), default=None)


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
    check_kinds(hf, {**KINDS, **{name: KINDS[here] for name, here in family.names.items()}}, where)
    hf = _renamed(hf, family, where)
    # From here on null is as good as absent: every field has its type or none.
    hf = {name: value for name, value in hf.items() if value is not None}
    _check_quantization(hf.get("quantization_config"), where)
    try:
        arch = _read(hf, family, where)
    except KeyError as error:
        name = next((n for n, here in family.names.items() if here == error.args[0]), error.args[0])
        raise ConfigError(f"{where}: field {name!r} is missing; fetch the published file again") from None
    _check_numbers(arch, where)
    if arch.experts is not None:
        check_experts(arch.experts, where)
    return arch


def _read(hf: dict[str, Any], family: Family, where: str) -> Architecture:
    heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    if head_dim % 2 or head_dim < 1:
        raise ConfigError(
            f"{where}: head_dim = {head_dim} is odd or 0, and rotary embeddings turn pairs; correct "
            "head_dim, or hidden_size where it is hidden_size / num_attention_heads"
        )
    rotary, local = _rotaries(hf, family, head_dim, where)
    attention_bias = hf.get("attention_bias", False)
    return Architecture(
        family=hf["model_type"],
        layers=hf["num_hidden_layers"],
        hidden=hf["hidden_size"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads", heads) if family.own_keys else hf["num_key_value_heads"],
        head_dim=head_dim,
        intermediate=0 if "intermediate_size" in family.names else hf["intermediate_size"],
        vocab=hf["vocab_size"],
        rotary=replace(rotary, interleaved=family.interleaved),
        local_rotary=None if local == rotary else local,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied=hf.get("tie_word_embeddings", False),
        qk_norm=family.qk_norm or hf.get("use_qk_norm", False),
        whole_qk_norm=family.whole_qk_norm,
        qkv_bias=family.qkv_bias or attention_bias,
        output_bias=family.output_bias and attention_bias,
        mlp_bias=hf.get("mlp_bias", False),
        centered_norms=family.centered_norms,
        activation=family.activation,
        gate_limit=hf.get("swiglu_limit"),
        gate_slope=float(hf.get("swiglu_alpha", 1.0)),
        sinks=family.sinks,
        input_norms=family.input_norms,
        output_norms=family.output_norms,
        init_std=hf.get("initializer_range", 0.02),
        experts=read_experts(hf, where, sigmoid=family.sigmoid) if family.sparse else None,
        unturned_layers=_unturned_layers(hf, where) if "no_rope_layers" in family.reads else frozenset(),
        scales=_scales(hf, family),
        windows=read_windows(hf, family.window, where, switched="use_sliding_window" in family.reads),
        predicting_layers=max((hf.get(name, 0) for name in PREDICTING), default=0),
    )


def _rotaries(hf: dict[str, Any], family: Family, head_dim: int, where: str) -> tuple[Rotary, Rotary | None]:
    """The rotary embedding of layers without a window, and that of the others where the family has two."""

    def read(fields: dict[str, Any], theta: float) -> Rotary:
        return read_rotary(fields, head_dim, where, theta=theta, partial=family.partial, kinds=family.ropes)

    if family.rope and not hf.keys() & {"rope_parameters", "rope_scaling"}:
        hf = hf | {"rope_parameters": family.rope}
    if family.local_theta is None:
        return read(hf, family.theta), None
    full, local = two_ropes(hf, where, family.theta, family.local_theta)
    return read(full, family.theta), read(local, family.local_theta)


def _scales(hf: dict[str, Any], family: Family) -> Scales:
    query = hf.get("query_pre_attn_scalar")
    return Scales(
        embedding=hf["hidden_size"] ** 0.5
        if family.root_embedding
        else float(hf.get("embedding_multiplier", 1.0)),
        rounded=family.root_embedding,
        residual=float(hf.get("residual_multiplier", 1.0)),
        attention=hf.get("attention_multiplier") if query is None else query**-0.5,
        attention_cap=hf.get("attn_logit_softcapping"),
        logits=float(hf.get("logits_scaling", 1.0)),
        logits_cap=hf.get("final_logit_softcapping"),
    )


def _renamed(hf: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """The fields by the names that they are read by."""
    renamed: dict[str, Any] = {}
    for name, value in hf.items():
        here = family.names.get(name, name)
        if renamed.get(here, value) != value:
            raise ConfigError(f"{where}: {name} contradicts another name of {here}; keep one")
        renamed[here] = value
    return renamed


def _unturned_layers(hf: dict[str, Any], where: str) -> frozenset[int]:
    """SmolLM3's `no_rope_layers` has, in spite of its name, a 1 where a layer turns its queries and keys."""
    layers, interval = hf["num_hidden_layers"], hf["no_rope_layer_interval"]
    turned = hf.get("no_rope_layers")
    if turned is None:
        turned = [(layer + 1) % interval != 0 for layer in range(layers)]
    if len(turned) != layers:
        raise ConfigError(
            f"{where}: no_rope_layers names {len(turned)} layers, num_hidden_layers is {layers}; correct the "
            "one that is wrong"
        )
    return frozenset(layer for layer, is_turned in enumerate(turned) if not is_turned)


def _refuse_unknown(hf: dict[str, Any], family: Family, where: str) -> None:
    for name, value in only_values(family).items():
        if hf.get(name, value) != value and (hf[name] is not None or value is not False):
            raise ConfigError(f"{where}: {name} = {shown(hf[name])} is not supported, only {shown(value)}")
    others = {n: hf[n] for n in sorted(hf) if hf[n] is not None and not is_known(n, family)}
    if others:
        fields = joined(f"{short(name)} = {shown(value)}" for name, value in others.items())
        raise ConfigError(
            f"{where}: {fields}: no supported field of {hf['model_type']!r}; take it out if it does not "
            "change what the model computes"
        )


def _check_quantization(told: dict[str, Any] | None, where: str) -> None:
    """Raises ConfigError where the weights are stored in another form than model.hf.mxfp4 reads."""
    method = None if told is None else told.get("quant_method")
    if told is not None and method != "mxfp4":
        raise ConfigError(
            f'{where}: quantization_config of {shown(method)} is not supported, only of "mxfp4"; take the '
            "model in bf16"
        )


def _check_numbers(arch: Architecture, where: str) -> None:
    if arch.heads % arch.kv_heads:
        raise ConfigError(
            f"{where}: {arch.kv_heads} key/value heads do not divide {arch.heads} attention heads; correct "
            "num_key_value_heads"
        )
