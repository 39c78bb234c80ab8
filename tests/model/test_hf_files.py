"""Safetensors directories: what is refused by name, and what the streaming writer leaves for the library."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaTokenizer,
    Qwen2Tokenizer,
    tokenization_utils_base,
    tokenization_utils_tokenizers,
)
from transformers.utils import hub

from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.architecture import read_architecture, read_hf_config
from mcore_rl.model.hf.files import (
    INDEX,
    TEMPLATES,
    SafetensorsWriter,
    check_side_files,
    checkpoint_files,
    hf_reader,
    left_out,
    read_side_files,
    safetensors_layout,
    write_side_files,
)
from mcore_rl.model.hf.parameters import ParameterMap
from tests.model.conftest import save
from tests.model.families import FAMILIES
from tests.model.test_mapping import mapping_of

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b.bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.arange(20.0).view(4, 5).t(),
}
FORMS = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x.safetensors", FORMS) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_the_writer_takes_every_tensor_once_in_any_order(tmp_path: Path) -> None:
    write(tmp_path / "x", ["c", "b.bias", "a"])
    found = load_file(tmp_path / "x")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    with pytest.raises(ValueError, match="not among the tensors to come"):
        write(tmp_path / "y", ["b.bias", "b.bias"])
    with pytest.raises(ValueError, match=r"not written: \['b\.bias', 'c'\]"):
        write(tmp_path / "z", ["a"])


def test_every_tensor_begins_where_its_type_can(tmp_path: Path) -> None:
    """Three bytes of FP8 before float32 would leave it where no reader can view it."""
    odd = {"q": torch.ones(3).to(torch.float8_e4m3fn), "scale": torch.ones(1)}
    forms = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in odd.items()}
    _, begins, length = safetensors_layout(forms)
    assert all(begin % odd[name].element_size() == 0 for name, begin in begins.items())
    with SafetensorsWriter(tmp_path / "x", forms) as writer:
        for name, tensor in odd.items():
            writer.write(name, tensor)
    assert (tmp_path / "x").stat().st_size == length
    assert load_file(tmp_path / "x")["scale"] == 1


def write(path: Path, names: list[str]) -> None:
    with SafetensorsWriter(path, FORMS) as writer:
        for name in names:
            writer.write(name, TENSORS[name])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../one.safetensors"}}, "outside the directory"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside the directory"),
        ({"weight_map": {"a": "two.safetensors"}}, r"\['two\.safetensors'\], which are not in the directory"),
        ({"weight_map": {"a": "one.safetensors", "z": "one.safetensors"}}, r"\['z'\] are not in the files"),
        ({"weight_map": {"a": 3}}, "not an index"),
        ({"weight_map": ["a"]}, "not an index"),
        ({}, "not an index"),
        ([], "not an index"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, index, message: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=message):
        checkpoint_files(tmp_path)


def test_one_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ConfigError, match=r"a is in both .*one\.safetensors and .*two\.safetensors"):
        checkpoint_files(tmp_path)


def test_a_tied_model_may_hold_a_copy_of_its_embedding(tmp_path: Path) -> None:
    mapping = mapping_of("qwen2", tied=True)
    tensors = {name: torch.randn(shape) for name, shape in mapping.hf_shapes().items()}
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": copy}, tmp_path / "model.safetensors")
    assert torch.equal(hf_reader(tmp_path, mapping)("model.embed_tokens.weight"), copy)
    copy[3, 3] += 1
    save_file(tensors | {"lm_head.weight": copy}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"unexpected lm_head\.weight \(config\.json has tie_word"):
        hf_reader(tmp_path, mapping)


def test_a_message_repeats_the_beginning_of_what_an_index_names(tmp_path: Path) -> None:
    for weight_map in (
        {"k" * 50_000: "../x"},
        {"a": "k" * 50_000},
        {f"w{i}": f"file {i}" for i in range(5000)},
    ):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ConfigError) as refused:
            checkpoint_files(tmp_path)
        assert len(str(refused.value)) < 3000


def test_rotary_frequencies_that_an_old_version_saved_are_left(tmp_path: Path) -> None:
    table = mapping_of("llama")
    whole = {name: torch.randn(shape) for name, shape in table.hf_shapes().items()}
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    save_file(whole | old, tmp_path / "model.safetensors")
    assert hf_reader(tmp_path, table)("model.norm.weight").shape == whole["model.norm.weight"].shape
    save_file(whole | {"model.layers.0.self_attn.inv_freq": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"self_attn\.inv_freq"):
        hf_reader(tmp_path, table)


@pytest.mark.parametrize("name", [INDEX, "model.safetensors", "config.json"])
def test_a_pipe_in_a_model_directory_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    read = read_hf_config if name == "config.json" else checkpoint_files
    with pytest.raises(ConfigError, match="not a plain file"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (os.mkfifo, "not a plain file"),
        (os.mkdir, "not a plain file"),
        (lambda path: os.symlink("gone", path), "a link that leads nowhere"),
        (lambda path: os.symlink(path, path), "a link that leads nowhere"),
    ],
    ids=["pipe", "directory", "dangling", "loop"],
)
@pytest.mark.parametrize("name", ["chat_template.jinja", f"{TEMPLATES}/a.jinja", "tokenizer.model.v3"])
def test_a_file_beside_the_weights_that_is_none_is_neither_waited_for_nor_left_out(
    tmp_path: Path, name: str, make: Callable[[Path], None], what: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    make(tmp_path / name)
    for read in (read_side_files, check_side_files):
        with pytest.raises(ConfigError, match=rf"{name}: {what}; fetch the file again, or remove it"):
            read(tmp_path)


def test_layers_that_predict_later_tokens_are_left_out_and_named(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Glm4MoeConfig

    config = Glm4MoeConfig(**FAMILIES["glm4_moe"][1])
    save(AutoModelForCausalLM.from_config, config, tmp_path)
    arch = read_architecture(tmp_path)
    assert arch.predicting_layers == 1
    assert left_out(tmp_path, arch) == ""
    file = tmp_path / "model.safetensors"
    tensors = load_file(file) | {"model.layers.2.eh_proj.weight": torch.ones(2, 4)}
    save_file(tensors, file)
    assert "1 tensors of the 1 layers" in left_out(tmp_path, arch)
    assert "model.layers.2.eh_proj.weight" in left_out(tmp_path, arch)
    mapping = ParameterMap(arch, arch.vocab)
    assert torch.equal(hf_reader(tmp_path, mapping)("model.norm.weight"), tensors["model.norm.weight"])
    write_side_files(read_side_files(tmp_path), tmp_path, torch.float32)
    assert read_hf_config(tmp_path)["num_nextn_predict_layers"] == 0
    with pytest.raises(ConfigError, match=r"unexpected model\.layers\.2\.eh_proj"):  # now they are unforeseen
        hf_reader(tmp_path, ParameterMap(read_architecture(tmp_path), arch.vocab))


def test_every_file_that_transformers_loads_a_tokenizer_from_is_carried(tmp_path: Path) -> None:
    modules = (tokenization_utils_base, tokenization_utils_tokenizers, hub)
    names = {getattr(m, name) for m in modules for name in dir(m) if name.endswith(("_FILE", "_LEGACY_NAME"))}
    names |= {*LlamaTokenizer.vocab_files_names.values(), *Qwen2Tokenizer.vocab_files_names.values()}
    names |= {
        f"{hub.CHAT_TEMPLATE_DIR}/tool_use.jinja",
        "tokenizer.4.0.0.json",
        transformers.utils.CONFIG_NAME,
    }
    names |= {transformers.utils.GENERATION_CONFIG_NAME, "tekken.json"}
    left = {"model.safetensors", "notes.txt", "optimizer.pt", f"{hub.CHAT_TEMPLATE_DIR}/notes.txt"}
    (tmp_path / hub.CHAT_TEMPLATE_DIR).mkdir()
    for name in names | left:
        (tmp_path / name).write_text("{}")
    assert len(names) > 12
    assert read_side_files(tmp_path).keys() == names
