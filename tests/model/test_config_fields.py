"""Every field of a family's config class, as the installed transformers has it: read, fixed, or harmless.

The oracle is transformers: a field that is set to another value, or left out, either leaves its logits as
they are, or is seen here, as another architecture or a refusal by the field's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor

from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.architecture import Architecture, architecture_of
from mcore_rl.model.hf.families import FAMILIES as KNOWN
from mcore_rl.model.hf.families import Family, is_known
from tests.model.families import FAMILIES, LLAMA3

ROPE_KINDS = ("linear", "dynamic", "yarn", "longrope", "llama3")
TYPED = {
    "hidden_act": "gelu",
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 2,
    "max_window_layers": 0,
    "mlp_only_layers": [0],
    "no_rope_layers": [0, 1],
    "router_jitter_noise": 0.5,
    "dtype": "bfloat16",
    "tokenizer_class": "x",
    "_name_or_path": "x",
    "id2label": {"0": "x"},
}
"""fields whose other value does not follow from its type"""
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
"""absent, they are refused: every published file has them, and transformers' guess is a model of its own"""


def fields(family: str) -> dict[str, Any]:
    """What transformers writes of the tiny model: every field of the class, with its value."""
    kind, settings = FAMILIES[family]
    return getattr(transformers, kind)(**settings).to_dict()


def aliases(family: str) -> dict[str, str]:
    """Other name of a field -> the one that transformers writes."""
    return getattr(transformers, FAMILIES[family][0]).attribute_map


def another(name: str, value: Any) -> Any:
    """A value of the same type, or one that means something where there is none."""
    if name in TYPED:
        return TYPED[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 2 * value if value else 1
    return [] if isinstance(value, list) else 1


def changes(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, the fields with one of them changed)."""
    whole = fields(family)
    for name, value in whole.items():
        if name not in (
            "model_type",
            "rope_parameters",
            "return_dict",
        ):  # transformers 5 fails without the last
            yield name, whole | {name: another(name, value)}
    for other, name in aliases(family).items():  # published files have the other name
        less = {field: value for field, value in whole.items() if field != name}
        yield other, less | {other: another(name, whole[name])}
        yield other, whole | {other: another(name, whole[name])}
    rope = whole["rope_parameters"]
    if "full_attention" not in rope:
        yield from ((name, whole | {"rope_parameters": changed}) for name, changed in rope_changes(rope))
    else:  # a rotary embedding for each kind of layer
        for layers, own in rope.items():
            for name, changed in rope_changes(own):
                yield name, whole | {"rope_parameters": rope | {layers: changed}}


def rope_changes(rope: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same of rotary parameters alone."""
    for name, value in rope.items():
        if name != "rope_type":
            yield f"rope_parameters.{name}", rope | {name: 2 * value}
    for kind in ROPE_KINDS:
        yield f"rope_parameters.{kind}", rope | LLAMA3 | {"rope_type": kind}


@cache
def logits(family: str) -> tuple[dict[str, Tensor], Tensor]:
    """(weights, [1, T, V]) of the tiny model."""
    torch.manual_seed(0)
    model = model_of(fields(family))
    return model.state_dict(), answer(model)


def model_of(hf: dict[str, Any]) -> torch.nn.Module:
    kind, _ = next(made for made in FAMILIES.values() if KINDS[made[0]] == hf["model_type"])
    config = getattr(transformers, kind).from_dict(dict(hf))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


KINDS = {kind: getattr(transformers, kind).model_type for kind, _ in FAMILIES.values()}


def answer(model: torch.nn.Module) -> Tensor:
    tokens = torch.tensor([[3, 17, 5, 41, 2, 9, 30, 11, 23, 7, 19, 44, 1, 6]])
    with torch.no_grad():
        return model(tokens).logits


def tiny_of(family: str) -> str:
    """The first tiny model of a family."""
    return next(name for name, made in FAMILIES.items() if KINDS[made[0]] == family)


@pytest.mark.parametrize("family", KNOWN)
def test_every_field_of_the_class_is_known(family: str) -> None:
    declared = {
        field.name for field in dataclasses.fields(getattr(transformers, FAMILIES[tiny_of(family)][0]))
    }
    written = fields(tiny_of(family)).keys() | aliases(tiny_of(family)).keys()
    assert declared <= written, "a field that transformers declares and does not write is not changed below"
    assert [name for name in sorted(written | declared) if not is_known(name, KNOWN[family])] == []


def read(hf: dict[str, Any]) -> Architecture | str:
    """The architecture, or what refused it says."""
    try:
        return architecture_of(hf)
    except ConfigError as error:
        return str(error)


def unseen(family: str) -> list[str]:
    """The fields that change transformers' logits, and nothing here."""
    plain = architecture_of(fields(family))
    weights, expected = logits(family)
    found = []
    for name, hf in changes(family):
        seen = read(hf)
        if seen != plain:
            assert isinstance(seen, Architecture) or name.rpartition(".")[2] in seen, f"{name}: {seen}"
            continue
        model = model_of(hf)
        model.load_state_dict(weights)
        if not torch.equal(answer(model), expected):
            found.append(name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_field_that_changes_the_logits_is_seen(family: str) -> None:
    assert unseen(family) == []


def test_a_field_that_is_wrongly_held_harmless_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN, "mistral", Family(harmless=frozenset({"sliding_window"})))
    assert unseen("mistral") == ["sliding_window"]


@pytest.mark.slow
@pytest.mark.parametrize("null", [False, True], ids=["absent", "null"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_that_is_left_out_is_as_transformers_takes_it(family: str, null: bool) -> None:
    whole = fields(family)
    for name in whole.keys() - SIZES - {"model_type"}:
        less = {other: value for other, value in whole.items() if other != name} | (
            {name: None} if null else {}
        )
        seen = read(less)
        if isinstance(seen, str):
            assert name.replace("local_", "") in seen, f"{name}: {seen}"
            continue
        try:
            taken = getattr(transformers, FAMILIES[family][0]).from_dict(dict(less)).to_dict()
        except StrictDataclassFieldValidationError:
            continue
        assert seen == architecture_of(taken), name
