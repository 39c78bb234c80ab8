"""What is exported is what was trained: config.json and the files beside it agree with the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mcore_rl.convert.command import hf_to_mcore, mcore_to_hf
from mcore_rl.directories import files_in
from mcore_rl.errors import CheckpointError, ConfigError
from mcore_rl.model.build import build_policy
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.files import TEMPLATES, checkpoint_files
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.model.weights_io import reader
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.precision import PrecisionName
from mcore_rl.server import weights as embedded
from mcore_rl.weight_files import INDEX
from mcore_rl.weights.disk import export as export_files
from tests.model.conftest import save
from tests.model.families import FAMILIES
from tests.model.support import at_layout
from tests.rollout.support import build_model, save_model

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def make(directory: Path, *, tied: bool, told: dict[str, str]) -> Path:
    """A model with a tokenizer and a template, and a config.json that says `told` of its type."""
    kind, settings = FAMILIES["qwen2_tied" if tied else "qwen2"]
    config = getattr(transformers, kind)(**settings, eos_token_id=[2, 3])
    save_model(directory, build_model(0))  # its tokenizer
    shutil.rmtree(directory / "model.safetensors", ignore_errors=True)
    save(AutoModelForCausalLM.from_config, config, directory)
    found = json.loads((directory / "config.json").read_text())
    found = {name: value for name, value in found.items() if name not in ("dtype", "torch_dtype")} | told
    (directory / "config.json").write_text(json.dumps(found))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    (directory / TEMPLATES).mkdir()
    (directory / TEMPLATES / "tool_use.jinja").write_text("tools")
    (directory / TEMPLATES / "README").write_text("no template")
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings |= {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}  # what a reader takes from 4.0.0 on
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copyfile(directory / "tokenizer.json", directory / "tokenizer.4.0.0.json")
    return directory


def export(mesh: Mesh, source: Path, target: Path, precision: PrecisionName) -> None:
    export_files(build_policy(source, mesh, precision=precision), target)


def export_late(mesh: Mesh, source: Path, target: Path) -> None:
    """The source is edited, and then lost, while the run goes on."""
    model = build_policy(source, mesh)
    edited = json.loads((source / "config.json").read_text()) | {"rms_norm_eps": 1.0, "eos_token_id": 1}
    (source / "config.json").write_text(json.dumps(edited))
    (source / "chat_template.jinja").write_text("other")
    export_files(model, target)
    shutil.rmtree(source)
    export_files(model, target.with_name("later"))


def test_what_lay_beside_the_weights_is_that_of_the_start(pool1: Pool, tmp_path: Path) -> None:
    source, target = make(tmp_path / "hf", tied=True, told={}), tmp_path / "out"
    before = json.loads((source / "config.json").read_text())
    at_layout(pool1, "tp1", export_late, source, target)
    for directory in (target, target.with_name("later")):
        after = json.loads((directory / "config.json").read_text())
        assert {name: after[name] for name in before} == before
        assert (directory / "chat_template.jinja").read_text() == TEMPLATE
        assert json.loads((directory / "generation_config.json").read_text()) == {"eos_token_id": [2, 7]}


def convert(source: Path, target: Path) -> None:
    hf_to_mcore(source, target.with_name("mcore"))
    mcore_to_hf(target.with_name("mcore"), target)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("told", [{}, {"dtype": "float16"}, {"torch_dtype": "float16"},
                                  {"dtype": "float16", "torch_dtype": "bfloat16"}],
                         ids=["untold", "dtype", "torch_dtype", "both"])  # fmt: skip
@pytest.mark.parametrize("way", ["fp32", "bf16", "convert"])
def test_config_and_side_files_agree_with_the_tensors(
    pool1: Pool, tmp_path: Path, tied: bool, told: dict[str, str], way: str
) -> None:
    source, target = make(tmp_path / "hf", tied=tied, told=told), tmp_path / "out"
    if way == "convert":
        convert(source, target)
    else:
        at_layout(pool1, "tp1", export, source, target, way)
    tensors = {name: t for file in target.glob("*.safetensors") for name, t in load_file(file).items()}
    dtype = torch.bfloat16 if way == "bf16" else torch.float32
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    config = json.loads((target / "config.json").read_text())
    named = {config[name] for name in ("dtype", "torch_dtype") if name in config}
    assert named == {str(dtype).removeprefix("torch.")}
    assert config["tie_word_embeddings"] == tied == ("lm_head.weight" not in tensors)
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert loaded.dtype == dtype
    assert loaded.generation_config.eos_token_id == [2, 7]
    assert AutoTokenizer.from_pretrained(target).chat_template == {"default": TEMPLATE, "tool_use": "tools"}
    beside = {name for name in files_in(source) if "safetensors" not in name}
    assert {
        name for name in files_in(target) if not name.startswith((".", "model", "COMM", "mani"))
    } == beside - {f"{TEMPLATES}/README"}


# -- a directory in which two readers see two models ------------------------------------------------------


def index_beside_a_newer_file(directory: Path) -> tuple[str, str]:
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors, directory / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    newer = {name: 1.5 * tensor for name, tensor in tensors.items()}
    save_file(newer, directory / "model.safetensors", metadata={"format": "pt"})
    return "model.safetensors", INDEX


def index_of_the_file_and_another(directory: Path) -> tuple[str, str]:
    tensors = load_file(directory / "model.safetensors")
    norm = {"model.norm.weight": tensors.pop("model.norm.weight")}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    save_file(norm, directory / "norm.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(tensors, "model.safetensors") | dict.fromkeys(norm, "norm.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return "model.safetensors", INDEX


def another_file_without_an_index(directory: Path) -> tuple[str, str]:
    index_of_the_file_and_another(directory)
    (directory / INDEX).unlink()
    return "model.safetensors", "norm.safetensors"


AMBIGUOUS = [index_beside_a_newer_file, index_of_the_file_and_another, another_file_without_an_index]


@pytest.mark.parametrize("spoil", AMBIGUOUS)
def test_two_sets_of_weights_are_refused_and_both_named(
    tmp_path: Path, spoil: Callable[[Path], tuple[str, str]]
) -> None:
    directory = make(tmp_path / "hf", tied=False, told={})
    checkpoint_files(directory)
    one, other = spoil(directory)
    message = rf"{directory / one} and {directory / other}: .*remove one"
    with pytest.raises(ConfigError, match=message):
        checkpoint_files(directory)
    with pytest.raises(CheckpointError, match=message):
        embedded.checkpoint_files(directory)


def test_both_forms_in_one_directory_are_refused_and_both_named(tmp_path: Path) -> None:
    directory = make(tmp_path / "hf", tied=False, told={})
    arch = read_architecture(directory)
    hf_to_mcore(directory, tmp_path / "mcore")
    reader(tmp_path / "mcore", ParameterMap(arch, arch.vocab))
    shutil.copyfile(directory / "model.safetensors", tmp_path / "mcore" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"\.metadata and .*model\.safetensors: two models"):
        reader(tmp_path / "mcore", ParameterMap(arch, arch.vocab))


def test_what_all_readers_choose_alike_is_accepted(tmp_path: Path) -> None:
    """Safetensors go before pickles, and the file of a template before the field of tokenizer_config.json."""
    directory = make(tmp_path / "hf", tied=False, told={})
    files = checkpoint_files(directory)
    (directory / "pytorch_model.bin").write_bytes(b"not looked at")
    (directory / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": {name: "model.safetensors" for name in files}})
    )
    assert checkpoint_files(directory) == files
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "other"}))
    assert AutoTokenizer.from_pretrained(directory).chat_template["default"] == TEMPLATE
