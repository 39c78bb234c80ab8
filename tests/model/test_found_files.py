"""Model directories as they are found: what other programs and older versions write, and leave lying about.

The oracle is transformers, which reads the same directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mcore_rl.convert.command import hf_to_mcore, mcore_to_hf
from mcore_rl.errors import CheckpointError, ConfigError
from mcore_rl.model.hf.architecture import Architecture, architecture_of, read_architecture
from mcore_rl.model.hf.files import checkpoint_files, hf_reader
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.server import weights as embedded
from mcore_rl.weight_files import INDEX, unread
from tests.model.conftest import save
from tests.model.families import FAMILIES, LLAMA3

THETA = 12345.0


def make(family: str, directory: Path) -> Path:
    kind, settings = FAMILIES[family]
    return save(AutoModelForCausalLM.from_config, getattr(transformers, kind)(**settings), directory)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """What the trainer reads, by published name."""
    arch = read_architecture(directory)
    table = ParameterMap(arch, arch.vocab)
    read = hf_reader(directory, table)
    return {name: read(name) for name in table.hf_shapes()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# -- config.json of transformers 4 and 5 ------------------------------------------------------------------


def as_transformers_4(hf: dict[str, Any]) -> dict[str, Any]:
    """The same config.json with rotary fields outside, and the type under its old name."""
    rope = hf.pop("rope_parameters")
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    old = {"rope_theta": rope["rope_theta"], "torch_dtype": hf.pop("dtype", None)}
    return hf | old | {"rope_scaling": None if rope["rope_type"] == "default" else scaling}


def with_the_oldest_name(hf: dict[str, Any]) -> dict[str, Any]:
    """`type` in place of `rope_type`."""
    old = as_transformers_4(hf)
    if old["rope_scaling"]:
        old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
    return old


def with_both(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields of both versions, which agree."""
    return as_transformers_4(dict(hf)) | {"rope_parameters": dict(hf["rope_parameters"])}


FORMS = [as_transformers_4, with_the_oldest_name, with_both]


def written(family: str) -> dict[str, Any]:
    kind, settings = FAMILIES[family]
    rope = (LLAMA3 if family == "llama" else {"rope_type": "default"}) | {"rope_theta": THETA}
    return getattr(transformers, kind)(**settings | {"rope_parameters": rope}).to_dict()


OWN_FORMS = ("olmo3", "gemma3", "gpt_oss")
"""two rotary embeddings, or yarn where none is told: see test_windows.py"""
ONE_ROPE = [family for family in FAMILIES if family not in OWN_FORMS]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ONE_ROPE)
def test_both_layouts_of_rotary_fields_are_one_model(family: str, form: Callable[..., dict]) -> None:
    expected = architecture_of(written(family))
    assert expected.rotary.theta == THETA
    hf = form(written(family))
    assert architecture_of(hf) == expected
    taken = getattr(transformers, FAMILIES[family][0]).from_dict(form(written(family)))
    assert seen_by_transformers(taken) == (THETA, expected.rotary.scaling is not None)


def seen_by_transformers(config: Any) -> tuple[float, bool]:
    rope = config.rope_parameters
    return rope["rope_theta"], rope.get("rope_type", rope.get("type")) == "llama3"


@pytest.mark.parametrize("family", ONE_ROPE)
def test_layouts_that_contradict_each_other_are_refused(family: str) -> None:
    hf = written(family) | {"rope_theta": 2 * THETA}
    with pytest.raises(ConfigError, match="rope_parameters contradicts"):
        architecture_of(hf)


ABSENT: list[tuple[str, tuple[str, ...], Callable[[Architecture], Any]]] = [
    ("rope_theta", ("rope_theta", "rope_parameters"), lambda arch: arch.rotary.theta),
    ("rms_norm_eps", ("rms_norm_eps",), lambda arch: arch.norm_eps),
    ("tie_word_embeddings", ("tie_word_embeddings",), lambda arch: arch.tied),
]


@pytest.mark.parametrize("family", ONE_ROPE)
def test_absent_fields_have_the_values_of_transformers(family: str) -> None:
    """rope_theta, eps and tying; all others are in test_config_fields.py."""
    for name, absent, value in ABSENT:
        hf = {other: v for other, v in written(family).items() if other not in absent}
        taken = getattr(transformers, FAMILIES[family][0]).from_dict(dict(hf))
        expected = taken.rope_parameters["rope_theta"] if name == "rope_theta" else getattr(taken, name)
        assert value(architecture_of(hf)) == expected, name


