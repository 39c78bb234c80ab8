"""FP8 weights for servers: the bound of the rounding, what transformers reads, the written directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mcore_rl.convert.command import hf_to_mcore, mcore_to_hf
from mcore_rl.errors import ConfigError, NumericsError, WeightSyncError
from mcore_rl.model.build import build_policy
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.files import checkpoint_files
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.model.hf.stored import dequantize_blocks
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.rollout.reply import ANY_VOCABULARY
from mcore_rl.weights.disk import export, publish_directory
from mcore_rl.weights.encoding import (
    BLOCK,
    FP8,
    LARGEST,
    SCALE,
    encoded_forms,
    quantize_blocks,
)
from tests.model.conftest import save
from tests.model.families import DEEPSEEK
from tests.model.support import DENSE, MOE, at_layout

BIG = {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
BLOCKS = DENSE | BIG | {"intermediate_size": 384}
"""every matrix is whole blocks; in DENSE every one is less than a block"""


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty([-(-side // BLOCK) for side in weight.shape])
    quantize_blocks("w", weight, q, scale)
    return q, scale


def excess(weight: Tensor, q: Tensor, scale: Tensor) -> float:
    """Largest |error| / bound in float64; the bound holds up to float32's rounding of the scale."""
    rows, columns = weight.shape
    exact = weight.double()
    spread = scale.double().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    bound = torch.maximum(exact.abs() / 16, spread / 1024) * (1 + 2**-20)
    return float(((q.double() * spread - exact).abs() / bound).max())


