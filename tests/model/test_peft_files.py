"""Adapters that others wrote: what PEFT would make something else of is refused, by name."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from mcore_rl.errors import ConfigError
from mcore_rl.lora import Lora
from mcore_rl.model.hf.adapters import AdapterMap
from mcore_rl.model.hf.architecture import architecture_of
from mcore_rl.model.hf.peft_files import (
    CONFIG,
    WEIGHTS,
    adapter_reader,
    begun_anew,
    lora_of,
    write_adapter,
)
from tests.model.families import FAMILIES

KIND, SETTINGS = FAMILIES["qwen3"]
ARCH = architecture_of(getattr(transformers, KIND)(**SETTINGS).to_dict(), "qwen3")
ADAPTERS = AdapterMap(ARCH, Lora(4, 8.0))
TENSORS = {name: torch.ones(shape) for name, shape in ADAPTERS.hf_shapes().items()}
FIRST = min(TENSORS)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_adapter(ADAPTERS, TENSORS, tmp_path, base="model")
    return tmp_path


def told(directory: Path, **change: object) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | change))


@pytest.mark.parametrize(
    "change",
    [
        {
            "init_lora_weights": "eva",
            "lora_dropout": 0.1,
            "exclude_modules": ["lm_head"],
            "peft_version": "1",
        },
        {"modules_to_save": [], "use_qalora": False, "alora_invocation_tokens": None, "of_next_year": None},
    ],
)
def test_what_changes_nothing_of_a_trained_adapter_is_read(directory: Path, change: dict) -> None:
    told(directory, **change)
    read = adapter_reader(ADAPTERS, directory)
    assert all(torch.equal(read(name), tensor) for name, tensor in TENSORS.items())
    assert lora_of(directory, ARCH).rank == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4': .* other weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens = .* is not supported"),
        ({"use_qalora": True}, "use_qalora = True is not supported"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices = .* is not supported"),
        ({"of_next_year": {"blocks": 2}}, "of_next_year = .* is not supported"),
    ],
)
def test_a_field_under_which_it_computes_something_else_is_refused(
    directory: Path, change: dict, said: str
) -> None:
    told(directory, **change)
    with pytest.raises(ConfigError, match=said):
        adapter_reader(ADAPTERS, directory)
    with pytest.raises(ConfigError, match=said):
        lora_of(directory, ARCH)


@pytest.mark.parametrize(
    "change",
    [
        {"r": 0},
        {"r": True},
        {"lora_alpha": math.inf},
        {"lora_alpha": math.nan},
        {"lora_alpha": 10**400},
        {"use_rslora": "yes"},
    ],
)
def test_numbers_that_are_no_scale_are_refused(directory: Path, change: dict) -> None:
    told(directory, **change)
    with pytest.raises(ConfigError, match=r"the rank is a whole number above 0, alpha a finite one"):
        lora_of(directory, ARCH)


def test_numbers_that_are_not_finite_are_refused(directory: Path) -> None:
    for number in (math.nan, math.inf):
        save_file(TENSORS | {FIRST: torch.full_like(TENSORS[FIRST], number)}, directory / WEIGHTS)
        with pytest.raises(ConfigError, match=rf"{FIRST}.* not finite"):
            adapter_reader(ADAPTERS, directory)


@pytest.mark.parametrize("tensors", [{}, {FIRST.replace("base_model", "other"): TENSORS[FIRST]}])
def test_an_adapter_of_nothing_in_the_model_is_no_adapter_of_it(directory: Path, tensors: dict) -> None:
    save_file(tensors, directory / WEIGHTS)
    with pytest.raises(ConfigError, match="none is of an adapter of this qwen3 model"):
        lora_of(directory, ARCH)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_not_waited_for(directory: Path, name: str, put: Callable[[Path], None]) -> None:
    (directory / name).unlink()
    put(directory / name)
    with pytest.raises(ConfigError, match=rf"{name}: no plain file"):
        lora_of(directory, ARCH)


QUERY_AND_VALUE = {name: t for name, t in TENSORS.items() if "q_proj" in name or "v_proj" in name}


def partial(directory: Path, modules: object = ("q_proj", "v_proj")) -> AdapterMap:
    """An adapter of queries and values alone, as PEFT made it by default, in the place of the whole one."""
    save_file(QUERY_AND_VALUE, directory / WEIGHTS)
    told(directory, target_modules=list(modules) if isinstance(modules, tuple) else modules)
    return AdapterMap(ARCH, lora_of(directory, ARCH))


@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), r".*\.(q|v)_proj", None])
def test_an_adapter_of_some_of_a_targets_matrices_leaves_the_others_as_they_are(
    directory: Path, modules: object
) -> None:
    adapters = partial(directory, modules)
    assert adapters.lora.targets == ("qkv",)
    assert begun_anew(adapters, directory) == ["model.layers.*.self_attn.k_proj"]
    read = adapter_reader(adapters, directory)
    for name in adapters.hf_shapes():
        if name in QUERY_AND_VALUE:
            assert torch.equal(read(name), QUERY_AND_VALUE[name])
        else:
            assert bool(read(name).any()) == ("lora_A" in name), "B is 0: nothing is added, and it can learn"
    assert begun_anew(ADAPTERS, write_whole(directory)) == []


def write_whole(directory: Path) -> Path:
    (directory / "whole").mkdir()
    write_adapter(ADAPTERS, TENSORS, directory / "whole", base="model")
    return directory / "whole"


@pytest.mark.parametrize(
    "modules", [("q_proj", "k_proj", "v_proj"), ("model.layers.0.self_attn.k_proj",), "all-linear"]
)
def test_what_a_file_should_have_and_has_not_is_missing(directory: Path, modules: object) -> None:
    adapters = partial(directory, modules)
    with pytest.raises(ConfigError, match=r"missing .*k_proj.lora_A.weight"):
        adapter_reader(adapters, directory)


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_matrix_has_its_adapter_in_every_layer(directory: Path, letter: str) -> None:
    lost = f"base_model.model.model.layers.1.self_attn.v_proj.lora_{letter}.weight"
    adapters = partial(directory)
    save_file({n: t for n, t in QUERY_AND_VALUE.items() if n != lost}, directory / WEIGHTS)
    with pytest.raises(ConfigError, match=f"missing {lost}"):
        adapter_reader(adapters, directory)


def test_a_target_of_which_there_is_nothing_is_missing(directory: Path) -> None:
    partial(directory)
    with pytest.raises(ConfigError, match=r"missing .*down_proj.lora_A.weight"):
        adapter_reader(ADAPTERS, directory)
