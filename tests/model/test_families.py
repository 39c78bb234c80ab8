"""Every family against transformers: logits and weights, at every kind of layout."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mcore_rl.data.packing import TokenSequence
from mcore_rl.model import build
from mcore_rl.model.build import build_logits, build_policy
from mcore_rl.model.policy import rotary_frequencies
from mcore_rl.model.step import forward
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.training.batch import pack_share
from mcore_rl.weights.disk import export
from tests.model.conftest import save
from tests.model.families import FAMILIES
from tests.model.support import VOCAB, at_layout, shape_at

ATOL = 1e-5
LENGTHS = (40, 3, 17, 9)


def tokens() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(VOCAB, size=length).tolist() for length in LENGTHS]


@pytest.fixture(scope="session", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def directory(family: str, tmp_path_factory) -> Path:
    """One model in float32, beside it (`bf16`) the same rounded; biases are not zero."""
    import transformers

    kind, settings = FAMILIES[family]
    root = tmp_path_factory.mktemp(family)
    save(
        transformers.AutoModelForCausalLM.from_config, getattr(transformers, kind)(**settings), root / "fp32"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "fp32", dtype=torch.bfloat16)
    model.save_pretrained(root / "bf16")
    return root


@pytest.fixture(scope="session")
def expected(directory: Path) -> Tensor:
    """[tokens but each sequence's last, vocabulary] by transformers, without packing or padding."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / "fp32", dtype=torch.float32)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row])).logits[0, :-1] for row in tokens()])


def logits_and_exports(mesh: Mesh, directory: Path, target: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(row, logits) of this rank's packed tokens; both models exported below `target`."""
    for precision in ("fp32", "bf16"):
        export(build_policy(directory / precision, mesh, precision=precision), target / precision)
    return logits(mesh, directory)


def logits(mesh: Mesh, directory: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    model = build_logits(directory / "fp32", mesh)
    sequences = [TokenSequence(row[:1], row[1:]) for row in tokens()]
    starts = np.cumsum([0, *LENGTHS[:-1]]) - np.arange(len(LENGTHS))
    number = [np.arange(start, start + n - 1.0) for start, n in zip(starts, LENGTHS, strict=True)]
    batches = pack_share(sequences, {"number": number}, shape_at(mesh, 64), mesh)
    scored = forward(model, batches, 1.0)
    return [(packed.fields["number"].numpy().astype(int), out.numpy()) for packed, out in scored]


def assemble(answers: list[list[tuple[np.ndarray, np.ndarray]]]) -> list[Tensor]:
    """Per rank that answered: its logits in the order of `expected`; over data-parallel ranks, joined."""
    rows = sum(LENGTHS) - len(LENGTHS)
    out = []
    for parts in answers:
        whole = torch.full((rows, VOCAB), torch.nan)
        for number, values in parts:
            whole[number] = torch.from_numpy(values)
        out.append(whole)
    return out


def differences(answers, expected: Tensor) -> float:
    """Largest difference; every row must have come from some rank, and agree wherever it came from."""
    found = torch.stack(assemble([answer for answer in answers if answer]))
    assert not torch.isnan(found).all(dim=0).any(), "a row is missing"
    return float((found - expected).abs().nan_to_num(0).max())


LAYOUTS = {"tp1": "pool1", "tp2": "pool2", "pp2": "pool2", "tp2pp2": "pool4", "ep2": "pool2"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_weights_are_those_of_transformers(
    request, family: str, directory: Path, expected: Tensor, layout: str, tmp_path: Path
) -> None:
    sparse = family.endswith("moe")
    if layout == "ep2" and not sparse:
        pytest.skip("a dense family has no experts to spread")
    where = layout + "+sp" if sparse and "tp2" in layout else layout
    pool: Pool = request.getfixturevalue(LAYOUTS[layout])
    answers = at_layout(pool, where, logits_and_exports, directory, tmp_path)
    assert differences(answers, expected) <= ATOL
    for precision in ("fp32", "bf16"):
        exported: dict[str, Tensor] = {}
        for file in (tmp_path / precision).glob("*.safetensors"):
            exported |= load_file(file)
        original = load_file(directory / precision / "model.safetensors")
        assert exported.keys() == original.keys()
        for name, tensor in original.items():
            assert exported[name].dtype == tensor.dtype
            assert torch.equal(exported[name], tensor), name


@pytest.mark.parametrize("family", ["llama"], scope="session", indirect=True)
def test_a_missing_rope_scaling_is_seen(pool1: Pool, directory: Path, expected: Tensor) -> None:
    """Negative control, and the reason for the length of the sequences."""
    assert differences(at_layout(pool1, "tp1", logits_unscaled, directory), expected) > 100 * ATOL


def logits_unscaled(mesh: Mesh, directory: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    def unscaled(arch):
        return rotary_frequencies(replace(arch, rope_scaling=None))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "rotary_frequencies", unscaled)
        return logits(mesh, directory)


@pytest.mark.parametrize("family", ["qwen2"], scope="session", indirect=True)
def test_a_bias_out_of_place_is_seen(pool1: Pool, directory: Path, expected: Tensor, tmp_path: Path) -> None:
    """Negative control: the biases of the first layer's keys and values change places."""
    weights = load_file(directory / "fp32" / "model.safetensors")
    key, value = (f"model.layers.0.self_attn.{x}_proj.bias" for x in "kv")
    weights[key], weights[value] = weights[value], weights[key]
    shutil.copytree(directory, tmp_path / "swapped")
    save_file(weights, tmp_path / "swapped" / "fp32" / "model.safetensors")
    assert differences(at_layout(pool1, "tp1", logits, tmp_path / "swapped"), expected) > 100 * ATOL