# --- the rounding -------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    spread=st.floats(0, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rounding_is_within_half_a_step_of_float64(
    rows: int, columns: int, seed: int, spread: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (spread * (torch.rand(rows, columns, generator=generator) - 0.5))
    weight = (torch.randn(rows, columns, generator=generator) * size).to(dtype)
    weight[: rows // 3, : columns // 3] = 0
    q, scale = quantized(weight)
    assert (q.shape, q.dtype) == (weight.shape, torch.float8_e4m3fn)
    assert (scale.shape, scale.dtype) == ((-(-rows // BLOCK), -(-columns // BLOCK)), torch.float32)
    assert excess(weight, q, scale) <= 1
    assert not dequantize_blocks(q, scale)[weight == 0].any()


def test_the_bound_is_missed_by_one_scale_for_all_blocks() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    weight[:128, :128] *= 1e-5
    q, scale = quantized(weight)
    assert excess(weight, q, scale) <= 1
    whole = (weight / (weight.abs().max() / LARGEST)).to(torch.float8_e4m3fn)
    one = torch.full_like(scale, float(weight.abs().max()) / LARGEST)
    as_if = whole.float() * one[0, 0] / dequantize_blocks(torch.ones_like(q), scale)
    assert excess(weight, as_if, scale) > 15  # the small block is rounded to 0: 16 times the bound


def test_edges_zeros_and_tiny_numbers() -> None:
    for weight in (torch.zeros(130, 1), torch.full((1, 129), 1e-42), torch.full((129, 3), 3e38)):
        q, scale = quantized(weight)
        assert scale.isfinite().all()
        assert (scale > 0).all()
        assert excess(weight, q, scale) <= 1
    for bad in (float("inf"), float("nan")):
        weight = torch.ones(200, 200)
        weight[150, 7] = bad
        with pytest.raises(NumericsError, match="w is not finite"):
            quantized(weight)


def test_transformers_own_dequantisation_agrees() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(384, 256, generator=torch.Generator().manual_seed(1))
    q, scale = quantized(weight)
    theirs = Fp8Dequantize(None)._dequantize_one(q, scale)
    assert torch.equal(theirs, dequantize_blocks(q, scale))
    assert not torch.equal(theirs, Fp8Dequantize(None)._dequantize_one(q, scale.flip(0)))


# --- the directory ------------------------------------------------------------------------------------------


def make(kind: str, arguments: dict, directory: Path) -> Path:
    config = getattr(transformers, kind)(**arguments)
    return save(transformers.AutoModelForCausalLM.from_config, config, directory)


def exported(mesh: Mesh, source: Path, target: Path) -> None:
    export(build_policy(source, mesh, precision="bf16"), target, encoding=FP8)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def in_bf16(directory: Path) -> dict[str, Tensor]:
    """The model's weights, written back as bf16, biases of routers as they are: what an export holds."""
    weights = {
        name: tensor if "correction_bias" in name else tensor.bfloat16()
        for name, tensor in tensors_of(directory).items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return weights


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("Qwen3Config", DENSE), ("Qwen3MoeConfig", MOE), ("DeepseekV3Config", DEEPSEEK | {"q_lora_rank": 10})],
    ids=["dense", "moe", "latent"],
)
def test_export_and_conversion_write_the_same(pool2: Pool, tmp_path: Path, kind: str, arguments) -> None:
    source = make(kind, arguments, tmp_path / "hf")
    original = in_bf16(source)
    at_layout(pool2, "tp2+sp", exported, source, tmp_path / "published")
    hf_to_mcore(source, tmp_path / "mcore")
    mcore_to_hf(tmp_path / "mcore", tmp_path / "converted", shard_gb=2e-5, quantize="fp8")
    published, converted = tensors_of(tmp_path / "published"), tensors_of(tmp_path / "converted")
    assert len(checkpoint_files(tmp_path / "converted")) == len(converted) == len(published)
    for name, tensor in published.items():
        assert converted[name].dtype == tensor.dtype, name
        assert torch.equal(converted[name].float(), tensor.float()), name
    for name, tensor in original.items():
        if name.endswith(("_proj.weight", "_with_mqa.weight")):
            assert excess(tensor, published[name], published[name + SCALE]) <= 1
        else:
            assert torch.equal(published[name], tensor), name
    for directory in ("published", "converted"):
        said = json.loads((tmp_path / directory / "config.json").read_text())["quantization_config"]
        assert (said["quant_method"], said["weight_block_size"]) == ("fp8", [128, 128])
        assert ("model.layers.0.mlp.gate" in said["modules_to_not_convert"]) is (kind == "Qwen3MoeConfig")
        assert ("model.layers.1.mlp.gate" in said["modules_to_not_convert"]) is (kind == "DeepseekV3Config")
    arch = read_architecture(source)
    types = {name: tensor.dtype for name, tensor in original.items()}
    forms = encoded_forms(ParameterMap(arch, arch.vocab), FP8, types)
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in published.items()} == forms
    shapes = {name: shape for name, (shape, _) in forms.items()} | {"model.norm.weight_scale_inv": (1, 1)}
    with pytest.raises(WeightSyncError, match=r"1 tensors are not those of the model.*no server was told"):
        publish_directory(
            Fleet(["http://127.0.0.1:9"], vocabulary=ANY_VOCABULARY), tmp_path / "published", "1", shapes
        )
    assert read_architecture(tmp_path / "published").quantized == "BF16", "training may start from it"


def test_transformers_loads_the_directory(tmp_path: Path) -> None:
    source = make("Qwen3Config", BLOCKS, tmp_path / "hf")
    in_bf16(source)
    hf_to_mcore(source, tmp_path / "mcore")
    mcore_to_hf(tmp_path / "mcore", tmp_path / "fp8", quantize="fp8")
    written = tensors_of(tmp_path / "fp8")
    config = transformers.FineGrainedFP8Config(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=config, dtype=torch.float32
    )
    state = loaded.state_dict()
    names = [name for name in written if name.endswith("_proj.weight")]
    assert len(names) == 7 * DENSE["num_hidden_layers"]
    for name in names:
        assert torch.equal(state[name].float(), dequantize_blocks(written[name], written[name + SCALE])), name


def test_a_certificate_is_refused_for_other_logits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--certify asks for equal logits"):
        mcore_to_hf(tmp_path, tmp_path / "x", quantize="fp8", certified=True)
