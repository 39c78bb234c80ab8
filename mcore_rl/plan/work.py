"""What one step of a config asks for, in numbers that memory and time follow from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np

from mcore_rl.algo.algorithms import ALGORITHMS, configure
from mcore_rl.config import Config
from mcore_rl.data.balance import ModelShape, forward_flops
from mcore_rl.lora import Lora
from mcore_rl.model.hf.architecture import Architecture, read_architecture
from mcore_rl.parallel.layout import Layout
from mcore_rl.precision import DEFAULT_FP8, Fp8
from mcore_rl.training.layout import fp8_of, lora_of
from mcore_rl.training.shape import shape_of


@dataclass(frozen=True)
class PlannedStep:
    """One rollout step, or one batch of training without rollouts."""

    samples: int
    prompt_tokens: float
    """mean of a training sequence, as those of the response"""
    response_tokens: float
    """mean"""
    longest_response: int
    longest: int
    """tokens of the longest sequence that is allowed"""
    mini_batches: int
    """optimizer steps per pass over the samples"""
    epochs: int
    tokens_per_micro_batch: int
    precision: str
    recompute: str
    distributed_optimizer: bool
    reference: bool
    critic: Architecture | None
    critic_flops: float
    """FLOPs of its forward pass over a step, the policy's taken as 1"""
    reward_model: Architecture | None
    """a frozen model on the training ranks"""
    reward_flops: float
    """FLOPs of its forward pass over a token, the policy's taken as 1"""
    colocated: bool
    """the servers run on the training GPUs"""
    generates: bool
    old_log_prob_share: float
    """share of the samples that get a forward pass of the policy before the updates"""
    segments: float = 1.0
    """mean number of training sequences of a sample"""
    greedy: int = 0
    """answers that a step asks the servers for besides its samples, to compare with; they are not trained"""
    energy_share: float = 0.0
    """share of the samples that get one more forward pass of the policy, at half the temperature"""
    fp8: Fp8 = DEFAULT_FP8
    offloaded: frozenset[str] = frozenset()
    """parts (phases.NEEDED) that leave the GPU"""
    swapped: bool = False
    """the reference is the policy with its first weights"""
    value_head: bool = False
    """what is trained ends in a value head in the place of its output layer: a reward model"""
    teachers: tuple[Architecture, ...] = ()
    """frozen models that a student is compared with, over the whole vocabulary"""
    teacher_flops: float = 0.0
    """FLOPs of their forward passes over the tokens of a step, the student's taken as 1"""
    lora: Lora | None = None
    """what is trained beside frozen weights"""
    bucket_bytes: int = 0
    """bytes of a bucket of weights on its way to the servers; 0 where they go by disk"""
    staleness: int = 0
    """versions that a trained token may be old; above 0, generation runs beside training"""
    cpu_fraction: float = 0.0
    """share of the optimizer's state that is in host memory"""

    @property
    def sequences(self) -> float:
        """Training sequences of one step: every segment of every sample."""
        return self.samples * self.segments

    @property
    def tokens(self) -> float:
        """Tokens of one step, prompts included."""
        return self.sequences * (self.prompt_tokens + self.response_tokens)

    def micro_batches(self, layout: Layout) -> int:
        """Micro-batches of one optimizer step on one replica, when every one is full."""
        tokens = self.tokens / self.mini_batches / layout.data
        filled = ceil(tokens / self.tokens_per_micro_batch)
        multiple = layout.pipeline if layout.virtual_pipeline else 1
        return max(1, ceil(filled / multiple)) * multiple

    def bubble(self, layout: Layout) -> float:
        """Share of a pipeline's time that a stage waits (arXiv 2104.04473, section 2.2)."""
        idle = (layout.pipeline - 1) / (layout.virtual_pipeline or 1)
        return idle / (self.micro_batches(layout) + idle)

    def forward_flops(self, shape: ModelShape) -> float:
        """FLOPs of one forward pass over all sequences of a step; only response tokens reach the head."""
        length = self.prompt_tokens + self.response_tokens
        scored = np.array([self.response_tokens])
        return self.sequences * float(forward_flops(np.array([length]), shape, scored)[0])


