"""The critic on Megatron: values equal transformers' hidden states times the head, at every layout alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from mcore_rl.data.packing import TokenSequence
from mcore_rl.errors import ConfigError
from mcore_rl.model.build import build_critic
from mcore_rl.model.optimizer import build_optimizer, ddp_config
from mcore_rl.model.policy import ValueHead
from mcore_rl.model.step import forward_backward
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh, build_mesh, destroy_mesh
from mcore_rl.training.batch import Batching, align_of, pack_share
from mcore_rl.training.metrics import Gathered, read
from mcore_rl.training.model_passes import values
from mcore_rl.training.objective import ValueObjective
from mcore_rl.weights.buckets import gather

VOCAB, HIDDEN, SEED = 50, 32, 3
COEF = 0.5


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A tiny Qwen3 as transformers initialises and saves it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        initializer_range=0.15,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("critic") / "model"
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def sequences() -> list[TokenSequence]:
    """Prompts of 1-6 and responses of 0-9 tokens."""
    rng = np.random.default_rng(1)
    draw = lambda low, high: rng.integers(VOCAB, size=rng.integers(low, high)).tolist()  # noqa: E731
    return [TokenSequence(draw(1, 7), draw(0, 10)) for _ in range(10)]


def head_weight() -> Tensor:
    """[1, H] what the tests put in place of the zero head."""
    return torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(SEED))


def shape_at(mesh: Mesh) -> Batching:
    return Batching(1, 32, 10, lambda lengths: np.asarray(lengths, float), align_of(mesh))


def mark(head: ValueHead) -> None:
    """Mark it as a norm's weight, which sees a part of the sequence: Megatron sums its gradient over TP."""
    head.weight.sequence_parallel = True


def sum_gradient(head: ValueHead) -> None:
    """Sum it as in front of a vocab-parallel layer, whose ranks each have a part of the gradient."""
    head.register_forward_pre_hook(lambda _, args: (copy_to_tensor_model_parallel_region(args[0]), args[1]))


def sum_scattered_gradient(head: ValueHead) -> None:
    """Megatron's default gather under sequence parallelism."""
    head.sequence_parallel = False
    head.register_forward_pre_hook(lambda _, args: (gather_from_sequence_parallel_region(args[0]), args[1]))


WRONG: dict[str, Callable[[ValueHead], None]] = {
    "marked": mark,
    "summed": sum_gradient,
    "summed scatter": sum_scattered_gradient,
}


def measure(layout: Layout, model_dir: Path, head: Tensor, mistake: str = "") -> dict[str, object]:
    """Values of all rows; loss, gradient norm and full gradients of the value loss. For a pool's ranks."""
    mesh = build_mesh(layout, timeout=60.0)
    try:
        critic = build_critic(model_dir, mesh, ddp=ddp_config(distributed=False))
        optimizer = build_optimizer(critic, lr=0.0, kind="sgd", clip_grad=0.0, distributed=False)
        for chunk in critic.unwrapped:
            if chunk.post_process:
                chunk.value_head.weight.data.copy_(head)
                WRONG.get(mistake, lambda head: None)(chunk.value_head)
        batch, shape = sequences(), shape_at(mesh)
        old = values(critic, batch, shape)
        tokens = sum(map(len, old))
        fields = {
            "old_value": [v - 0.3 * np.sin(np.arange(len(v))) for v in old],
            "return": [np.cos(np.arange(len(v))) for v in old],
            "weight": [1 / tokens] * len(old),
        }
        optimizer.zero_grad()
        objective = ValueObjective(clip=0.2, coef=COEF)
        sums = forward_backward(critic, pack_share(batch, fields, shape, mesh), objective, 1.0)
        metrics = read(Gathered(sums).reduce(mesh), 1)
        gradients = {name: p.main_grad for name, p in global_parameters(critic.unwrapped).items()}
        return {
            "values": old,
            "loss": metrics["loss/value"],
            "clipped": metrics["value/clip_fraction"] * tokens,
            "norm": optimizer.step(),
            "gradients": gather(gradients, critic.mapping, mesh),
        }
    finally:
        destroy_mesh()


def whole(results: list[dict]) -> tuple[dict, dict[str, Tensor]]:
    """(rank 0's numbers, all ranks' gradients)."""
    return results[0], {name: g for result in results for name, g in result["gradients"].items()}


