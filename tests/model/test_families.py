"""Every family against transformers: logits and weights, at every kind of layout."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from mcore_rl.checkpoint.pieces import model_pieces
from mcore_rl.data.packing import TokenSequence
from mcore_rl.errors import ConfigError
from mcore_rl.model import build
from mcore_rl.model.build import build_logits, build_policy
from mcore_rl.model.hf.architecture import positions_of, read_architecture
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.model.hf.stacked import joined
from mcore_rl.model.hf.torch_dist import place
from mcore_rl.model.optimizer import ddp_config
from mcore_rl.model.rotary import rotary_frequencies
from mcore_rl.model.step import forward, forward_backward
from mcore_rl.model.weights_io import global_weights
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.plan.count import count_policy
from mcore_rl.training.batch import pack_share
from mcore_rl.types import PackedBatch
from mcore_rl.weights.buckets import gather
from mcore_rl.weights.disk import export
from tests.model.conftest import save
from tests.model.families import FAMILIES, SMALL, THETA, WIDE
from tests.model.support import DENSE, VOCAB, at_layout, shape_at
from tests.model.test_policy import NegativeLogLikelihood

ATOL = 1e-5
RTOL = 1e-5
OF_ANOTHER_ROPE = {"qwen2_yarn", "phi3_longrope", "deepseek_v2_groups", "deepseek_v3_halves"}
UNTRAINED = "e_score_correction_bias"
"""chosen by, and moved by no gradient"""
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
    kind, settings = FAMILIES[family]
    root = tmp_path_factory.mktemp(family)
    save(
        transformers.AutoModelForCausalLM.from_config, getattr(transformers, kind)(**settings), root / "fp32"
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "fp32", dtype=torch.bfloat16)
    model.save_pretrained(root / "bf16")
    return root


@dataclass(frozen=True)
class Expected:
    """What transformers computes, without packing or padding."""

    logits: Tensor
    """[tokens but each sequence's last, vocabulary]"""
    gradients: dict[str, Tensor]
    """name -> gradient of the sum of all tokens' negative log-likelihoods, of what a gradient reaches"""


@pytest.fixture(scope="session")
def expected(directory: Path) -> Expected:
    return expected_of(directory)


def expected_of(directory: Path) -> Expected:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / "fp32", dtype=torch.float32)
    rows = tokens()
    logits = torch.cat([model(torch.tensor([row])).logits[0, :-1] for row in rows])
    targets = torch.cat([torch.tensor(row[1:]) for row in rows])
    torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    # By the names and in the form of the checkpoint: experts apart.
    model.load_state_dict(gradients, strict=False)
    with tempfile.TemporaryDirectory() as written:
        model.save_pretrained(written)
        return Expected(logits.detach(), load_file(Path(written) / "model.safetensors"))


Rows = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Computed:
    """What one rank has at a layout."""

    rows: Rows
    """(row, logits) of its packed tokens"""
    stage: int
    parameters: int
    gradients: dict[str, Tensor]
    """HF name -> whole gradient, of the tensors that this rank answers for"""
    saved: set[tuple[str, tuple[int, ...]]]
    """key and global shape of what a checkpoint of it holds"""


def computed(mesh: Mesh, directory: Path, target: Path, sizes: tuple[str, ...]) -> Computed:
    """Logits, gradients, and the models of `sizes` exported below `target`."""
    for precision in sizes[1:]:
        export(build_policy(directory / precision, mesh, precision=precision), target / precision)
    model = build_policy(directory / sizes[0], mesh, ddp=ddp_config(distributed=False))
    export(model, target / sizes[0])
    weights = global_weights(model.unwrapped)
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    forward_backward(model, packed(mesh), NegativeLogLikelihood(), 1.0)
    held = {n: vars(w)["main_grad"] if w.requires_grad else torch.zeros_like(w) for n, w in weights.items()}
    gradients = gather(held, model.mapping, mesh)
    count = sum(weight.numel() for weight in weights.values())
    saved = {(piece.key, piece.shape) for piece in model_pieces(model)}
    return Computed(logits(mesh, directory), mesh.pp_rank, count, gradients, saved)


def packed(mesh: Mesh) -> list[PackedBatch]:
    sequences = [TokenSequence(row[:1], row[1:]) for row in tokens()]
    starts = np.cumsum([0, *LENGTHS[:-1]]) - np.arange(len(LENGTHS))
    number = [np.arange(start, start + n - 1.0) for start, n in zip(starts, LENGTHS, strict=True)]
    return pack_share(sequences, {"number": number}, shape_at(mesh, 64), mesh)


