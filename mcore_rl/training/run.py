"""What a reinforcement-learning run is: what trains a step's groups, and what it samples them from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mcore_rl.algo.algorithms import Algorithm
from mcore_rl.model.build import Model
from mcore_rl.model.optimizer import Optimizer
from mcore_rl.model.residency import Residency
from mcore_rl.training.checkpoint import Contents
from mcore_rl.training.evaluate import Evaluator
from mcore_rl.training.generation import Generation
from mcore_rl.training.greedy import GreedyAnswers
from mcore_rl.training.keep_rollouts import DumpWriter
from mcore_rl.training.kl_control import KLControl
from mcore_rl.training.metrics import ON_POLICY_RATIO, GradientAlert, Work
from mcore_rl.training.mismatch import Mismatch
from mcore_rl.training.objective import PolicyObjective, ValueObjective
from mcore_rl.training.publish import Publisher
from mcore_rl.training.rewards import RewardSource
from mcore_rl.training.roles import RoleBaselines
from mcore_rl.training.servers import Servers
from mcore_rl.training.trainer import Trainer


@dataclass(frozen=True)
class Critic:
    """The value model in training."""

    model: Model
    optimizer: Optimizer
    objective: ValueObjective


@dataclass(frozen=True)
class Learner:
    """What trains the groups of a step, wherever they come from."""

    trainer: Trainer
    algorithm: Algorithm
    objective: PolicyObjective
    reference: Model | None
    """the frozen starting policy, where the algorithm needs one"""
    critic: Critic | None
    """where the algorithm needs one"""
    residency: Residency
    """what of the models is on the device, and when"""
    contents: Contents
    """what a checkpoint of the run holds"""
    alert: GradientAlert
    kl: KLControl
    """the coefficient of the KL in the reward"""
    roles: RoleBaselines
    """the running means that self-play compares with"""
    mismatch: Mismatch
    """what follows where servers and trainer disagree"""
    dumps: DumpWriter
    """keeps rollouts on disk"""

    def log(self, step: int, metrics: Mapping[str, float | str], work: Work | None = None) -> None:
        """Log a step, and what its `work` cost.

        A gradient scale out of bounds is an event too, and so is a mismatch to the servers.
        """
        self.trainer.log(step, metrics, work)
        self.mismatch.notice(step, metrics)
        if self.alert.due(metrics):
            self.trainer.step_log.event("gradient_scale", step=step, ratio=metrics[ON_POLICY_RATIO])


@dataclass(frozen=True)
class Run(Learner):
    """What the loop needs besides: what it samples from, and how new weights get there."""

    rewards: RewardSource
    """gives every sample its reward"""
    evaluator: Evaluator
    """samples and scores the held-out sets"""
    servers: Servers
    publisher: Publisher
    """hands them new weights"""
    greedy: GreedyAnswers
    """asks for what ReMax compares with"""
    generation: Generation
    """asks the servers for what is trained"""

    def log(self, step: int, metrics: Mapping[str, float | str], work: Work | None = None) -> None:
        """Log a step as a Learner does, and what became of the samples that were asked and scored."""
        more = {**self.generation.metrics, **self.rewards.take_metrics()}
        super().log(step, {**metrics, **more}, work)