# -- types and layouts of weights -------------------------------------------------------------------------


def mixed(directory: Path) -> dict[str, Tensor]:
    """Matrices in bfloat16 beside norms in float32."""
    whole = load_file(directory / "model.safetensors")
    types = {name: torch.float32 if "norm" in name else torch.bfloat16 for name in whole}
    whole = {name: tensor.to(types[name]) for name, tensor in whole.items()}
    save_file(whole, directory / "model.safetensors", metadata={"format": "pt"})
    return whole


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_norms_in_float32_beside_bfloat16_keep_their_type(tmp_path: Path, family: str) -> None:
    source = make(family, tmp_path / "hf")
    whole = mixed(source)
    assert_same(tensors_of(source), whole)
    hf_to_mcore(source, tmp_path / "mcore")
    mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), whole)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tensors_of_one_parameter_have_one_type(tmp_path: Path) -> None:
    source = make("qwen3_moe", tmp_path / "hf")
    whole = load_file(source / "model.safetensors")
    for wrong, like in [
        ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", "model.layers.0.mlp.experts.0.gate_proj.weight"),
    ]:
        save_file(whole | {wrong: whole[wrong].bfloat16()}, source / "model.safetensors")
        with pytest.raises(ConfigError, match=re.escape(f"{wrong} has type BF16, {like} F32")):
            tensors_of(source)


def fuse(directory: Path) -> Path:
    """The experts of a layer as one tensor, as transformers 5 writes them where it is told so."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    target = directory.with_name("fused")
    model.save_pretrained(target, save_original_format=False)
    return target


def test_fused_experts_are_those_of_the_published_form(tmp_path: Path) -> None:
    source = make("qwen3_moe", tmp_path / "hf")
    fused = fuse(source)
    assert any(name.endswith(".mlp.experts.gate_up_proj") for name in load_file(fused / "model.safetensors"))
    assert_same(tensors_of(fused), load_file(source / "model.safetensors"))
    hf_to_mcore(fused, tmp_path / "mcore")
    mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    assert_same(tensors_of(tmp_path / "back"), load_file(source / "model.safetensors"))


def test_experts_that_are_missing_or_there_twice_are_named(tmp_path: Path) -> None:
    source = make("qwen3_moe", tmp_path / "hf")
    fused, name = fuse(source), "model.layers.0.mlp.experts.gate_up_proj"
    whole = load_file(fused / "model.safetensors")
    save_file({**whole, name: whole[name][:-1].contiguous()}, fused / "model.safetensors")
    with pytest.raises(ConfigError, match=r"missing model\.layers\.0\.mlp\.experts\.3\.gate_proj\.weight"):
        tensors_of(fused)
    published = {"model.layers.0.mlp.experts.1.up_proj.weight": torch.zeros(24, 32)}
    save_file(whole | published, fused / "model.safetensors")
    with pytest.raises(ConfigError, match=r"experts\.1\.up_proj\.weight is in .*remove one"):
        tensors_of(fused)


@pytest.mark.parametrize("shape", [(10**9, 0, 0), (4, 47, 32), (4, 48), (0, 48, 32)])
def test_a_fused_tensor_that_cannot_be_is_no_expert(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """The first takes no bytes, and would name a thousand million experts."""
    source = make("qwen3_moe", tmp_path / "hf")
    fused, name = fuse(source), "model.layers.0.mlp.experts.gate_up_proj"
    whole = load_file(fused / "model.safetensors")
    save_file({**whole, name: torch.zeros(shape)}, fused / "model.safetensors")
    with pytest.raises(ConfigError, match=r"missing model\.layers\.0\.mlp\.experts\.0\.gate_proj\.weight"):
        tensors_of(fused)


# -- files beside the weights -----------------------------------------------------------------------------


def single(directory: Path) -> None:
    """One file, as it was saved."""


def an_index_of_it(directory: Path) -> None:
    names = load_file(directory / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (directory / INDEX).write_text(json.dumps(index))


def shards(directory: Path) -> None:
    names = sorted(whole := load_file(directory / "model.safetensors"))
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: whole[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors").unlink()
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def consolidated(directory: Path) -> None:
    """Mistral's own form beside the one of transformers."""
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, directory / "consolidated.safetensors")


