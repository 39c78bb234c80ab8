"""The FP8 export of every family: which matrices are rounded, how far, and what transformers reads of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mcore_rl.convert.command import hf_to_mcore, mcore_to_hf
from mcore_rl.errors import ConfigError
from mcore_rl.model.build import build_policy
from mcore_rl.model.hf.architecture import architecture_of, read_architecture
from mcore_rl.model.hf.files import hf_reader
from mcore_rl.model.hf.parameters import CriticParameterMap, ParameterMap
from mcore_rl.model.hf.stored import dequantize_blocks
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.weights.disk import export
from mcore_rl.weights.encoding import FP8, SCALE
from tests.model.families import FAMILIES
from tests.model.support import DENSE, at_layout
from tests.weights.test_encoding import excess, make, tensors_of

READ_BACK = transformers.FineGrainedFP8Config(dequantize=True)
TOKENS = torch.tensor([[3, 17, 5, 41, 2, 9, 30, 11, 23, 7, 19, 44, 1, 6]])


def small(family: str) -> tuple[str, dict]:
    """The tiny model with no matrix above a block: transformers reads others by blocks of another size."""
    kind, settings = FAMILIES[family]
    fewer = {"num_attention_heads": 4, "num_key_value_heads": 4} if "kv_lora_rank" in settings else {}
    return kind, settings | fewer


def converted(source: Path, directory: Path) -> Path:
    hf_to_mcore(source, directory / "mcore")
    mcore_to_hf(directory / "mcore", directory / "fp8", quantize="fp8")
    return directory / "fp8"


def logits(directory: Path, **settings) -> torch.Tensor:
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(directory, dtype=torch.float32, **settings)
    with torch.no_grad():
        return model(TOKENS).logits


def publish(mesh: Mesh, source: Path, target: Path) -> None:
    export(build_policy(source, mesh), target, encoding=FP8)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt_oss"])
def test_every_matrix_of_attention_mlp_and_experts_is_rounded(
    pool1: Pool, family: str, tmp_path: Path
) -> None:
    source = make(*small(family), tmp_path / "hf")
    directory = converted(source, tmp_path)
    at_layout(pool1, "tp1", publish, source, tmp_path / "published")
    published = tensors_of(tmp_path / "published")
    assert published.keys() == tensors_of(directory).keys()
    for name, tensor in tensors_of(directory).items():
        assert (published[name].dtype, published[name].float().tolist()) == (
            tensor.dtype,
            tensor.float().tolist(),
        ), name
    original, written = tensors_of(source), tensors_of(directory)
    matrices = {name for name, x in original.items() if x.dim() == 2 and name.startswith("model.layers.")}
    routers = {name for name in matrices if name.endswith(("gate.weight", "shared_expert_gate.weight"))}
    assert written.keys() - original.keys() == {name + SCALE for name in matrices - routers}
    said = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert {f"{name}.weight" for name in said["modules_to_not_convert"]} == routers | {"lm_head.weight"}
    for name, tensor in original.items():
        if name in matrices - routers:
            assert excess(tensor, written[name], written[name + SCALE]) <= 1, name
            written[name] = dequantize_blocks(written[name], written.pop(name + SCALE))
        else:
            assert torch.equal(written[name], tensor), name
    arch = read_architecture(directory)
    read = hf_reader(directory, ParameterMap(arch, arch.vocab))
    assert all(torch.equal(read(name), tensor) for name, tensor in written.items())
    save_file(written, source / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(directory, quantization_config=READ_BACK), logits(source))


def test_a_matrix_by_the_scale_of_another_is_another_model(tmp_path: Path) -> None:
    """Negative control of the logits above."""
    directory = converted(make(*small("qwen3"), tmp_path / "hf"), tmp_path)
    before = logits(directory, quantization_config=READ_BACK)
    (file,) = directory.glob("*.safetensors")
    tensors = load_file(file)
    query, key = (f"model.layers.0.self_attn.{x}_proj.weight{SCALE}" for x in "qk")
    tensors[query], tensors[key] = tensors[key], tensors[query]
    save_file(tensors, file, metadata={"format": "pt"})
    assert not torch.equal(logits(directory, quantization_config=READ_BACK), before)


def test_stacked_experts_are_refused_by_the_conversion(tmp_path: Path) -> None:
    source = make(*small("gpt_oss"), tmp_path / "hf")
    hf_to_mcore(source, tmp_path / "mcore")
    with pytest.raises(ConfigError, match="--quantize = 'fp8' is not supported with 'gpt_oss'"):
        mcore_to_hf(tmp_path / "mcore", tmp_path / "fp8", quantize="fp8")
    assert not (tmp_path / "fp8").exists()


def test_the_head_of_a_classifier_is_not_rounded() -> None:
    """transformers takes every linear layer that is not named here to be in FP8."""
    arch = architecture_of(transformers.Qwen3Config(**DENSE).to_dict())
    named = (FP8.config(table(arch, arch.vocab)) for table in (ParameterMap, CriticParameterMap))
    assert [said["modules_to_not_convert"] for said in named if said] == [["lm_head"], ["lm_head", "score"]]
