"""Adapters against PEFT on the same tiny models: logits, gradients and updates, at every kind of layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu

from mcore_rl.errors import ConfigError, LayoutError
from mcore_rl.lora import Lora, Target
from mcore_rl.model.adapters import Adapter, AdaptersOff, adapter_parameters
from mcore_rl.model.build import Model, build_logits, build_policy
from mcore_rl.model.hf.adapters import AdapterMap
from mcore_rl.model.hf.architecture import architecture_of, read_architecture
from mcore_rl.model.hf.peft_files import adapter_reader, lora_of, write_adapter
from mcore_rl.model.layouts import check_adapters
from mcore_rl.model.optimizer import build_optimizer, ddp_config
from mcore_rl.model.step import forward, forward_backward
from mcore_rl.model.weights_io import global_weights
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.tuning import RecomputeModule, Tuning
from mcore_rl.weights.adapters import export_adapter
from mcore_rl.weights.buckets import gather
from mcore_rl.weights.disk import export
from tests.model.families import FAMILIES
from tests.model.support import at_layout
from tests.model.test_families import Expected, Rows, check_gradients, differences, packed, tokens
from tests.model.test_policy import NegativeLogLikelihood

RANK, ALPHA = 4, 6.0
TARGETS = {"dense": ("qkv", "proj", "fc1", "fc2"), "moe": ("qkv", "proj", "fc1", "fc2", "experts")}
LR, UPDATES, BETAS, DECAY, CLIP = 3e-3, 5, (0.9, 0.95), 0.01, 1.0
LAYOUTS = {
    "dense": {
        "tp1": "pool1",
        "tp2": "pool2",
        "tp2+sp": "pool2",
        "pp2": "pool2",
        "cp2": "pool2",
        "dp2": "pool2",
        "tp2pp2": "pool4",
        "tp2cp2+sp": "pool4",
    },
    "moe": {
        "tp1": "pool1",
        "tp2+sp": "pool2",
        "ep2": "pool2",
        "tp2ep2+sp": "pool2",
        "pp2": "pool2",
        "tp2ep4dp2+sp": "pool4",
    },
}


Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """What becomes of an adapter."""

    expected: Expected
    norm: float
    """of the gradient, over adapters alone"""
    after: Tensors
    """the adapter's numbers after UPDATES updates"""


@dataclass(frozen=True)
class Case:
    """A model, an adapter of it, and what PEFT makes of both."""

    name: str
    directory: Path
    """`fp32` and `adapter` in it"""
    start: Tensors
    by_peft: Trained

    @property
    def lora(self) -> Lora:
        return Lora(RANK, ALPHA, TARGETS[self.name], path=self.directory / "adapter")


@pytest.fixture(scope="session", params=TARGETS)
def case(request, dense_dir: Path, moe_dir: Path, tmp_path_factory) -> Case:
    return case_of(request.param, {"dense": dense_dir, "moe": moe_dir}[request.param], tmp_path_factory)


@pytest.fixture(scope="session")
def dense_case(dense_dir: Path, tmp_path_factory) -> Case:
    return case_of("dense", dense_dir, tmp_path_factory)


def case_of(name: str, model: Path, tmp_path_factory) -> Case:
    root = tmp_path_factory.mktemp(f"lora_{name}")
    (root / "fp32").symlink_to(model)
    start = written_adapter(root, Lora(RANK, ALPHA, TARGETS[name]))
    whole, own = in_peft(root, start, name)

    def logits() -> Tensor:
        return torch.cat([whole(torch.tensor([row])).logits[0, :-1] for row in tokens()])

    return Case(name, root, start, trained(logits, own))


def written_adapter(root: Path, lora: Lora, seed: int = 1) -> Tensors:
    """An adapter of random numbers, B too, in PEFT's format below `root`."""
    adapters = AdapterMap(read_architecture(root / "fp32"), lora)
    generator = torch.Generator().manual_seed(seed)
    tensors = {n: 0.2 * torch.randn(s, generator=generator) for n, s in adapters.hf_shapes().items()}
    (root / "adapter").mkdir()
    write_adapter(adapters, tensors, root / "adapter", base="a model")
    return tensors