@pytest.fixture(scope="module")
def one_rank(pool1, model_dir) -> tuple[dict, dict[str, Tensor]]:
    return whole(pool1.run(measure, Layout(), model_dir, head_weight(), timeout=60.0))


def errors(got: tuple[dict, dict[str, Tensor]], expected: tuple[dict, dict[str, Tensor]]) -> dict[str, float]:
    """Largest differences: absolute for values, relative to the largest entry for gradients."""
    assert got[1].keys() == expected[1].keys()
    return {
        "values": max(
            np.abs(a - b).max(initial=0) for a, b in zip(got[0]["values"], expected[0]["values"], strict=True)
        ),
        "loss": abs(got[0]["loss"] / expected[0]["loss"] - 1),
        "norm": abs(got[0]["norm"] / expected[0]["norm"] - 1),
        "gradients": max(
            ((got[1][name] - g).abs().max() / g.abs().max()).item() for name, g in expected[1].items()
        ),
    }


def test_values_and_gradients_equal_transformers_hidden_states_times_the_head(one_rank, model_dir):
    from transformers import AutoModel

    backbone = AutoModel.from_pretrained(model_dir, dtype=torch.float32)
    head = head_weight().squeeze(0).requires_grad_()
    loss, tokens = torch.zeros(()), sum(map(len, one_rank[0]["values"]))
    for one, measured in zip(sequences(), one_rank[0]["values"], strict=True):
        ids = torch.tensor([[*one.prompt, *one.response]])
        hidden = backbone(ids).last_hidden_state[0]
        expected = hidden[len(one.prompt) - 1 : -1] @ head  # the state BEFORE each response token
        assert torch.allclose(expected, torch.from_numpy(measured), atol=1e-5, rtol=0)
        t = torch.arange(len(expected))
        old, target = expected.detach() - 0.3 * torch.sin(t), torch.cos(t)
        near = old + (expected - old).clamp(-0.2, 0.2)
        loss = loss + torch.maximum((expected - target) ** 2, (near - target) ** 2).sum() / 2 / tokens
    (COEF * loss).backward()
    assert one_rank[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert 0 < one_rank[0]["clipped"] < tokens
    gradients = one_rank[1]
    assert torch.allclose(gradients["score.weight"], head.grad[None], atol=1e-6)
    embedding = backbone.get_input_embeddings().weight.grad
    assert torch.allclose(gradients["model.embed_tokens.weight"], embedding, atol=1e-6)
    assert "lm_head.weight" not in gradients


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "tp2+sp", "pp2", "cp2", "dp2"])
def test_every_layout_has_the_values_and_gradients_of_one_rank(pool2, one_rank, model_dir, layout):
    got = whole(pool2.run(measure, Layout.parse(layout), model_dir, head_weight(), timeout=60.0))
    found = errors(got, one_rank)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(
    ("layout", "mistake"), [("tp2+sp", "marked"), ("tp2", "summed"), ("tp2+sp", "summed scatter")]
)
def test_the_comparison_sees_a_doubled_gradient(pool2, one_rank, model_dir, layout, mistake):
    got = whole(pool2.run(measure, Layout.parse(layout), model_dir, head_weight(), mistake, timeout=60.0))
    assert errors(got, one_rank)["gradients"] > 0.1


def test_a_new_critic_says_zero_and_has_no_vocabulary_output(pool1, model_dir):
    names, new, dtype = pool1.run(inspect_new, model_dir, timeout=60.0)[0]
    assert not any("output_layer" in name for name in names)
    assert "value_head.weight" in names
    assert all((v == 0).all() for v in new)
    assert dtype == torch.float32


def inspect_new(model_dir: Path) -> tuple[list[str], list[np.ndarray], torch.dtype]:
    mesh = build_mesh(Layout(), timeout=60.0)
    try:
        critic = build_critic(model_dir, mesh, precision="bf16")
        new = values(critic, sequences(), shape_at(mesh))
        return list(global_parameters(critic.unwrapped)), new, critic.unwrapped[0].value_head.weight.dtype
    finally:
        destroy_mesh()


def test_a_damaged_directory_is_refused(pool1, model_dir, tmp_path):
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        pool1.run(inspect_new, tmp_path, timeout=60.0)