def logits(mesh: Mesh, directory: Path) -> Rows:
    """(row, logits) of this rank's packed tokens."""
    scored = forward(build_logits(directory / "fp32", mesh), packed(mesh), 1.0)
    return [(batch.fields["number"].numpy().astype(int), out.numpy()) for batch, out in scored]


def assemble(answers: list[Rows]) -> list[Tensor]:
    """Per rank that answered: its logits in the order of `expected`; over data-parallel ranks, joined."""
    rows = sum(LENGTHS) - len(LENGTHS)
    out = []
    for parts in answers:
        whole = torch.full((rows, VOCAB), torch.nan)
        for number, values in parts:
            whole[number] = torch.from_numpy(values)
        out.append(whole)
    return out


def differences(answers: list[Rows], expected: Expected) -> float:
    """Largest difference; every row must have come from some rank, and agree wherever it came from."""
    found = torch.stack(assemble([answer for answer in answers if answer]))
    assert not torch.isnan(found).all(dim=0).any(), "a row is missing"
    return float((found - expected.logits).abs().nan_to_num(0).max())


LAYOUTS = {"tp1": "pool1", "tp2": "pool2", "pp2": "pool2", "cp2": "pool2", "ep2": "pool2", "tp2pp2": "pool4"}
QUICK = ("tp1",)
"""for the inner loop"""
ROUNDED = ("tp2", "ep2")
"""where weights of bfloat16 are exported too: a tensor is cut there, or lies on few ranks, as in float32"""


@pytest.mark.parametrize(
    "layout", [pytest.param(text, marks=[] if text in QUICK else [pytest.mark.slow]) for text in LAYOUTS]
)
def test_logits_gradients_and_weights_are_those_of_transformers(
    request, family: str, directory: Path, expected: Expected, layout: str, tmp_path: Path
) -> None:
    arch = read_architecture(directory / "fp32")
    if layout == "ep2" and arch.experts is None:
        pytest.skip("a dense family has no experts to spread")
    if layout in ("pp2", "tp2pp2") and family in OF_ANOTHER_ROPE:
        pytest.skip("the stages are those of the same family's other model")
    where = layout + "+sp" if arch.experts and "tp2" in layout else layout
    pool: Pool = request.getfixturevalue(LAYOUTS[layout])
    sizes = ("fp32", "bf16") if layout in ROUNDED else ("fp32",)
    answers = at_layout(pool, where, computed, directory, tmp_path, sizes)
    assert differences([answer.rows for answer in answers], expected) <= ATOL
    stages = count_policy(arch, Layout.parse(where))
    assert [answer.parameters for answer in answers] == [stages[answer.stage].total for answer in answers]
    check_gradients(
        joined({n: g for answer in answers for n, g in answer.gradients.items()}), expected.gradients
    )
    mapping = ParameterMap(arch, arch.vocab)
    places = [place(entry, mapping) for entry in mapping.entries()]
    held = set().union(*(answer.saved for answer in answers))
    assert held == {(where.key, where.shape) for where in places}, "conversions read what a checkpoint holds"
    for precision in sizes:
        exported: dict[str, Tensor] = {}
        for file in (tmp_path / precision).glob("*.safetensors"):
            exported |= load_file(file)
        original = load_file(directory / precision / "model.safetensors")
        assert exported.keys() == original.keys()
        for name, tensor in original.items():
            assert exported[name].dtype == tensor.dtype, name
            assert torch.equal(exported[name], tensor), name


PRODUCTS = ("tp2cp2+sp", "tp2ep4dp2+sp", "pp2cp2ep2")


@pytest.mark.slow
@pytest.mark.parametrize("layout", PRODUCTS)
@pytest.mark.parametrize("family", ["deepseek_v3"], scope="session", indirect=True)
def test_latent_attention_at_products_of_layouts(
    pool4: Pool, directory: Path, expected: Expected, layout: str, tmp_path: Path
) -> None:
    answers = at_layout(pool4, layout, computed, directory, tmp_path, ("fp32",))
    assert differences([answer.rows for answer in answers], expected) <= ATOL
    check_gradients({n: g for answer in answers for n, g in answer.gradients.items()}, expected.gradients)


def check_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Every tensor's, relative to its largest entry, or to a millionth of the largest of all."""
    trained = {name: g for name, g in wanted.items() if not name.endswith(UNTRAINED)}
    floor = 1e-6 * max(float(gradient.abs().max()) for gradient in trained.values())
    assert got.keys() == wanted.keys()
    for name, gradient in trained.items():
        scale = max(float(gradient.abs().max()), floor)
        assert float((got[name] - gradient).abs().max()) <= RTOL * scale, name


