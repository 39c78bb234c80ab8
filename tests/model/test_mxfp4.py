"""Experts in MXFP4 against transformers' own reading, and a model whose experts lie so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mcore_rl.convert.command import hf_to_mcore, mcore_to_hf
from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.mxfp4 import dequantized
from tests.model.conftest import save
from tests.model.families import FAMILIES

QUANTIZED = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def drawn(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every byte of blocks, and scales about 1."""
    generator = torch.Generator().manual_seed(sum(shape))
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(118, 128, shape, dtype=torch.uint8, generator=generator)


def test_every_number_is_that_of_transformers() -> None:
    blocks, scales = drawn(3, 8, 4)
    expected = convert_moe_packed_tensors(blocks.clone(), scales.clone())
    got = torch.stack([dequantized(b, s).t() for b, s in zip(blocks, scales, strict=True)])
    assert got.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(got, expected)
    assert not torch.equal(dequantized(blocks[0], scales[0] + 1).t(), expected[0])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """gpt-oss of two layers in bf16 whose experts are in MXFP4."""
    kind, settings = FAMILIES["gpt_oss"]
    config = getattr(transformers, kind)(**settings | {"intermediate_size": 32, "dtype": "bfloat16"})
    directory = save(transformers.AutoModelForCausalLM.from_config, config, tmp_path / "hf")
    weights = {n: w.bfloat16() for n, w in load_file(directory / "model.safetensors").items()}
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        for name, rows in (("gate_up_proj", 64), ("down_proj", 32)):
            del weights[f"{experts}.{name}"]
            blocks, scales = drawn(4, rows, 1)
            weights |= {f"{experts}.{name}_blocks": blocks, f"{experts}.{name}_scales": scales}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    change(directory, quantization_config=QUANTIZED)
    return directory


def change(directory: Path, **fields: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_model_is_read_and_written_as_plain_numbers(source: Path, tmp_path: Path) -> None:
    hf_to_mcore(source, tmp_path / "mcore")
    mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    back = {n: w for file in (tmp_path / "back").glob("*.safetensors") for n, w in load_file(file).items()}
    stored = load_file(source / "model.safetensors")
    for name, tensor in back.items():
        if name in stored:
            assert torch.equal(tensor, stored[name]), name
        else:
            assert torch.equal(
                tensor, convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
            )
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_other_forms_are_refused(source: Path, tmp_path: Path) -> None:
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    save_file(weights | {name: weights[name][:, :-1].contiguous()}, source / "model.safetensors")
    with pytest.raises(ConfigError, match=r"down_proj_scales U8 .* are no MXFP4 tensor"):
        hf_to_mcore(source, tmp_path / "mcore")
    change(source, quantization_config={"quant_method": "gptq"})
    with pytest.raises(
        ConfigError, match=r"quantization_config = .* is not supported, only FP8 .* and mxfp4"
    ):
        hf_to_mcore(source, tmp_path / "mcore")
