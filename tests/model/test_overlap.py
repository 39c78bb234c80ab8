"""Gradients reduced and weights gathered beside the passes: the updates of none, bit for bit.

And `optimizer.cpu_fraction`: Adam's own numbers, wherever the update is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import optimizer_config
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer
from torch import Tensor

from mcore_rl.errors import ConfigError
from mcore_rl.lora import Lora
from mcore_rl.model.build import Model, build_critic, build_policy
from mcore_rl.model.optimizer import Optimizer, build_optimizer, ddp_config
from mcore_rl.model.step import forward_backward
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.training.batch import pack_share
from mcore_rl.training.supervised import NegativeLogLikelihood
from mcore_rl.types import PackedBatch
from tests.model.support import at_layout, sequences, shape_at

UPDATES = 3
"""Megatron begins to reduce beside the backward pass in the second one, whose order the first has shown."""


def learn(model: Model, optimizer: Optimizer, experts: Sequence[int] = ()) -> float:
    """One update; its gradient norm. `experts`: the only ones that tokens of the last micro-batch go to."""
    optimizer.zero_grad()
    scored = sequences()
    weight = [1.0 / sum(one.scored for one in scored)] * len(scored)
    batches = pack_share(scored, {"weight": weight}, shape_at(model.mesh), model.mesh)
    assert len(batches) > 1
    if experts:
        batches = [*batches[:-1], sent_to(batches[-1], experts)]
    forward_backward(model, batches, NegativeLogLikelihood(), 1.0)
    return optimizer.step()


def sent_to(batch: PackedBatch, experts: Sequence[int]) -> PackedBatch:
    """The micro-batch whose tokens go to `experts` in each of the model's two layers."""
    chosen = torch.tensor(experts, dtype=torch.int16).expand(batch.tokens.numel(), 2, -1)
    return replace(batch, experts=chosen.clone())