def work_of(
    config: Config,
    *,
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
    segments: float | None = None,
    colocated: bool = False,
) -> PlannedStep:
    """The work of one step of `config`; mean lengths that are not given are the config's limits.

    Args:
        segments: mean number of training sequences of a sample; one, where it is not given.
    """
    r, a = config.rollout, config.algorithm
    supervised, rl = config.trains_on_rows, config.run.kind == "rl"
    algorithm = configure(a.name, a.params, a.loss) if rl else ALGORITHMS["grpo"]
    reward = config.reward.model if rl else None
    critic = (config.critic.path or config.model.path) if rl and algorithm.needs_critic else None
    policy = _flops_of(config.model.path)
    prompt = config.data.max_prompt_tokens if prompt_tokens is None else prompt_tokens
    # of an environment's rollout, everything behind the prompt: responses and what was observed
    plays = config.environment.function is not None
    behind = config.environment.max_tokens - config.data.max_prompt_tokens if plays else r.max_new_tokens
    response = behind if response_tokens is None else response_tokens
    # one that values prompts sees each of them once, and no response
    share = prompt / (prompt + response) / r.samples_per_prompt if algorithm.values_prompts else 1.0
    compared = config.run.kind == "preference"
    pairs = config.run.kind == "reward_model" or (compared and config.preference.loss != "kto")
    answers = 2 if pairs else 1
    teachers = list(config.distill.teachers.values())
    all_old = a.epochs > 1 or algorithm.needs_old
    return PlannedStep(
        samples=config.supervised.batch_size * answers
        if supervised
        else r.prompts_per_step * r.samples_per_prompt,
        prompt_tokens=prompt,
        response_tokens=response,
        longest_response=behind,
        longest=config.data.max_prompt_tokens + behind,
        mini_batches=a.mini_batches if rl else 1,
        epochs=a.epochs if rl else 1,
        tokens_per_micro_batch=config.train.tokens_per_micro_batch,
        precision=config.model.precision,
        recompute=config.train.recompute,
        distributed_optimizer=config.optimizer.distributed,
        reference=(
            algorithm.needs_reference
            if rl
            else compared and config.preference.loss != "orpo" and config.residency.reference != "kept"
        ),
        critic=None if critic is None else read_architecture(critic),
        critic_flops=0.0 if critic is None else _flops_of(critic) / policy * share,
        reward_model=None if reward is None else read_architecture(reward),
        reward_flops=0.0 if reward is None else _flops_of(reward) / policy,
        colocated=colocated,
        generates=not supervised,
        segments=segments or 1.0,
        old_log_prob_share=0.0 if not rl else 1.0 if all_old else 1 - 1 / a.mini_batches,
        greedy=r.prompts_per_step if rl and algorithm.baseline == "greedy" else 0,
        energy_share=1.0 if rl and algorithm.by_token else 0.0,
        fp8=fp8_of(config),
        offloaded=frozenset(_offloaded(config)),
        swapped=config.residency.reference == "swapped",
        lora=lora_of(config),
        value_head=config.run.kind == "reward_model",
        teachers=tuple(map(read_architecture, teachers)),
        # each scores its own rows: on average, an equal share
        teacher_flops=sum(map(_flops_of, teachers)) / len(teachers) / policy if teachers else 0.0,
        staleness=r.max_staleness if rl else 0,
        cpu_fraction=config.optimizer.cpu_fraction,
        bucket_bytes=config.publish.bucket_mib << 20 if config.publish.by_buckets else 0,
    )


def _flops_of(path: Path) -> float:
    """FLOPs of a forward pass over one token without context and without the head."""
    shape = shape_of(path)
    return float(forward_flops(np.array([1.0]), shape, np.array([0.0]))[0])


def _offloaded(config: Config) -> Iterator[str]:
    where = config.residency
    if where.reference == "offloaded":
        yield "reference"
    if where.critic == "offloaded":
        yield "critic"
    if where.reward_model == "offloaded":
        yield "reward_model"
    if where.teacher == "offloaded":
        yield "teacher"
    if where.optimizer == "offloaded":
        yield from ("optimizer", "critic_optimizer")
    if where.servers == "released":
        yield from ("server_weights", "kv_cache")