def base_of(root: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(root / "fp32", dtype=torch.float32).requires_grad_(False)


def merged(weights: Tensors, tensors: Tensors) -> Tensors:
    """Every weight by its name in a file, plus scale B A where there is an adapter."""
    found = dict(weights)
    for name in weights:
        down = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        if down in tensors:
            found[name] = (
                weights[name] + ALPHA / RANK * tensors[down.replace("lora_A", "lora_B")] @ tensors[down]
            )
    return found


def written_out(base: torch.nn.Module, tensors: Tensors) -> Tensor:
    """The logits of torch on W + s B A: [tokens but each sequence's last, V]."""
    config = base.config
    own = load_file(Path(config.name_or_path) / "model.safetensors")
    whole = fused(merged(own, tensors), config)
    answers = [torch.func.functional_call(base, whole, (torch.tensor([row]),)) for row in tokens()]
    return torch.cat([answer.logits[0, :-1] for answer in answers])


def fused(weights: Tensors, config) -> Tensors:
    """As transformers has them: the matrices of all experts of a layer in one tensor."""
    found = {name: weight for name, weight in weights.items() if ".experts." not in name}
    for layer in {name.split(".experts.")[0] for name in weights if ".experts." in name}:
        matrix = [
            [weights[f"{layer}.experts.{e}.{x}_proj.weight"] for e in range(config.num_experts)]
            for x in ("gate", "up", "down")
        ]
        found[f"{layer}.experts.gate_up_proj"] = torch.stack(
            [torch.cat(pair) for pair in zip(*matrix[:2], strict=True)]
        )
        found[f"{layer}.experts.down_proj"] = torch.stack(matrix[2])
    return found


def trained(logits: Callable[[], Tensor], tensors: Tensors) -> Trained:
    """The first pass, and the numbers of an adapter, which are changed in place, after UPDATES updates."""
    adam = torch.optim.AdamW(tensors.values(), lr=LR, betas=BETAS, eps=1e-8, weight_decay=DECAY)
    targets = torch.cat([torch.tensor(row[1:]) for row in tokens()])
    first: list[tuple[Expected, float]] = []
    for _ in range(UPDATES):
        adam.zero_grad()
        answer = logits()
        torch.nn.functional.cross_entropy(answer, targets, reduction="sum").backward()
        gradients = {name: tensor.grad.clone() for name, tensor in tensors.items()}
        norm = torch.nn.utils.clip_grad_norm_(tensors.values(), CLIP)
        first.append((Expected(answer.detach(), gradients), float(norm)))
        adam.step()
    return Trained(*first[0], {name: tensor.detach().clone() for name, tensor in tensors.items()})


# --- the reference is PEFT ----------------------------------------------------------------------------------


class Apart(torch.nn.ModuleList):
    """The experts of a layer, each matrix a linear layer of its own, as PEFT is to give it an adapter."""

    def __init__(self, stacked: torch.nn.Module) -> None:
        gates_up, downs = stacked.gate_up_proj.detach(), stacked.down_proj.detach()
        named = [
            dict(zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True))
            for gate_up, down in zip(gates_up, downs, strict=True)
        ]
        super().__init__(
            torch.nn.ModuleDict({name: linear(weight) for name, weight in one.items()}) for one in named
        )

    def forward(self, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        answers = [
            expert["down_proj"](silu(expert["gate_proj"](states)) * expert["up_proj"](states))
            for expert in self
        ]
        shares = [(weights * (chosen == number)).sum(-1, keepdim=True) for number in range(len(self))]
        return sum(share * answer for share, answer in zip(shares, answers, strict=True))


def linear(weight: Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight = torch.nn.Parameter(weight.clone())
    return layer


class Bare(torch.nn.Module):
    """A model without its configuration, by whose family PEFT would turn experts into a form of its own."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor):
        return self.model(ids)


def in_peft(root: Path, start: Tensors, name: str) -> tuple[torch.nn.Module, Tensors]:
    """The model with the adapter in PEFT's own layers, and their parameters by their names in its file."""
    from peft import LoraConfig, PeftModel, inject_adapter_in_model

    base = base_of(root)
    if name == "dense":
        whole = PeftModel.from_pretrained(base, root / "adapter", is_trainable=True)
        trainable = {n.replace(".default", ""): p for n, p in whole.named_parameters() if p.requires_grad}
        assert all(torch.equal(trainable[n], tensor) for n, tensor in start.items())
    else:
        for layer in base.model.layers:
            if hasattr(layer.mlp, "experts"):
                layer.mlp.experts = Apart(layer.mlp.experts)
        modules = sorted({n.removeprefix("base_model.").rpartition(".lora_")[0] for n in start})
        told = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=modules)
        whole = inject_adapter_in_model(told, Bare(base))
        trainable = {
            f"base_model.{n.replace('.default', '')}": p
            for n, p in whole.named_parameters()
            if p.requires_grad
        }
        with torch.no_grad():
            for n, tensor in start.items():
                trainable[n].copy_(tensor)
    assert trainable.keys() == start.keys()
    return whole, trainable


def test_peft_computes_w_plus_s_b_a(case: Case) -> None:
    """Both sides of the comparison with Megatron, told in another way: torch on weights written out."""
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in case.start.items()}
    base = base_of(case.directory)
    out = trained(lambda: written_out(base, tensors), tensors)
    assert float((out.expected.logits - case.by_peft.expected.logits).abs().max()) < 1e-5
    check_gradients(out.expected.gradients, case.by_peft.expected.gradients)
    assert out.norm == pytest.approx(case.by_peft.norm, rel=1e-5)
    check_moved(out.after, case)