@pytest.mark.parametrize("family", ["llama"], scope="session", indirect=True)
def test_a_missing_rope_scaling_is_seen(pool1: Pool, directory: Path, expected: Expected) -> None:
    """Negative control, and the reason for the length of the sequences."""
    assert differences(at_layout(pool1, "tp1", logits_unscaled, directory), expected) > 100 * ATOL


def logits_unscaled(mesh: Mesh, directory: Path) -> Rows:
    def unscaled(rotary):
        return rotary_frequencies(replace(rotary, scaling=None))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "rotary_frequencies", unscaled)
        return logits(mesh, directory)


@pytest.mark.parametrize("family", ["qwen2"], scope="session", indirect=True)
def test_a_bias_out_of_place_is_seen(
    pool1: Pool, directory: Path, expected: Expected, tmp_path: Path
) -> None:
    """Negative control: the biases of the first layer's keys and values change places."""
    weights = load_file(directory / "fp32" / "model.safetensors")
    key, value = (f"model.layers.0.self_attn.{x}_proj.bias" for x in "kv")
    weights[key], weights[value] = weights[value], weights[key]
    shutil.copytree(directory, tmp_path / "swapped")
    save_file(weights, tmp_path / "swapped" / "fp32" / "model.safetensors")
    assert differences(at_layout(pool1, "tp1", logits, tmp_path / "swapped"), expected) > 100 * ATOL


FEW_KEYS = {
    "qwen3": ("Qwen3Config", DENSE | SMALL | {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", WIDE | {"num_key_value_heads": 1}),
}
"""1 or 2 key heads for 4 ranks: query, key and value are cut through heads of odd width"""


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW_KEYS)
def test_more_ranks_than_key_heads(pool4: Pool, name: str, tmp_path: Path) -> None:
    kind, settings = FEW_KEYS[name]
    config = getattr(transformers, kind)(**settings)
    save(transformers.AutoModelForCausalLM.from_config, config, tmp_path / "fp32")
    wanted = expected_of(tmp_path)
    answers = at_layout(pool4, "tp4+sp", computed, tmp_path, tmp_path / "out", ("fp32",))
    assert differences([answer.rows for answer in answers], wanted) <= ATOL
    check_gradients({n: g for answer in answers for n, g in answer.gradients.items()}, wanted.gradients)
    exported = load_file(next((tmp_path / "out" / "fp32").glob("*.safetensors")))
    for key, tensor in load_file(tmp_path / "fp32" / "model.safetensors").items():
        assert torch.equal(exported[key], tensor), key


DYNAMIC = DENSE | SMALL | {"rope_parameters": THETA | {"rope_type": "dynamic", "factor": 2.0}}
SHORT = {
    "longrope": (FAMILIES["phi3_longrope"], 64),
    "dynamic": (("LlamaConfig", DYNAMIC | {"max_position_embeddings": 40}), 40),
}
"""rope type -> a model, and the tokens up to which its frequencies do not depend on the sequence's length"""


@pytest.mark.parametrize("kind", SHORT)
def test_a_sequence_beyond_what_is_exact_is_refused(pool1: Pool, kind: str, tmp_path: Path) -> None:
    """One of the limit's length gives numbers, one token more an error that names limit and remedy."""
    (config, settings), limit = SHORT[kind]
    save(
        transformers.AutoModelForCausalLM.from_config,
        getattr(transformers, config)(**settings),
        tmp_path / "fp32",
    )
    assert positions_of(tmp_path / "fp32") == limit
    (said,) = at_layout(pool1, "tp1", refusals, tmp_path / "fp32", (limit, limit + 1))
    assert said[0] == ""
    assert said[1].startswith(f"a sequence of more than {limit} tokens: beyond its original length")
    assert said[1].endswith("lower rollout.max_new_tokens or data.max_prompt_tokens")


def refusals(mesh: Mesh, directory: Path, lengths: tuple[int, ...]) -> list[str]:
    """What is said of a sequence of each length; "" where it is scored."""
    model = build_policy(directory, mesh)
    said = []
    for length in lengths:
        sequence = TokenSequence([1], [2] * (length - 1))
        batches = pack_share([sequence], {}, shape_at(mesh, 128), mesh)
        try:
            forward(model, batches, 1.0)
            said.append("")
        except ConfigError as error:
            said.append(str(error))
    return said
