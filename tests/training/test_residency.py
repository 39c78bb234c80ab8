"""What waits in host memory: the same training bit for bit, and never more on the device than planned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mcore_rl.config import Config
from mcore_rl.config.state import ResidencyConfig as Where
from mcore_rl.metric_names import MEASURED
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.phases import NEEDED, PHASES
from mcore_rl.model.residency import Offloaded, state_of, storages, weights_of
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.pool import Pool
from mcore_rl.plan.memory import stage_memory
from mcore_rl.plan.work import work_of
from mcore_rl.training.batch import token_sequences
from mcore_rl.training.loop import learn
from mcore_rl.training.model_passes import log_probs
from mcore_rl.training.run import Run
from tests.training.test_ppo import built_run, config, recorded, weights

__all__ = ["config"]

WHERE = {
    "resident": Where(),
    "offloaded": Where(reference="offloaded", critic="offloaded", optimizer="offloaded"),
    "swapped": Where(reference="swapped", critic="resident", optimizer="offloaded"),
}
VARIANTS = [("resident", "bf16"), ("offloaded", "bf16"), ("resident", "fp32"), ("swapped", "fp32")]


def with_residency(config: Config, where: str, precision: str) -> Config:
    model = config.model.model_copy(update={"precision": precision})
    critic = config.critic.model_copy(update={"warmup_rollouts": 0})
    return config.model_copy(update={"residency": WHERE[where], "model": model, "critic": critic})


def on_device(tensors: Iterable[Tensor]) -> int:
    """Bytes of those tensors whose storage is not empty."""
    found = {(t.untyped_storage()._cdata, t.storage_offset()): t for t in tensors}
    return sum(t.numel() * t.element_size() for t in found.values() if t.untyped_storage().nbytes())


def sizes(run: Run) -> int:
    """Bytes of models, gradients and optimizer states here, less the padding of Megatron's buffers."""
    assert run.critic is not None
    assert run.reference is not None
    models = [run.trainer.policy, run.critic.model]
    tensors = [
        t for model in {id(m): m for m in (*models, run.reference)}.values() for t in weights_of(model)
    ]
    tensors += [p.main_grad for m in models for chunk in m.unwrapped for p in chunk.parameters()]
    return on_device([*tensors, *state_of(run.trainer.optimizer), *state_of(run.critic.optimizer)])


def trained(config: Config, directory: Path) -> dict[str, Any]:
    with built_run(config, Layout(), directory) as run:
        policy, shape = run.trainer.policy, run.trainer.shape
        batch = recorded(run)
        sequences = token_sequences(batch.samples)
        before = log_probs(policy, sequences, shape, 1.0)
        metrics = [learn(run, batch, step).metrics for step in (1, 2)]
        with run.residency.during("reference"):
            assert run.reference is not None
            reference = log_probs(run.reference, sequences, shape, 1.0)
        after = log_probs(policy, sequences, shape, 1.0)
        held = {}
        for phase in PHASES:
            with run.residency.during(phase):
                held[phase] = sizes(run)
        with run.residency.during("save"):
            states = [t.clone() for o in run.contents.optimizers.values() for t in state_of(o)]
            final = weights(run)
        return {
            "metrics": metrics,
            "weights": final,
            "states": states,
            "scored": [torch.cat([torch.from_numpy(x) for x in s]) for s in (before, reference, after)],
            "sizes": held,
            "idle": sizes(run),
            "host": sum(part.host_bytes for part in run.residency.parts.values()),
        }


@pytest.fixture(scope="module")
def runs(pool1: Pool, config: Config, tmp_path_factory) -> dict[tuple[str, str], Any]:
    folder = tmp_path_factory.mktemp("residency")
    return {
        variant: pool1.run(trained, with_residency(config, *variant), folder / "-".join(variant))[0]
        for variant in VARIANTS
    }


def timeless(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in one.items() if not k.startswith(MEASURED)} for one in metrics]


@pytest.mark.slow
@pytest.mark.parametrize(("where", "precision"), [("offloaded", "bf16"), ("swapped", "fp32")])
def test_training_is_the_same_bit_for_bit(runs, where: str, precision: str) -> None:
    here, there = runs["resident", precision], runs[where, precision]
    assert timeless(here["metrics"]) == timeless(there["metrics"])
    assert here["weights"].keys() == there["weights"].keys()
    assert all(torch.equal(here["weights"][name], there["weights"][name]) for name in here["weights"])
    assert len(here["states"]) == len(there["states"]) > 0
    assert all(torch.equal(a, b) for a, b in zip(here["states"], there["states"], strict=True))
    for a, b in zip(here["scored"], there["scored"], strict=True):
        assert torch.equal(a, b)
    before, reference, after = there["scored"]
    assert torch.equal(before, reference)
    assert not torch.equal(reference, after)  # the policy has learned


@pytest.mark.slow
def test_every_phase_holds_what_is_planned(runs, config: Config) -> None:
    arch = read_architecture(config.model.path)
    for (where, precision), run in runs.items():
        at = with_residency(config, where, precision)
        (planned,) = stage_memory(arch, Layout(), work_of(at))
        state = replace(planned, activations=0, layer_backward=0, head=0, critic_step=0, publish=0, other=0)
        assert run["sizes"] == {phase: state.at(phase) for phase in PHASES}, (where, precision)
        assert run["idle"] == state.at("publish")
        assert (run["idle"] == state.at("save")) is (where == "resident")
        assert (planned.host > 0) is (where != "resident")
        # Megatron pads its buffers, which are copied whole.
        assert planned.host <= run["host"] <= 1.01 * planned.host


def test_a_tensor_leaves_and_comes_back_with_all_its_views() -> None:
    whole = torch.randn(1000)
    view, other = whole[10:20].view(2, 5), torch.randn(3, 7)
    scratch = torch.ones(64)
    copies = [t.clone() for t in (whole, view, other)]
    part = Offloaded(lambda: [view, other, whole], lambda: [scratch])
    assert [s.nbytes() for s in storages([whole, other, scratch], empty=True)] == [0, 0, 0]
    assert part.host_bytes == 4000 + 84
    with part.resident(), part.resident():
        assert all(torch.equal(a, b) for a, b in zip(copies, (whole, view, other), strict=True))
        assert not scratch.any()
        view += 1
    assert whole.untyped_storage().nbytes() == 0
    with part.resident():
        assert torch.equal(view, copies[1] + 1)
        assert torch.equal(whole[10:20].view(2, 5), view)


def test_what_is_constant_is_copied_once() -> None:
    weight = torch.ones(5)
    part = Offloaded(lambda: [weight], constant=True)
    with part.resident():
        weight += 1  # against the promise: it is forgotten
    with part.resident():
        assert torch.equal(weight, torch.ones(5))


def test_every_phase_of_the_table_is_a_phase() -> None:
    assert set().union(*NEEDED.values()) <= set(PHASES)