def check_moved(got: Tensors, case: Case) -> None:
    """Each tensor within 3e-4 of what the updates moved it by."""
    assert got.keys() == case.start.keys()
    for name, wanted in case.by_peft.after.items():
        moved = float((wanted - case.start[name]).norm())
        assert float((got[name] - wanted).norm()) <= 3e-4 * moved, name


# --- Megatron at every layout -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Computed:
    """What one rank has at a layout."""

    rows: Rows
    inert: bool
    """with the adapters off, or with B = 0, the logits are those of the base bit for bit"""
    gradients: Tensors
    norm: float
    after: Tensors
    """the adapter after UPDATES updates, whole tensors that this rank answers for"""
    frozen: bool
    """no weight of the base has moved, or has a gradient"""


def computed(mesh: Mesh, directory: Path, lora: Lora, target: Path) -> Computed:
    scored = partial(logits_of, mesh, directory)
    without = scored(None), scored(lora, on=False), scored(replace(lora, path=None))
    inert = all(np.array_equal(a, b) for rows in zip(*without, strict=True) for a, b in same_rows(rows))
    model = build_policy(directory / "fp32", mesh, ddp=ddp_config(distributed=False), lora=lora)
    before = {name: weight.clone() for name, weight in global_weights(model.unwrapped).items()}
    export(model, target / "merged")
    export_adapter(model, target / "adapter", base="a model")
    gradients = gather({n: vars(p)["main_grad"] for n, p in one_pass(model).items()}, model.adapters, mesh)
    model = build_policy(directory / "fp32", mesh, ddp=ddp_config(), lora=lora)
    optimizer = build_optimizer(
        model, lr=LR, beta1=BETAS[0], beta2=BETAS[1], weight_decay=DECAY, clip_grad=CLIP
    )
    norms = []
    for _ in range(UPDATES):
        optimizer.zero_grad()
        one_pass(model, zero=False)
        norms.append(optimizer.step())
    after = gather(adapter_parameters(model.unwrapped), model.adapters, mesh)
    now = global_weights(model.unwrapped)
    frozen = all(
        torch.equal(now[name], weight) and not hasattr(now[name], "main_grad")
        for name, weight in before.items()
    )
    return Computed(scored(lora), inert, gradients, norms[0], after, frozen)


def same_rows(rows: tuple[tuple[np.ndarray, np.ndarray], ...]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The logits of the same rows of the base beside those of the others."""
    (number, base), *others = rows
    assert all(np.array_equal(number, other) for other, _ in others)
    return [(base, logits) for _, logits in others]


def one_pass(model: Model, *, zero: bool = True) -> dict[str, torch.nn.Parameter]:
    for chunk in model.chunks if zero else ():
        chunk.zero_grad_buffer()
    forward_backward(model, packed(model.mesh), NegativeLogLikelihood(), 1.0)
    return adapter_parameters(model.unwrapped)


def logits_of(mesh: Mesh, directory: Path, lora: Lora | None, *, on: bool = True) -> Rows:
    """(row, logits) of this rank's packed tokens."""
    model = build_logits(directory / "fp32", mesh, lora=lora)
    with nullcontext() if on else AdaptersOff(model.unwrapped).resident():
        scored = forward(model, packed(mesh), 1.0)
    return [(batch.fields["number"].numpy().astype(int), out.numpy()) for batch, out in scored]


CASES = [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "layout"),
    [pytest.param(*one, marks=[pytest.mark.slow] if one[1].count("2") > 1 else []) for one in CASES],
    indirect=["case"],
    scope="session",
)
def test_adapters_are_those_of_peft_at_every_layout(request, case: Case, layout: str, tmp_path: Path) -> None:
    pool: Pool = request.getfixturevalue(LAYOUTS[case.name][layout])
    answers = at_layout(pool, layout, computed, case.directory, case.lora, tmp_path)
    assert differences([answer.rows for answer in answers], case.by_peft.expected) <= 1e-5
    check_gradients({n: g for a in answers for n, g in a.gradients.items()}, case.by_peft.expected.gradients)
    assert all(answer.norm == pytest.approx(case.by_peft.norm, rel=1e-5) for answer in answers)
    check_moved({n: g for answer in answers for n, g in answer.after.items()}, case)
    assert all(answer.frozen and answer.inert for answer in answers)
    own = load_file(case.directory / "fp32" / "model.safetensors")
    written = {
        n: t for file in (tmp_path / "merged").glob("*.safetensors") for n, t in load_file(file).items()
    }
    wanted = merged(own, case.start)
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(written[name], tensor, rtol=0, atol=1e-6, msg=name)
        changed = not torch.equal(tensor, own[name])
        assert changed or torch.equal(written[name], own[name]), name
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / file).read_bytes() == (case.directory / "adapter" / file).read_bytes()


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "targets", "said"),
    [
        ("phi3_longrope", ("qkv",), r"phi3 has the matrices of 'qkv' in one tensor"),
        ("gpt_oss", ("experts",), r"gpt_oss has the matrices of 'experts' in one tensor"),
        ("qwen3", ("qkv", "experts"), r"'experts' names no matrix of this qwen3 model"),
    ],
)
def test_targets_that_a_family_has_not_are_refused(
    family: str, targets: tuple[Target, ...], said: str
) -> None:
    kind, settings = FAMILIES[family]
    config = getattr(transformers, kind)(**settings).to_dict()
    with pytest.raises(ConfigError, match=said):
        AdapterMap(architecture_of(config, family), Lora(RANK, ALPHA, targets))