def updated(
    mesh: Mesh,
    directory: Path,
    overlap: bool,
    gathers: bool = True,
    distributed: bool = True,
    experts: Sequence[int] = (),
    lora: Lora | None = None,
    bucket_size: int | None = None,
    precision: str = "fp32",
    **numbers: Any,
) -> dict[str, Tensor]:
    """This rank's parameters, and the gradient norms, after some updates."""
    ddp = replace(ddp_config(distributed=distributed, overlap=overlap), bucket_size=bucket_size)
    model = build_policy(directory, mesh, ddp=ddp, lora=lora, precision=precision)
    optimizer = build_optimizer(model, lr=1e-2, distributed=distributed, precision=precision, **numbers)
    norms = [learn(model, optimizer, experts) for _ in range(UPDATES)]
    if gathers:
        model.gather()
    named = {name: p.detach().clone() for chunk in model.unwrapped for name, p in chunk.named_parameters()}
    return named | {"norms": torch.tensor(norms, dtype=torch.float64)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_overlapped_updates_are_the_same_bit_for_bit(pool2: Pool, dense_dir: Path) -> None:
    plain = at_layout(pool2, "dp2", updated, dense_dir, False)
    beside = at_layout(pool2, "dp2", updated, dense_dir, True)
    assert same(plain[0], plain[1])
    assert all(map(same, plain, beside))
    ungathered = at_layout(pool2, "dp2", updated, dense_dir, True, False)
    assert not same(plain[0], ungathered[0])  # negative control: what a reader would get without `gather`


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The next bucket's parameter all-gather")
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_every_weight_is_waited_for(pool2: Pool, kind: str, request) -> None:
    """Of a large model, whose weights are gathered in many parts: here each in one of its own.

    Without overlap Megatron makes one part of all, so that the parts of the norm are added in another order.
    """
    directory: Path = request.getfixturevalue(f"{kind}_dir")
    work = partial(updated, bucket_size=1, clip_grad=0.0)
    plain, beside = (at_layout(pool2, "dp2", work, directory, overlap) for overlap in (False, True))
    for one, other in zip(plain, beside, strict=True):
        torch.testing.assert_close(one.pop("norms"), other.pop("norms"), rtol=1e-6, atol=0.0)
        assert same(one, other)


def test_without_a_distributed_optimizer(pool2: Pool, dense_dir: Path) -> None:
    plain, beside = (
        at_layout(pool2, "dp2", updated, dense_dir, overlap, True, False) for overlap in (False, True)
    )
    assert same(plain[0], plain[1])
    assert all(map(same, plain, beside))


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
@pytest.mark.parametrize("experts", [(0, 1), (1, 2)], ids=["of one rank", "one each"])
@pytest.mark.slow
def test_experts_without_a_token(pool2: Pool, moe_dir: Path, experts: tuple[int, int], distributed: bool):
    """In the last micro-batch, of which reduction begins: their gradients come all the same."""
    plain, beside = (
        at_layout(pool2, "ep2", updated, moe_dir, overlap, True, distributed, experts)
        for overlap in (False, True)
    )
    assert all(map(same, plain, beside))
    assert not same(beside[0], at_layout(pool2, "ep2", updated, moe_dir, True, True, distributed)[0])


def test_adapters_of_experts(pool2: Pool, moe_dir: Path) -> None:
    """Those of experts without a token among them."""
    lora = Lora(2, 4.0, ("qkv", "experts"))
    plain, beside = (
        at_layout(pool2, "ep2", updated, moe_dir, overlap, True, True, (0, 1), lora)
        for overlap in (False, True)
    )
    assert all(map(same, plain, beside))
    assert any("adapter" in name for name in plain[0])


# --- the CPU's share of Adam --------------------------------------------------------------------------------


def refused(mesh: Mesh, directory: Path) -> str:
    """What is said of a critic, whose value head is float32 beside layers in bf16."""
    critic = build_critic(directory, mesh, precision="bf16", ddp=ddp_config())
    with pytest.raises(ConfigError) as found:
        build_optimizer(critic, lr=1e-3, precision="bf16", cpu_fraction=0.5)
    return str(found.value)


def test_a_value_head_is_not_left_out_of_a_shared_update(pool1: Pool, dense_dir: Path) -> None:
    assert "which value heads have" in at_layout(pool1, "tp1", refused, dense_dir)[0]


@contextmanager
def hybrid_on_a_host() -> Iterator[list[tuple[int, int]]]:
    """Megatron's hybrid optimizer tells the device's tensors from the host's, where all are of the host.

    Those are the host's that it has pinned. Yields, of each, how many it took (there, on the device).
    """
    taken: list[tuple[int, int]] = []
    divide = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def pinned(tensor: Any) -> Tensor:
        tensor.is_pinned_here = True
        return tensor

    def carried(method: Callable[..., Any]) -> Callable[..., Tensor]:
        """What a method makes of the host's tensor is the host's."""
        return lambda tensor: pinned(method(tensor)) if hasattr(tensor, "is_pinned_here") else method(tensor)

    def divided(self: Any, fraction: float) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            on_device = property(lambda tensor: not hasattr(tensor, "is_pinned_here"))
            patch.setattr(torch.Tensor, "is_cuda", on_device, raising=False)
            patch.setattr(torch.Tensor, "pin_memory", pinned)
            for method in ("detach", "clone", "float"):
                patch.setattr(torch.Tensor, method, carried(getattr(torch.Tensor, method)))
            found = divide(self, fraction)
        self.pin_cpu_grads = False
        there, here = (sum(len(group["params"]) for group in groups) for groups in found[:2])
        taken.append((there, here))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", divided)
        patch.setattr(optimizer_config, "is_te_min_version", lambda *_: False)
        yield taken


def shared_update(mesh: Mesh, directory: Path, overlap: bool, settings: dict[str, Any]) -> dict[str, Tensor]:
    with hybrid_on_a_host() as taken:
        found = updated(mesh, directory, overlap, **settings)
    fraction = settings["cpu_fraction"]
    if fraction:
        there, here = map(sum, zip(*taken, strict=True))
        assert there > 0
        assert (here == 0) is (fraction == 1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "ranks"), [("tp1", 1), ("dp2", 2)])
def test_what_the_cpu_updates_is_the_same(request, layout: str, ranks: int, dense_dir: Path) -> None:
    pool: Pool = request.getfixturevalue(f"pool{ranks}")

    def after(fraction: float, **numbers: Any) -> dict[str, Tensor]:
        settings = {"cpu_fraction": fraction, "precision": "bf16", "weight_decay": 0.1, **numbers}
        return at_layout(pool, layout, shared_update, dense_dir, ranks > 1, settings)[0]

    plain = after(0.0)  # clipped: the norms are above 1
    assert plain["norms"].min() > 1
    for fraction in (0.5, 1.0):
        for name, weight in after(fraction).items():
            torch.testing.assert_close(weight, plain[name], rtol=2**-7, atol=1e-6, msg=f"{fraction}: {name}")
    other = after(1.0, beta2=0.9)  # negative control
    assert max((other[name] - plain[name]).abs().max().item() for name in plain) > 1e-4
