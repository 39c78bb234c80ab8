"""What a reinforcement-learning run is: a trainer, the models it scores with, and what it samples from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mcore_rl.algo.algorithms import Algorithm
from mcore_rl.model.build import Model
from mcore_rl.model.optimizer import Optimizer
from mcore_rl.model.residency import Residency
from mcore_rl.training.checkpoint import Contents
from mcore_rl.training.evaluate import Evaluation
from mcore_rl.training.generation import Generation
from mcore_rl.training.metrics import ON_POLICY_RATIO, GradientAlert
from mcore_rl.training.mismatch import Mismatch
from mcore_rl.training.objective import PolicyObjective, ValueObjective
from mcore_rl.training.rewards import RewardSource
from mcore_rl.training.servers import Servers
from mcore_rl.training.throughput import Work
from mcore_rl.training.trainer import Trainer
from mcore_rl.weights.transport import Transport


@dataclass(frozen=True)
class Critic:
    """The value model in training."""

    model: Model
    optimizer: Optimizer
    objective: ValueObjective


@dataclass(frozen=True)
class Run:
    """What the loop needs."""

    trainer: Trainer
    algorithm: Algorithm
    objective: PolicyObjective
    reference: Model | None
    """the frozen starting policy, where the algorithm needs one"""
    critic: Critic | None
    """where the algorithm needs one"""
    rewards: RewardSource
    """gives every sample its reward"""
    evaluation: Evaluation
    servers: Servers
    transport: Transport
    """how versions reach the servers"""
    generation: Generation
    """asks the servers for what is trained"""
    residency: Residency
    """what of the models is on the device, and when"""
    contents: Contents
    """what a checkpoint of the run holds"""
    alert: GradientAlert
    mismatch: Mismatch
    """what follows where servers and trainer disagree"""

    def log(self, step: int, metrics: Mapping[str, float | str], work: Work | None = None) -> None:
        """Log a step, and what its `work` cost.

        A gradient scale out of bounds is an event too, and so is a mismatch to the servers.
        """
        metrics = {**metrics, **self.generation.metrics, **self.rewards.take_metrics()}
        self.trainer.log(step, metrics, work)
        self.mismatch.notice(step, metrics)
        if self.alert.due(metrics):
            self.trainer.step_log.event("gradient_scale", step=step, ratio=metrics[ON_POLICY_RATIO])

    @property
    def temperature(self) -> float:
        """Of sampling, and therefore of every log-prob."""
        return self.trainer.config.rollout.temperature

    def probe_prompts(self) -> list[tuple[int, ...]]:
        """Token sequences for the check of the first publish, before anything was sampled."""
        prompts = self.trainer.prompts.prompts[: self.trainer.config.publish.probe_sequences]
        return [prompt.token_ids for prompt in prompts]
