"""Routing replay: Megatron's tokens go where they are told, at every layout, and gates learn from it.

The reference is transformers with its routers' choice overridden. L layers, K experts a token.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mcore_rl.data.packing import TokenSequence
from mcore_rl.model.build import build_policy
from mcore_rl.model.optimizer import ddp_config
from mcore_rl.model.step import forward_backward
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.training.batch import pack_share
from mcore_rl.tuning import Tuning
from mcore_rl.weights.buckets import gather
from tests.model.conftest import save
from tests.model.support import MOE, at_layout, scored_log_probs, sequences, shape_at
from tests.model.test_policy import NegativeLogLikelihood

LAYERS, EXPERTS, PER_TOKEN = 4, 8, 2
SPARSE = (0, 2, 3)
GATE = "model.layers.{}.mlp.gate.weight"


def write(root: Path, *, normalized: bool) -> Path:
    """A Qwen3-MoE whose second of four layers is dense; a token's routing weights sum to 1, or do not."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    changed = {"num_hidden_layers": LAYERS, "num_experts": EXPERTS, "norm_topk_prob": normalized}
    return save(Qwen3MoeForCausalLM, Qwen3MoeConfig(**MOE | changed), root / "model")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("normalized"), normalized=True)


def load(directory: Path):
    from transformers import Qwen3MoeForCausalLM

    # Its grouped matrix products know no float64.
    return Qwen3MoeForCausalLM.from_pretrained(directory, dtype=torch.float64, experts_implementation="eager")


def random_experts(scored: Sequence[TokenSequence], seed: int = 3) -> list[TokenSequence]:
    """Random experts for every token but the last; a dense layer's numbers mean nothing."""
    rng = np.random.default_rng(seed)
    return [
        replace(one, experts=drawn[:-1])
        for one in scored
        for drawn in [rng.random((len(one), LAYERS, EXPERTS)).argsort(-1)[..., :PER_TOKEN].astype(np.uint8)]
    ]


def own_experts(directory: Path, scored: Sequence[TokenSequence]) -> list[TokenSequence]:
    """What transformers' routers choose."""
    model, found = load(directory), []
    for one in scored:
        chosen = np.zeros((len(one), LAYERS, PER_TOKEN), np.int16)
        hooks = [
            model.model.layers[layer].mlp.gate.register_forward_hook(
                lambda _, __, out, layer=layer, chosen=chosen: chosen.__setitem__(
                    (slice(None), layer), out[2]
                )
            )
            for layer in SPARSE
        ]
        with torch.no_grad():
            model(torch.tensor([[*one.prompt, *one.response]]))
        for hook in hooks:
            hook.remove()
        found.append(replace(one, experts=chosen[:-1]))
    return found


@contextmanager
def forced(model, experts: np.ndarray) -> Iterator[None]:
    """transformers' routers choose `experts` [tokens - 1, L, K]; on the last token as they would."""

    def override(layer: int):
        def hook(gate, _, output) -> tuple[Tensor, Tensor, Tensor]:
            logits, _, own = output
            told = torch.from_numpy(experts[:, layer].astype(np.int64))
            chosen = torch.cat([told, own[-1:]])
            weights = logits.softmax(-1).gather(1, chosen)
            if gate.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights, chosen

        return hook

    hooks = [model.model.layers[i].mlp.gate.register_forward_hook(override(i)) for i in SPARSE]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def reference_log_probs(directory: Path, scored: Sequence[TokenSequence], model=None) -> Tensor:
    """[R] by transformers in float64, forced to each sequence's experts."""
    model, rows = model or load(directory), []
    for one in scored:
        tokens = torch.tensor([*one.prompt, *one.response])
        with forced(model, one.experts):
            log_p = model(tokens[None]).logits[0].log_softmax(-1)
        rows.append(log_p[:-1].gather(1, tokens[1:, None]).squeeze(1)[len(one.prompt) - 1 :])
    return torch.cat(rows)


@pytest.fixture(scope="module")
def told() -> list[TokenSequence]:
    return random_experts(sequences())


@pytest.fixture(scope="module")
def reference(directory: Path, told: list[TokenSequence]) -> Tensor:
    with torch.no_grad():
        return reference_log_probs(directory, told)


def test_the_routers_own_choice_replayed_changes_nothing(pool1: Pool, directory: Path) -> None:
    (plain,) = at_layout(pool1, "tp1", scored_log_probs, directory, sequences())
    own = own_experts(directory, sequences())
    (replayed,) = at_layout(pool1, "tp1", scored_log_probs, directory, own)
    torch.testing.assert_close(replayed, plain, rtol=0, atol=1e-6)


def test_other_experts_are_those_of_transformers_forced_to_them(
    pool1: Pool, directory: Path, told: list[TokenSequence], reference: Tensor
) -> None:
    (got,) = at_layout(pool1, "tp1", scored_log_probs, directory, told)
    torch.testing.assert_close(got.double(), reference, rtol=0, atol=1e-5)
    (plain,) = at_layout(pool1, "tp1", scored_log_probs, directory, sequences())
    assert (plain - got).abs().max() > 0.1


