"""What a backward pass computes again: the same gradients bit by bit, of fewer numbers that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from mcore_rl.data.packing import pack
from mcore_rl.model import again
from mcore_rl.model.again import kept_as_noted, noted
from mcore_rl.model.build import Model, build_policy
from mcore_rl.model.optimizer import ddp_config
from mcore_rl.model.rotary import turn
from mcore_rl.model.step import forward_backward
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from tests.model.conftest import save
from tests.model.families import FAMILIES
from tests.model.support import at_layout, sequences

CASES = ("llama", "gemma3", "qwen2_moe")
"""a dense one; norms whose weights are stored less 1; experts, shared ones and a dense layer"""


class _LogProbs:
    """Minus the sum of log-probs, by parts of the rows."""

    def rowwise(self, batch) -> bool:
        return True

    def __call__(self, batch, output):
        return -output.log_prob.sum(), dict


def gradients(model: Model) -> tuple[dict[str, Tensor], int]:
    """Of two micro-batches, the second shorter, and the bytes that autograd keeps of them."""
    for chunk in model.chunks:
        chunk.zero_grad_buffer()  # pyright: ignore[reportCallIssue]
    kept: dict[int, torch.UntypedStorage] = {}

    def look(x: Tensor) -> Tensor:
        if x.is_leaf:
            return x
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held: no address comes twice
        return x.detach()

    some = sequences(6)
    batches = [pack(some[:4], range(4), {}, align=4), pack(some[4:], range(2), {}, align=4)]
    with torch.autograd.graph.saved_tensors_hooks(look, lambda x: x):
        forward_backward(model, batches, _LogProbs(), 1.0)
    named = global_parameters(model.unwrapped)
    return {name: p.main_grad.clone() for name, p in named.items()}, sum(x.nbytes() for x in kept.values())  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def keeping_all(x: Tensor) -> Iterator[None]:
    """In the place of `kept_as_noted`: nothing is computed again."""
    yield


def compared(mesh: Mesh, directory: Path) -> tuple[list[str], list[str], float]:
    """Names of gradients that differ from those where all is kept; with wrong notes; what is kept, of all."""
    model = build_policy(directory, mesh, ddp=ddp_config(distributed=False))
    ours, kept = gradients(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(again, "kept_as_noted", keeping_all)
        expected, everything = gradients(model)
    with pytest.MonkeyPatch.context() as patch:
        right = again._made
        patch.setattr(again, "_made", lambda *how: 1.5 * right(*how))
        wrong, _ = gradients(model)

    def unequal(found: dict[str, Tensor]) -> list[str]:
        return [name for name, value in expected.items() if not torch.equal(found[name], value)]

    # An expert may have seen no token.
    assert sum(bool(value.any()) for value in expected.values()) > len(expected) / 2
    return unequal(ours), unequal(wrong), kept / everything


@pytest.mark.parametrize("family", CASES)
def test_gradients_are_the_same_bits(pool1: Pool, tmp_path: Path, family: str) -> None:
    kind, fields = FAMILIES[family]
    config = getattr(transformers, kind)(**fields)
    directory = save(AutoModelForCausalLM.from_config, config, tmp_path / "model")
    [(ours, wrong, share)] = at_layout(pool1, "dp1", compared, directory)
    assert ours == []
    assert any("linear_fc2" in name for name in wrong) == (family != "gemma3"), "its GELU is not noted"
    assert share < (0.75 if family == "llama" else 0.95)
    assert any("linear_qkv" in name for name in wrong), wrong
    assert any("linear_proj" in name for name in wrong), wrong


def test_gradients_are_the_same_bits_where_tokens_are_cut(pool2: Pool, dense_dir: Path) -> None:
    for ours, wrong, _ in at_layout(pool2, "tp2sp", compared, dense_dir):
        assert ours == []
        assert wrong


def test_only_what_is_noted_is_made_again() -> None:
    x = torch.randn(3, 4).requires_grad_()
    weight = torch.randn(4, 4).requires_grad_()
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(x.requires_grad)
        return 2 * x

    y = noted(double(x), double, x)
    with kept_as_noted(y):
        out = y @ weight
    out.sum().backward()
    assert calls == [True, False], "once forward, once in the backward pass, of what needs no gradient"
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, (2 * x.detach()).sum(0)[:, None].expand(4, 4))
    with torch.no_grad():
        assert not hasattr(noted(double(x), double, x), again._NOTE)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_turn_and_its_gradient_are_those_of_the_plain_formula(
    interleaved: bool, dtype: torch.dtype
) -> None:
    """To the bit, but for the sign of a zero."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(7, 1, 3, 8, generator=generator).to(dtype) for _ in range(2))
    angles = 3 * torch.randn(7, 1, 1, 8, generator=generator)

    def plain(x: Tensor) -> Tensor:
        cosines, sines = ((f(angles) * 1.25).to(dtype) for f in (torch.cos, torch.sin))
        if interleaved:
            across = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        else:
            first, second = x.chunk(2, dim=-1)
            across = torch.cat((-second, first), dim=-1)
        return x * cosines + across * sines

    answers = []
    for function in (plain, lambda x: turn(x, angles, interleaved=interleaved, scale=1.25)):
        leaf = x.clone().requires_grad_()
        out = function(leaf)
        answers.append((out.detach(), *torch.autograd.grad(out, leaf, grad)))
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(turn(x, angles, interleaved=not interleaved, scale=1.25), answers[0][0])