def test_more_ranks_than_key_heads_are_refused(dense_dir: Path) -> None:
    with pytest.raises(LayoutError, match="the model's 4 key heads cannot be cut further"):
        check_adapters(read_architecture(dense_dir), Layout(tensor=8), Lora(RANK, ALPHA))


@pytest.mark.parametrize(
    ("kind", "target", "modules"),
    [("dense", "fc1", ("core_attn", "mlp")), ("dense", "qkv", ("core_attn",)), ("moe", "experts", ("moe",))],
)
def test_adapters_learn_what_they_learn_where_layers_are_computed_again(
    pool1: Pool,
    kind: str,
    target: Target,
    modules: tuple[RecomputeModule, ...],
    request: pytest.FixtureRequest,
) -> None:
    """Before the first adapter nothing wants a gradient, and Megatron asks the input whether one is."""
    directory, lora = request.getfixturevalue(f"{kind}_dir"), Lora(RANK, ALPHA, (target,))
    tunings = Tuning(), Tuning("full"), Tuning("selective", modules)
    (plain,), *again = (at_layout(pool1, "tp1", learnt, directory, lora, tuning) for tuning in tunings)
    assert all(float(gradient.abs().max()) > 0 for name, gradient in plain.items() if "lora_B" in name)
    for (gradients,) in again:
        for name, gradient in plain.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def learnt(mesh: Mesh, directory: Path, lora: Lora, tuning: Tuning) -> Tensors:
    model = build_policy(directory, mesh, ddp=ddp_config(distributed=False), lora=lora, tuning=tuning)
    return {name: vars(p)["main_grad"].clone() for name, p in one_pass(model).items()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = .* is not supported"),
        ({"r": 8}, "lora.rank = 4, but .* says r = 8"),
        ({"use_rslora": True}, "lora.rslora = False, but"),
    ],
)
def test_another_adapter_than_the_config_says_is_refused(
    dense_case: Case, tmp_path: Path, change: dict, said: str
) -> None:
    for file in (dense_case.directory / "adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(told | change))
    adapters = AdapterMap(read_architecture(dense_case.directory / "fp32"), dense_case.lora)
    with pytest.raises(ConfigError, match=said):
        adapter_reader(adapters, tmp_path)


def test_an_adapter_of_other_targets_is_refused(dense_case: Case) -> None:
    arch = read_architecture(dense_case.directory / "fp32")
    assert lora_of(dense_case.directory / "adapter", arch) == dense_case.lora
    fewer = AdapterMap(arch, replace(dense_case.lora, targets=("qkv",)))
    with pytest.raises(ConfigError, match=r"unexpected .*down_proj.lora_A.weight"):
        adapter_reader(fewer, dense_case.directory / "adapter")


def test_another_scale_is_seen(pool1: Pool, dense_case: Case) -> None:
    """Negative control of the comparison of logits."""
    (rows,) = at_layout(pool1, "tp1", scaled, dense_case.directory, dense_case.lora, 1.001 * ALPHA)
    assert differences([rows], dense_case.by_peft.expected) > 1e-3


def scaled(mesh: Mesh, directory: Path, lora: Lora, alpha: float) -> Rows:
    model = build_logits(directory / "fp32", mesh, lora=lora)
    for module in model.unwrapped[0].modules():
        if isinstance(module, Adapter):
            module.scale *= alpha / lora.alpha
    scored = forward(model, packed(mesh), 1.0)
    return [(batch.fields["number"].numpy().astype(int), out.numpy()) for batch, out in scored]
