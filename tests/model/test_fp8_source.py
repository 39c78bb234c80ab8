"""Models that are published in FP8 with a scale for each block of 128 x 128: read, built, converted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from mcore_rl.convert.command import hf_to_mcore
from mcore_rl.errors import ConfigError
from mcore_rl.model.build import build_policy
from mcore_rl.model.hf.architecture import architecture_of, read_architecture, read_hf_config
from mcore_rl.model.hf.files import hf_reader, left_out
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.model.hf.torch_dist import torch_dist_reader
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.weights.disk import export
from mcore_rl.weights.encoding import BLOCK, FP8, SCALE, quantize_blocks
from tests.model.conftest import save
from tests.model.families import DEEPSEEK, YARN
from tests.model.support import at_layout
from tests.weights.test_encoding import BLOCKS

WIDE_LATENT = DEEPSEEK | {"q_lora_rank": 40, "kv_lora_rank": 140, "moe_intermediate_size": 130}
SOURCES = {
    "qwen3": ("Qwen3Config", BLOCKS),
    "deepseek_v3": ("DeepseekV3Config", WIDE_LATENT | {"rope_parameters": YARN}),
}
"""matrices of whole blocks, and with blocks that an edge cuts"""
LATER = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.head", "self_attn.kv_b_proj")
"""of the tensors of the layer behind the last, as DeepSeek-V3 names them"""


def publish(name: str, directory: Path) -> dict[str, Tensor]:
    """A tiny model as DeepSeek publishes: bf16, matrices in FP8, a layer that predicts a later token."""
    kind, settings = SOURCES[name]
    config = getattr(transformers, kind)(**settings, dtype="bfloat16")
    save(transformers.AutoModelForCausalLM.from_config, config, directory)
    arch = read_architecture(directory)
    rules = {hf: entry.rule for entry in ParameterMap(arch, arch.vocab).entries() for hf in entry.hf}
    tensors: dict[str, Tensor] = {}
    for hf, tensor in load_file(directory / "model.safetensors").items():
        if not rules[hf].fp8:
            tensors[hf] = tensor if "correction_bias" in hf else tensor.bfloat16()
            continue
        scales = [-(-side // BLOCK) for side in tensor.shape]
        q, scale = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn), torch.empty(scales)
        quantize_blocks(hf, tensor, q, scale)
        tensors |= {hf: q, hf + SCALE: scale}
    if arch.predicting_layers:
        tensors |= {f"model.layers.{arch.layers}.{part}.weight": torch.ones(2, 2) for part in LATER}
        tensors |= {f"model.layers.{arch.layers}.self_attn.kv_b_proj.weight{SCALE}": torch.ones(1, 1)}
        tensors[f"model.layers.{arch.layers}.self_attn.kv_b_proj.weight"] = torch.ones(2, 2).to(
            torch.float8_e4m3fn
        )
    write(directory, tensors, FP8.config(ParameterMap(arch, arch.vocab)))
    return tensors


def write(directory: Path, tensors: dict[str, Tensor], quantization: dict | None) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    hf = read_hf_config(directory) | {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(hf))


def by_hand(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Number by number: its block's scale times it, rounded to bf16 once."""
    weight = tensors[name]
    if weight.dtype != torch.float8_e4m3fn:
        return weight
    rows, columns = (torch.arange(side) // BLOCK for side in weight.shape)
    return (weight.float() * tensors[name + SCALE][rows[:, None], columns]).bfloat16()


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    directory = tmp_path_factory.mktemp(request.param)
    return directory, publish(request.param, directory)


def test_it_is_multiplied_out_tensor_by_tensor(source: tuple[Path, dict[str, Tensor]]) -> None:
    directory, tensors = source
    arch = read_architecture(directory)
    mapping = ParameterMap(arch, arch.vocab)
    read = hf_reader(directory, mapping)
    for name in mapping.hf_shapes():
        assert torch.equal(read(name), by_hand(tensors, name)), name
    if arch.predicting_layers:
        assert f"{len(LATER) + 1} tensors of the 1 layers that predict" in left_out(directory, arch)


def test_transformers_multiplies_out_the_same(tmp_path: Path) -> None:
    tensors = publish("qwen3", tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    ).state_dict()
    names = [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(names) == 14
    for name in names:
        assert torch.equal(loaded[name], by_hand(tensors, name)), name


def exported(mesh: Mesh, directory: Path, target: Path) -> None:
    export(build_policy(directory, mesh, precision="bf16"), target)


def test_what_is_trained_and_converted_from_it_is_plain(
    pool2: Pool, source: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    directory, tensors = source
    at_layout(pool2, "tp2+sp", exported, directory, tmp_path / "out")
    hf_to_mcore(directory, tmp_path / "mcore")
    arch = read_architecture(tmp_path / "mcore")
    mapping = ParameterMap(arch, arch.vocab)
    converted = torch_dist_reader(tmp_path / "mcore", mapping)
    written: dict[str, Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    assert written.keys() == mapping.hf_shapes().keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, by_hand(tensors, name)), name
        assert torch.equal(converted(name), by_hand(tensors, name)), name
    for where in ("out", "mcore"):
        hf = read_hf_config(tmp_path / where)
        assert "quantization_config" not in hf
        assert hf["dtype"] == "bfloat16"


def test_a_certificate_of_it_is_refused(source: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--certify asks for equal logits, and .* in FP8"):
        hf_to_mcore(source[0], tmp_path / "mcore", certified=True)


K = "model.layers.0.self_attn.k_proj.weight"
DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "a scale is missing": (lambda t: t.pop(K + SCALE), rf"{K}.*no _scale_inv beside a weight in FP8"),
    "a weight is not in FP8": (lambda t: t.update({K: t[K].bfloat16()}), f"{K}.*or one beside none"),
    "a scale of another shape": (
        lambda t: t.update({K + SCALE: torch.ones(1, 3)}),
        r"k_proj.weight_scale_inv has shape \(1, 3\) and type F32, expected \(1, 2\)",
    ),
    "a scale of another type": (
        lambda t: t.update({K + SCALE: torch.ones(1, 2).double()}),
        "type F64, expected .* in F32 or BF16",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_one_is_refused(what: str, tmp_path: Path) -> None:
    tensors = publish("qwen3", tmp_path)
    damage, message = DAMAGE[what]
    damage(tensors)
    write(tmp_path, tensors, read_hf_config(tmp_path)["quantization_config"])
    arch = read_architecture(tmp_path)
    with pytest.raises(ConfigError, match=message):
        hf_reader(tmp_path, ParameterMap(arch, arch.vocab))


def test_weights_in_fp8_that_config_json_does_not_tell_of_are_refused(tmp_path: Path) -> None:
    tensors = publish("qwen3", tmp_path)
    write(tmp_path, tensors, None)
    arch = read_architecture(tmp_path)
    with pytest.raises(ConfigError, match=f"{K} has type F8_E4M3"):
        hf_reader(tmp_path, ParameterMap(arch, arch.vocab))


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "gptq"},
        {"weight_block_size": [64, 64]},
        {"weight_block_size": None},
        {"activation_scheme": "static"},
        {"fmt": "e5m2"},
        {"bits": 4},
    ],
    ids=str,
)
def test_another_form_is_refused_by_name(change: dict, tmp_path: Path) -> None:
    publish("qwen3", tmp_path)
    hf = read_hf_config(tmp_path)
    hf["quantization_config"] |= change
    with pytest.raises(ConfigError, match=f"quantization_config = .*{next(iter(change))}.* is not supported"):
        architecture_of(hf)
