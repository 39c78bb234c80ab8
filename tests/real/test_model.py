"""SmolLM2-135M-Instruct, 30 layers of trained weights, against transformers: logits and conversion."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mcore_rl.convert.command import hf_to_mcore, mcore_to_hf
from mcore_rl.data.packing import TokenSequence
from mcore_rl.errors import LayoutError
from mcore_rl.model.build import build_logits
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.layouts import check_layout
from mcore_rl.model.step import forward
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool, spawn
from mcore_rl.training.batch import pack_share
from tests.model.support import at_layout, shape_at, with_mesh

RELATIVE = 1e-5
"""of the largest logit, in float32"""
MESSAGES = (
    "What is 47 + 8?",
    "Name three rivers of Europe, and say which of them is the longest.",
    "Hello",
)


@pytest.fixture(scope="session")
def rows(made: Path) -> list[list[int]]:
    """Conversations up to where the assistant answers."""
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)[
            "input_ids"
        ]
        for text in MESSAGES
    ]


def by_transformers(directory: Path, dtype: torch.dtype, rows: list[list[int]]) -> Tensor:
    """[tokens but each row's last, vocabulary], float32"""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row])).logits[0, :-1].float() for row in rows])


@pytest.fixture(scope="session")
def expected(made: Path, rows: list[list[int]]) -> Tensor:
    return by_transformers(made / "model", torch.float32, rows)


def by_megatron(mesh: Mesh, directory: Path, precision: str, rows: list[list[int]]) -> np.ndarray | None:
    """The same, packed; None on a rank that is not of the last stage."""
    model = build_logits(directory, mesh, precision=precision)
    starts = np.cumsum([0, *(len(row) - 1 for row in rows[:-1])])
    number = [start + np.arange(len(row) - 1.0) for start, row in zip(starts, rows, strict=True)]
    sequences = [TokenSequence(row[:1], row[1:]) for row in rows]
    batches = pack_share(sequences, {"number": number}, shape_at(mesh, 256), mesh)
    scored = [(p.fields["number"].numpy(), out.float().numpy()) for p, out in forward(model, batches, 1.0)]
    if not mesh.is_last_stage:
        return None
    order = np.argsort(np.concatenate([numbers for numbers, _ in scored]))
    return np.concatenate([logits for _, logits in scored])[order]


def relative(answers: list[np.ndarray | None], expected: Tensor) -> float:
    """Largest difference of any rank that answered, relative to the largest logit."""
    found = [torch.from_numpy(answer) for answer in answers if answer is not None]
    assert found
    return max(float((answer - expected).abs().max() / expected.abs().max()) for answer in found)


@pytest.mark.parametrize("layout", ["tp1", "tp3", "pp2"])
def test_logits_are_those_of_transformers(
    request: pytest.FixtureRequest, made: Path, rows: list[list[int]], expected: Tensor, layout: str
) -> None:
    """9 heads over 3 heads of keys and values: three ranks share them."""
    arguments = (made / "model", "fp32", rows)
    if layout == "tp3":
        answers = spawn(with_mesh, 3, Layout.parse(layout), by_megatron, *arguments)
    else:
        pool: Pool = request.getfixturevalue("pool1" if layout == "tp1" else "pool2")
        answers = at_layout(pool, layout, by_megatron, *arguments)
    assert relative(answers, expected) <= RELATIVE


def test_a_layout_that_does_not_divide_the_heads_is_refused_by_name(made: Path) -> None:
    with pytest.raises(
        LayoutError, match=r"parallel\.tensor = 2 does not divide the model's 9 attention heads"
    ):
        check_layout(read_architecture(made / "model"), Layout.parse("tp2"))


def test_bfloat16_is_as_far_from_float32_as_that_of_transformers(
    pool1: Pool, made: Path, rows: list[list[int]], expected: Tensor
) -> None:
    """In the root mean square over all logits: both round after each operation, at different places."""
    theirs = (by_transformers(made / "model", torch.bfloat16, rows) - expected).square().mean().sqrt()
    (found,) = at_layout(pool1, "tp1", by_megatron, made / "model_bf16", "bf16", rows)
    ours = (torch.from_numpy(found) - expected).square().mean().sqrt()
    assert 0 < ours <= 1.5 * theirs, (ours, theirs)


def test_conversion_is_certified_and_comes_back_bit_for_bit(made: Path, tmp_path: Path) -> None:
    hf_to_mcore(made / "model_bf16", tmp_path / "mcore", certified=True)
    certificate = json.loads((tmp_path / "mcore" / "manifest.json").read_text())["conversion"]["certificate"]
    assert certificate["max_abs_logit_difference"] <= RELATIVE * certificate["max_abs_logit"]
    mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    source = load_file(made / "model_bf16" / "model.safetensors")
    back = {n: t for file in (tmp_path / "back").glob("*.safetensors") for n, t in load_file(file).items()}
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in source.items())