def consolidated_beside_shards(directory: Path) -> None:
    shards(directory)
    consolidated(directory)


def a_stray_file_beside_shards(directory: Path) -> None:
    shards(directory)
    save_file({"model.norm.weight": torch.ones(2)}, directory / "model-00003-of-00003.safetensors")


def what_macos_leaves(directory: Path) -> None:
    (directory / "._model.safetensors").write_bytes(b"\0\5\x16\7")


ACCEPTED = [
    single,
    what_macos_leaves,
    an_index_of_it,
    shards,
    consolidated,
    consolidated_beside_shards,
    a_stray_file_beside_shards,
]
UNREAD = {
    consolidated: ("consolidated.safetensors", "the weights are model.safetensors"),
    consolidated_beside_shards: ("consolidated.safetensors", f"the weights are the files of {INDEX}"),
    a_stray_file_beside_shards: ("model-00003-of-00003.safetensors", f"the weights are the files of {INDEX}"),
}
"""what is left where it lies, by transformers, SGLang and us, is said"""


@pytest.mark.parametrize("arrange", ACCEPTED)
def test_what_is_accepted_is_what_transformers_reads(tmp_path: Path, arrange: Callable[[Path], None]) -> None:
    source = make("mistral", tmp_path / "hf")
    arrange(source)
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    assert_same(tensors_of(source), dict(expected))
    assert {name.name for name in embedded.checkpoint_files(source)} == {
        file.name for file in checkpoint_files(source).values()
    }
    said = unread(source)
    if arrange not in UNREAD:
        assert said is None
    else:
        assert said is not None
        assert all(part in said for part in UNREAD[arrange])


def test_a_conversion_says_what_it_does_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make("mistral", tmp_path / "hf")
    consolidated_beside_shards(source)
    hf_to_mcore(source, tmp_path / "mcore")
    assert "warning: " in (said := capsys.readouterr().err)
    assert "['consolidated.safetensors'] are not" in said


def an_adapter(directory: Path) -> str:
    save_file({"lora_A": torch.ones(1)}, directory / "adapter_model.safetensors")
    return "adapter_model.safetensors"


def an_adapter_beside_shards(directory: Path) -> str:
    shards(directory)
    return an_adapter(directory)


def its_config_alone(directory: Path) -> str:
    (directory / "adapter_config.json").write_text("{}")
    return "adapter_config.json"


def an_adapter_of_the_older_form(directory: Path) -> str:
    (directory / "adapter_model.bin").write_bytes(b"x")
    return "adapter_model.bin"


def consolidated_alone(directory: Path) -> str:
    (directory / "model.safetensors").unlink()
    consolidated(directory)
    return "consolidated.safetensors"


def consolidated_in_parts(directory: Path) -> str:
    for number in "01":
        save_file({"a": torch.ones(1)}, directory / f"consolidated-{number}.safetensors")
    return "consolidated-0.safetensors"


def an_index_that_is_a_dead_link(directory: Path) -> str:
    (directory / INDEX).symlink_to("gone")
    return INDEX


def weights_that_are_a_dead_link(directory: Path) -> str:
    (directory / "model-00009.safetensors").symlink_to("gone")
    return "model-00009.safetensors"


def an_adapter_that_is_a_dead_link(directory: Path) -> str:
    (directory / "adapter_config.json").symlink_to("gone")
    return "adapter_config.json"


REFUSED = [
    an_index_that_is_a_dead_link,
    weights_that_are_a_dead_link,
    an_adapter_that_is_a_dead_link,
    an_adapter,
    an_adapter_beside_shards,
    its_config_alone,
    an_adapter_of_the_older_form,
    consolidated_alone,
    consolidated_in_parts,
]


@pytest.mark.parametrize("arrange", REFUSED)
def test_what_is_refused_is_named(tmp_path: Path, arrange: Callable[[Path], str]) -> None:
    source = make("mistral", tmp_path / "hf")
    named = re.escape(str(source / arrange(source)))
    with pytest.raises(ConfigError, match=named):
        tensors_of(source)
    with pytest.raises(CheckpointError, match=named):
        embedded.checkpoint_files(source)