def test_routing_weights_that_do_not_sum_to_one(
    pool1: Pool, told: list[TokenSequence], tmp_path: Path
) -> None:
    where = write(tmp_path, normalized=False)
    (got,) = at_layout(pool1, "tp1", scored_log_probs, where, told)
    with torch.no_grad():
        wanted = reference_log_probs(where, told)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-5)


def layers_swapped(experts: np.ndarray) -> np.ndarray:
    return experts[:, [0, 1, 3, 2]]


def one_token_late(experts: np.ndarray) -> np.ndarray:
    return np.roll(experts, 1, axis=0)


@pytest.mark.parametrize("wrong", [layers_swapped, one_token_late])
def test_a_wrong_layer_or_token_is_seen(
    pool1: Pool, directory: Path, told: list[TokenSequence], reference: Tensor, wrong
) -> None:
    """Negative control of all comparisons with the reference."""
    misplaced = [replace(one, experts=wrong(one.experts)) for one in told]
    (got,) = at_layout(pool1, "tp1", scored_log_probs, directory, misplaced)
    assert (got.double() - reference).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2+sp", "ep2", "pp2", "pp2+vpp2", "cp2"])
def test_every_layout_replays_the_same(
    pool2: Pool, directory: Path, told: list[TokenSequence], reference: Tensor, layout: str
) -> None:
    for got in at_layout(pool2, layout, scored_log_probs, directory, told):
        torch.testing.assert_close(got.double(), reference, rtol=0, atol=1e-5)


def test_a_sequence_without_experts_routes_itself_beside_others(
    pool1: Pool, directory: Path, told: list[TokenSequence], reference: Tensor
) -> None:
    mixed = [replace(one, experts=None) if i % 2 else one for i, one in enumerate(told)]
    (got,) = at_layout(pool1, "tp1", scored_log_probs, directory, mixed)
    (plain,) = at_layout(pool1, "tp1", scored_log_probs, directory, sequences())
    own = np.repeat([i % 2 == 1 for i in range(len(told))], [one.scored for one in told])
    torch.testing.assert_close(got[own], plain[own], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[~own].double(), reference[~own], rtol=0, atol=1e-5)


def gradients(
    mesh: Mesh, directory: Path, scored: Sequence[TokenSequence], recompute: Any = "none"
) -> dict[str, Tensor]:
    """HF name -> gradient of the negative log-likelihood."""
    model = build_policy(
        directory, mesh, ddp=ddp_config(distributed=False), tuning=Tuning(recompute=recompute)
    )
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    forward_backward(model, pack_share(scored, {}, shape_at(mesh), mesh), NegativeLogLikelihood(), 1.0)
    held = {name: parameter.main_grad for name, parameter in global_parameters(model.unwrapped).items()}
    return gather(held, model.mapping, mesh)


@pytest.fixture(scope="module")
def gate_gradients(directory: Path, told: list[TokenSequence]) -> dict[str, Tensor]:
    model = load(directory)
    (-reference_log_probs(directory, told, model).sum()).backward()
    return {GATE.format(i): model.get_parameter(GATE.format(i)).grad for i in SPARSE}


def check_gates(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, gradient in wanted.items():
        scale = gradient.abs().max()
        assert scale > 1e-2, name
        torch.testing.assert_close(got[name].double() / scale, gradient / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_gates_learn_from_the_replayed_choice(
    pool1: Pool, directory: Path, told: list[TokenSequence], gate_gradients, recompute: Any
) -> None:
    """Gradients are of the present weights; recomputed for the backward pass, the choice is the same."""
    (got,) = at_layout(pool1, "tp1", gradients, directory, told, recompute)
    check_gates(got, gate_gradients)
    (plain,) = at_layout(pool1, "tp1", gradients, directory, sequences(), recompute)
    with pytest.raises(AssertionError):
        check_gates(plain, gate_gradients)


def threads() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/task"))


@pytest.mark.slow
def test_a_model_that_is_let_go_of_leaves_no_group(
    pool2: Pool, directory: Path, told: list[TokenSequence]
) -> None:
    """A gloo group has three threads for as long as anything refers to it, and a mesh has some twenty."""
    at_layout(pool2, "ep2", gradients, directory, told)
    before = pool2.run(threads)
    for _ in range(2):
        at_layout(pool2, "ep2", gradients, directory, told)
    assert pool2.run(threads) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "recompute"), [("tp2+sp", "none"), ("ep2", "none"), ("pp2", "full"), ("cp2", "none")]
)
def test_gates_learn_the_same_at_every_layout(
    pool2: Pool, directory: Path, told: list[TokenSequence], gate_gradients, layout: str, recompute
) -> None:
    found = {}
    for got in at_layout(pool2, layout, gradients, directory, told, recompute):
        found |= got
    check_gates(found, gate_gradients)
