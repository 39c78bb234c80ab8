"""PPO on Megatron, whole updates: the critic learns, ratios leave 1, clips act, at two layouts alike."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from torch import Tensor

from examples.arithmetic import main as write_task
from mcore_rl.algo.algorithms import configure
from mcore_rl.checkpoint import find
from mcore_rl.config import Config, load_config, notes
from mcore_rl.config.sections import CriticConfig
from mcore_rl.errors import ConfigError
from mcore_rl.log import StepLog, read_metrics
from mcore_rl.metric_names import meaning_of
from mcore_rl.model.residency import Residency
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import build_mesh, destroy_mesh
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.rollout.reply import ANY_VOCABULARY
from mcore_rl.training.assemble import build_models, build_run, waiting_parts
from mcore_rl.training.batch import RolloutBatch, build_batch
from mcore_rl.training.checkpoint import open_checkpoints, restore
from mcore_rl.training.critic import passes_of
from mcore_rl.training.loop import learn
from mcore_rl.training.metrics import ON_POLICY_RATIO, GradientAlert
from mcore_rl.training.run import Learner, Run
from mcore_rl.training.rundir import Identity
from mcore_rl.training.servers import Servers
from mcore_rl.training.session import examples, optimize
from mcore_rl.training.setup import build_trainer
from mcore_rl.training.supervised import supervised_metrics, supervised_update
from mcore_rl.training.trainer import Attempt
from mcore_rl.types import Group, Sample, VersionSpan
from mcore_rl.weights.buckets import gather
from mcore_rl.weights.disk import Disk

ROUNDS = 3
PPO = {
    "algorithm.name": "ppo",
    "algorithm.mini_batches": 2,
    "algorithm.epochs": 2,
    "algorithm.params.kl_in_reward": 0.1,
    "optimizer.lr": 5e-4,
    "critic.lr": 1e-2,
    "critic.warmup_rollouts": 1,
    "critic.warmup_epochs": 3,
    "algorithm.params.kl_target": 0.05,
    "algorithm.params.kl_horizon": 400,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """The arithmetic task with a model of one layer and random weights."""
    folder = tmp_path_factory.mktemp("ppo")
    small = ["--train", "40", "--eval", "5", "--layers", "2", "--hidden", "128"]
    assert write_task([str(folder), *small]) == 0
    keys = {
        "run.dir": folder / "run",
        "model.path": folder / "model",
        "model.random_init": "true",
        "data.train": folder / "train.jsonl",
        "rollout.prompts_per_step": 40,
        "train.steps": 10,
        "train.tokens_per_micro_batch": 1100,
        **PPO,
    }
    (folder / "empty.toml").touch()
    return load_config(folder / "empty.toml", [f"--{key}={value}" for key, value in keys.items()])


def attempt_of(checkpoints: Checkpoints | None = None, saved: Saved | None = None) -> Attempt:
    """A start that nobody watches and nobody ends."""
    return Attempt(saved, checkpoints, threading.Event(), lambda what: None, Identity("a test"))


@contextmanager
def built_run(config: Config, layout: Layout, directory: Path, saved: Path | None = None) -> Iterator[Run]:
    """A run without servers, for what was sampled is recorded; it saves where the config does.

    Args:
        saved: the checkpoint that it continues from.
    """
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": directory})})
    with ExitStack() as stack:
        mesh = build_mesh(layout, timeout=60.0)
        stack.callback(destroy_mesh)
        resume = None if saved is None else str(saved)
        checkpoints = stack.enter_context(open_checkpoints(config, mesh, resume))
        found = None if saved is None else find(saved.parent, str(saved))
        attempt = Attempt(found, checkpoints, threading.Event(), lambda what: None, Identity("a test"))
        trainer = build_trainer(config, mesh, attempt, 40)
        models = build_models(trainer, configure(config.algorithm.name, config.algorithm.params))
        restore(trainer, models.contents)
        residency = Residency(waiting_parts(config, models))
        transport, none = Disk(directory / "weights"), Fleet((), vocabulary=ANY_VOCABULARY)
        servers = Servers(mesh, none, trainer.step_log, trainer.timers, shared=False)
        yield build_run(trainer, models, residency, servers, transport, stack)


def recorded(run: Run) -> RolloutBatch:
    """8 groups of 2: random answers of 0-6 tokens, the reward of one tells how many are even digits."""
    rng, groups = np.random.default_rng(5), []
    prompts = run.trainer.prompts.first(8)
    for prompt in prompts:
        group, samples = f"{prompt.id}@1", []
        for k in range(2):
            n = 0 if prompt is prompts[0] and k == 0 else int(rng.integers(1, 7))
            tokens = tuple(rng.integers(2, 12, size=n).tolist())
            reward = float(np.mean([t % 2 == 0 for t in tokens])) if n else 0.0
            span = (VersionSpan("0", 0, n),)
            samples.append(
                Sample.of_response(f"{group}/{k}", prompt, tokens, (-2.5,) * n, "", "stop", span, reward)
            )
        groups.append(Group(group, tuple(samples)))
    return build_batch(groups)


def weights(run: Run) -> dict[str, Tensor]:
    policy = run.trainer.policy
    named = {name: p.detach() for name, p in global_parameters(policy.unwrapped).items()}
    return gather(named, policy.mapping, policy.mesh)


def train_on_recorded(config: Config, layout: Layout, directory: Path):
    """([metrics], [largest movement of any policy weight]) of rollouts that all bring the same batch."""
    with built_run(config, layout, directory) as run:
        batch, metrics, moved = recorded(run), [], []
        for step in range(1, ROUNDS + 1):
            before = weights(run)
            metrics.append(learn(run, batch, step).metrics)
            after = weights(run)
            moved.append(max(((after[n] - before[n]).abs().max().item() for n in after), default=0.0))
        return metrics, moved


@pytest.fixture(scope="module")
def tensor_parallel(pool2, config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tp2")
    return pool2.run(train_on_recorded, config, Layout(tensor=2), directory, timeout=100.0)


@pytest.mark.slow
def test_the_critic_learns_on_a_repeated_batch(tensor_parallel):
    metrics, _ = tensor_parallel[0]
    losses = [m["loss/value"] for m in metrics]
    assert losses[-1] < 0.5 * losses[0], losses
    assert metrics[-1]["value/explained_variance"] > metrics[0]["value/explained_variance"]
    assert all(m["grad_norm/critic"] > 0 for m in metrics)


@pytest.mark.slow
def test_only_the_critic_learns_in_the_warm_up(tensor_parallel):
    metrics, moved = tensor_parallel[0]
    assert moved[0] == 0.0
    assert "loss/policy" not in metrics[0]
    assert all(movement > 1e-4 for movement in moved[1:])
    assert all("loss/policy" in m for m in metrics[1:])


def test_ratios_leave_one_and_clips_act(tensor_parallel):
    for m in tensor_parallel[0][0][1:]:
        assert m["ratio/min"] < 0.8
        assert m["ratio/max"] > 1.2
        assert 0 < m["clip/fraction"] < 1
        assert m["value/clip_fraction"] >= 0
    assert any(m["value/clip_fraction"] > 0 for m in tensor_parallel[0][0])


def test_the_kl_is_adapted_to_its_target_once_the_policy_moves(tensor_parallel):
    metrics, _ = tensor_parallel[0]
    first, second, third = (m["kl/coefficient"] for m in metrics)
    assert metrics[0]["kl/response"] == pytest.approx(0, abs=1e-5)
    assert first == second == 0.1, "a policy that does not learn says nothing of the coefficient"
    assert third == pytest.approx(0.1 * (1 - 0.2 * 16 / 400)), "16 samples, no KL before the first update"
    assert abs(metrics[2]["kl/response"]) > 0.05
    tokens, responses = metrics[2]["tokens"], metrics[2]["samples"]
    assert metrics[2]["kl/reward"] * tokens == pytest.approx(metrics[2]["kl/response"] * responses)


def test_a_warm_up_has_passes_of_its_own_and_returns_of_rewards_alone(tensor_parallel):
    metrics, _ = tensor_parallel[0]
    assert metrics[0]["return/mean"] == pytest.approx(metrics[0]["reward/mean"], abs=0.2)
    assert [passes_of(CriticConfig(warmup_rollouts=2, warmup_epochs=3), 2, n) for n in (1, 2, 3)] == [3, 3, 2]
    assert passes_of(CriticConfig(warmup_rollouts=2), 2, 1) == 2


def test_the_reference_stays_where_the_policy_started(tensor_parallel):
    metrics, _ = tensor_parallel[0]
    assert 0 < metrics[1]["kl/reference"] < metrics[2]["kl/reference"]


def test_every_rank_knows_the_same_metrics(tensor_parallel):
    assert tensor_parallel[0][0] == tensor_parallel[1][0]
    names = {name for step in tensor_parallel[0][0] for name in step}
    assert [name for name in sorted(names) if meaning_of(name) is None] == []


@pytest.mark.slow
def test_data_parallel_replicas_take_the_same_steps(pool2, config, tensor_parallel, tmp_path):
    """Advantages, whitening and both losses do not depend on who holds a sample, 12 updates later."""
    metrics, moved = pool2.run(train_on_recorded, config, Layout(data=2), tmp_path, timeout=100.0)[0]
    for mine, theirs in zip(metrics, tensor_parallel[0][0], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=5e-4, abs=2e-5), name
    assert metrics[1]["loss/value"] != pytest.approx(
        metrics[2]["loss/value"], rel=2e-3
    )  # the numbers do move
    assert moved[0] == 0.0


def supervised_step(config: Config, directory: Path) -> dict[str, float]:
    """One supervised step of 8 labels, asserted against the exact bound inside."""
    mesh = build_mesh(Layout(tensor=2), timeout=60.0)
    try:
        run = config.run.model_copy(update={"dir": directory, "kind": "sft"})
        batch = config.supervised.model_copy(update={"batch_size": 8})
        attempt = Attempt(None, None, threading.Event(), lambda what: None, Identity("a test"))
        trainer = build_trainer(
            config.model_copy(update={"run": run, "supervised": batch}), mesh, attempt, 10
        )
        rows = examples(trainer.prompts.prompts[:8])
        update = supervised_update(trainer.optimizer, trainer.shape, rows, 1)
        return supervised_metrics(optimize(update, Residency({}), lambda update: "")[0], rows)
    finally:
        destroy_mesh()


def test_a_supervised_step_logs_the_gradient_scale(pool2, config, tmp_path):
    metrics = pool2.run(supervised_step, config, tmp_path, timeout=60.0)[0]
    assert 0 < metrics["head/grad_measured"] < 1
    assert metrics["head/grad_ratio"] == pytest.approx(
        metrics["head/grad_measured"] / metrics["head/grad_predicted"]
    )


def test_the_alert_comes_once_when_the_ratio_stays_high():
    alert = GradientAlert()
    high, low = {ON_POLICY_RATIO: 1.2}, {ON_POLICY_RATIO: 1.0}
    rollouts = [high] * 4 + [low] + [high] * 7 + [{}] + [high] * 5
    due = [i for i, metrics in enumerate(rollouts) if alert.due(metrics)]
    assert due == [9, 17]


def test_a_ratio_that_stays_high_is_one_event(tmp_path: Path):
    nothing = lambda *_: None  # noqa: E731
    trainer = SimpleNamespace(log=nothing, step_log=StepLog(tmp_path))
    run = SimpleNamespace(trainer=trainer, mismatch=SimpleNamespace(notice=nothing), alert=GradientAlert())
    for step in range(1, 13):
        Learner.log(cast(Learner, run), step, {ON_POLICY_RATIO: 1.2})
    events = read_metrics(tmp_path / "events.jsonl")
    assert [(e["kind"], e["step"], e["ratio"]) for e in events] == [("gradient_scale", 5, 1.2)]


def test_critic_settings_without_a_critic_are_refused(config):
    path = config.model.path.parent / "empty.toml"
    keys = [f"--{k}=x" for k in ("run.dir", "model.path", "data.train")] + ["--train.steps=5"]
    assert notes(load_config(path, [*keys, "--critic.lr=1e-3"])) == [
        "critic.lr: has no effect because gspo has no critic"
    ]
    load_config(path, [*keys, "--critic.lr=1e-3", "--algorithm.name=ppo"])
    with pytest.raises(ConfigError, match=r"critic\.warmup_rollouts: .*raise train\.steps"):
        load_config(path, [*keys, "--critic.warmup_rollouts=5", "--algorithm.name=ppo"])
