"""HF config.json -> the numbers of a decoder: complete, or refused by the name of the field.

Which fields are read, must have one value or do not matter is the table in model.families; any other field is
refused: a new one may mean anything.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcore_rl.errors import ConfigError
from mcore_rl.model.families import FAMILIES, Family, known_fields, only_values


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
    """Llama 3.1's stretching of slow rotary frequencies (rope_type `llama3`); see model.rotary."""

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
    """of dense layers"""
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
    file = Path(path) / "config.json"
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file}: not found; give the path of a Hugging Face model directory") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: holds a {type(content).__name__}, not an object")
    return content


def read_architecture(path: Path) -> Architecture:
    """Read `path`/config.json; ConfigError names a field that changes the maths and is not supported."""
    return architecture_of(read_hf_config(path), str(Path(path) / "config.json"))


def architecture_of(hf: dict[str, Any], where: str = "config.json") -> Architecture:
    """As `read_architecture`, of the dictionary itself; `where` begins every message."""
    family = FAMILIES.get(hf.get("model_type", ""))
    if family is None:
        raise ConfigError(
            f"{where}: model_type {hf.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    hf = family.defaults | hf
    _refuse_unknown(hf, family, where)
    rope = _read_rope(hf, where)
    try:
        arch = Architecture(
            family=hf["model_type"],
            layers=hf["num_hidden_layers"],
            hidden=hf["hidden_size"],
            heads=hf["num_attention_heads"],
            kv_heads=hf["num_key_value_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            intermediate=hf["intermediate_size"],
            vocab=hf["vocab_size"],
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=_read_scaling(rope, where),
            norm_eps=hf["rms_norm_eps"],
            tied=bool(hf.get("tie_word_embeddings", False)),
            qk_norm=family.qk_norm,
            qkv_bias=family.qkv_bias,
            init_std=hf.get("initializer_range", 0.02),
            experts=_read_experts(hf) if family.sparse else None,
        )
    except KeyError as error:
        raise ConfigError(f"{where}: field {error} is missing") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{where}: a field has a value of the wrong type or size: {error}") from None
    _check_numbers(arch, where)
    return arch


def _refuse_unknown(hf: dict[str, Any], family: Family, where: str) -> None:
    for name, value in only_values(family).items():
        if hf.get(name, value) != value:
            raise ConfigError(
                f"{where}: {name} = {json.dumps(hf[name])} is not supported, only {json.dumps(value)}"
            )
    windows = sorted(set(hf.get("layer_types") or ()) - {"full_attention"})
    if windows:
        raise ConfigError(f"{where}: layer_types {windows} are not supported, only full_attention")
    others = {name: hf[name] for name in sorted(hf.keys() - known_fields(family)) if hf[name] is not None}
    if others:
        fields = ", ".join(f"{name} = {json.dumps(value)}" for name, value in others.items())
        raise ConfigError(
            f"{where}: {fields}: no supported field of {hf['model_type']!r}; take it out if it does not "
            "change what the model computes"
        )


_SCALING = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}


def _read_rope(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """The rotary parameters: rope_theta and rope_scaling of transformers 4, or rope_parameters of 5."""
    theta, old, new = hf.get("rope_theta"), hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    rope = ({} if theta is None else {"rope_theta": theta}) | old | new
    if (old and new and old.items() - new.items()) or theta not in (None, rope.get("rope_theta")):
        raise ConfigError(f"{where}: rope_parameters contradicts rope_scaling or rope_theta; keep one")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(f"{where}: rope_type {kind!r} is not supported, only 'default' and 'llama3'")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        partial = rope["partial_rotary_factor"]
        raise ConfigError(f"{where}: partial_rotary_factor = {partial} is not supported, only 1.0")
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    unknown = rope.keys() - known - (_SCALING if kind == "llama3" else set())
    if unknown:
        raise ConfigError(f"{where}: rope fields {sorted(unknown)} are not supported with rope_type {kind!r}")
    return rope | {"rope_type": kind}


def _read_scaling(rope: dict[str, Any], where: str) -> RopeScaling | None:
    if rope["rope_type"] == "default":
        return None
    scaling = RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_positions=int(rope["original_max_position_embeddings"]),
    )
    if not 0 < scaling.low_freq_factor < scaling.high_freq_factor or scaling.factor < 1:
        raise ConfigError(f"{where}: rope scaling needs 0 < low_freq_factor < high_freq_factor, factor >= 1")
    return scaling


def _read_experts(hf: dict[str, Any]) -> Experts:
    dense, step = hf.get("mlp_only_layers") or (), hf.get("decoder_sparse_step", 1)
    return Experts(
        count=hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"],
        per_token=hf["num_experts_per_tok"],
        intermediate=hf["moe_intermediate_size"],
        normalized=bool(hf.get("norm_topk_prob", False)),
        sparse_layers=tuple(
            layer not in dense and (layer + 1) % step == 0 for layer in range(hf["num_hidden_layers"])
        ),
    )


def _check_numbers(arch: Architecture, where: str) -> None:
    names = ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab")
    bad = [name for name in names if type(getattr(arch, name)) is not int or getattr(arch, name) < 1]
    if bad:
        found = ", ".join(f"{name} = {getattr(arch, name)!r}" for name in bad)
        raise ConfigError(f"{where}: not positive whole numbers: {found}")
    if arch.heads % arch.kv_heads:
        raise ConfigError(
            f"{where}: {arch.kv_heads} key/value heads do not divide {arch.heads} attention heads"
        )
    if arch.head_dim % 2:
        raise ConfigError(f"{where}: head_dim = {arch.head_dim} is odd; rotary embeddings turn pairs")
