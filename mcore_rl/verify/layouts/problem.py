"""The recorded problem that every layout solves: a tiny random model and rollouts with ratios off 1.

Everything is a pure function of fixed seeds and of names and indices, never of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mcore_rl.algo import losses
from mcore_rl.algo.advantages import sequence_mean, sequence_sum, sums_ahead
from mcore_rl.algo.algorithms import Algorithm, configure
from mcore_rl.algo.baselines import best_of_group
from mcore_rl.algo.readings import readings
from mcore_rl.algo.rows import Rows
from mcore_rl.errors import NumericsError
from mcore_rl.parallel.layout import Layout
from mcore_rl.rewards.outcome import turn_ends
from mcore_rl.training.advantage import Scores, compute_advantages
from mcore_rl.training.batch import (
    PerSample,
    RolloutBatch,
    build_batch,
    places,
    sampled_with,
    token_sequences,
)
from mcore_rl.types import Group, Prompt, RewardPart, Sample, Segment, Tokens, TurnReward, VersionSpan

VOCAB = 50
"""not divisible by 4, so that the last tensor-parallel shards hold padding"""
SEED = 3
"""seed of the weights"""
TOKENS_PER_MICRO_BATCH = 128
"""Two replicas have two micro-batches each, and four stages have four; see `filled`."""
MAX_NEW_TOKENS = 16
TEMPERATURE = 0.9
SGD_LEARNING_RATE = 0.5
"""Parameters move by more than 1e-3 in 3 steps of plain SGD."""
STEEP: Mapping[str, float] = {"remax": 0.1, "rae": 0.1}
"""algorithm -> learning rate, where that one is beyond what plain SGD is stable with: a loss that sums over
tokens and clips nothing has seventeen times the gradient of RLOO's, and an error of rounding, 2e-7 after one
step, is 1.5e-5 after three, on one rank that fills its micro-batches otherwise as well"""
ADAM_LEARNING_RATE = 1e-3
ADAM_EPS = 1e-2
"""A large value: where it is small, Adam turns the rounding error of a tiny gradient into a whole step."""
VALUE_CLIP = 0.2
TRAJECTORIES = 2
"""groups whose samples have several segments"""
_WIDE = {"eps_low": 0.02, "eps_high": 0.03}
OVERRIDES: Mapping[str, Mapping[str, object]] = {
    "gspo": _WIDE,
    "gspo-kept": {
        **_WIDE,
        "correction": "tis-token",
        "correction_normalized": True,
        "rejection": "token-k1:0.5..2, sequence-max-k2:0.6, sequence-mean-k3:0.2",
    },
    "kl-cov": {"fraction": 0.1},
    "clip-cov": {"fraction": 0.1, "cov_low": 0.1},
}
"""Wider clips where the paper's are so narrow that rounding decides which side a sequence is on, a choice of
more tokens where the paper's is one of thousands, and what gives a loss something to read."""
_GRADED = ("passk-best",)
"""what learns nothing of a group whose best are equal: its rewards differ from sample to sample"""
_TWO_SIDED = (losses.ppo, losses.gspo)

_DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
_EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
}
MODELS = {"dense": _DENSE, "tied": _DENSE | {"tie_word_embeddings": True}, "moe": _DENSE | _EXPERTS}
"""name -> config.json"""
_WIDER = {"hidden_size": 48, "intermediate_size": 80}
"""of a teacher, beside its student's"""


def filled(tokens: int, layout: Layout) -> int:
    """Tokens of a micro-batch at a layout: `tokens` where replicas or stages share the micro-batches out.

    Twice as many elsewhere: two micro-batches are left to be summed, and half of the collectives.
    """
    return tokens if layout.data > 1 or layout.pipeline > 1 else 2 * tokens


def write_model(directory: Path, model: str, *, teacher: bool = False) -> Path:
    """A model directory with config.json only; weights are random by name (weights_io.random_reader)."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(MODELS[model] | (_WIDER if teacher else {})))
    return directory


@dataclass(frozen=True)
class Recorded:
    """One algorithm's rollout batch with what was recorded when it was sampled."""

    algorithm: Algorithm
    batch: RolloutBatch
    fields: Mapping[str, PerSample]
    """`old_log_prob`, `advantage` and what else the algorithm's losses need"""


def record(name: str, log_probs: Sequence[np.ndarray], loss: str | None = None) -> Recorded:
    """The batch of algorithm `name`, given the log-probs [N] of [n_i] of the starting weights.

    `loss` is `module:function` of a policy loss in the place of the algorithm's. Reference log-probs and old
    values are drawn by index, so that they do not depend on the layout.
    """
    algorithm = configure(name, OVERRIDES.get(name) if loss is None else None, loss)
    batch = build_batch(recorded_groups())
    sampled = perturbed(log_probs, seed=14)
    batch = replace(batch, samples=tuple(map(sampled_with, batch.samples, sampled)))
    if name in _GRADED:
        graded = enumerate(batch.samples)
        batch = replace(
            batch, samples=tuple(replace(s, reward=(s.reward or 0) + 5 * i % 7 / 10) for i, s in graded)
        )
    old = perturbed(log_probs)
    values = prompt_values(batch) if algorithm.values_prompts else drawn(log_probs, seed=13)
    scores = Scores(
        dict(enumerate(old)),
        perturbed(log_probs, seed=12),
        values,
        energy=[np.abs(values) for values in drawn(log_probs, seed=15)],
        baselines=[] if algorithm.baseline == "none" else [float(value[0]) for value in prompt_values(batch)],
    )
    advantages = compute_advantages(batch, algorithm, scores)
    return Recorded(algorithm, batch, {"old_log_prob": old, **advantages.fields})


def recorded_groups(groups: int = 6, size: int = 4) -> list[Group]:
    """Prompts of 1-9 tokens, responses of 1-14, binary rewards, and one group without signal.

    The samples of the last groups are trajectories: they have several segments, with observations in them,
    and a reward of two parts, one of them at every turn.
    """
    rng = np.random.default_rng(7)
    made = []
    for g in range(groups):
        prompt = Prompt(f"p{g}", "", tuple(rng.integers(VOCAB, size=rng.integers(1, 10)).tolist()), "")
        samples = []
        for k in range(size):
            reward = 1.0 if g == 0 else float(rng.integers(0, 2))
            if g < groups - TRAJECTORIES:
                segments = (_segment(rng, prompt.token_array),)
            else:
                segments = _segments(rng, prompt.token_array, first=k == 0)
            sample = Sample(f"p{g}@1/{k}", prompt, segments, "", "stop", reward)
            samples.append(sample if g < groups - TRAJECTORIES else _by_turn(sample, k / size))
        made.append(Group(f"p{g}@1", tuple(samples)))
    return made


def _by_turn(sample: Sample, each: float) -> Sample:
    """The sample with `each` more reward at every turn but the last, where its own reward lies."""
    ends = turn_ends(sample)
    turns = [TurnReward(end, each) for end in ends[:-1]]
    turns += [TurnReward(end, sample.reward or 0.0) for end in ends[-1:]]
    parts = (
        RewardPart("answer", sample.reward or 0.0, 1.0),
        RewardPart("turns", each * len(ends[:-1]), 1.0),
    )
    total = sum(part.value for part in parts)
    return replace(sample, reward=total, parts=parts, turn_rewards=tuple(turns))


def _segment(rng: np.random.Generator, context: Tokens, *, every: bool = True) -> Segment:
    """A segment of 1-14 tokens, of which every one is trained, or each with a chance of a half."""
    length = int(rng.integers(1, 15))
    tokens = tuple(rng.integers(VOCAB, size=length).tolist())
    trained = None if every else rng.random(length) < 0.5
    count = length if trained is None else int(trained.sum())
    return Segment(context, tokens, (0.0,) * count, (VersionSpan("0", 0, count),), trained)


def _segments(rng: np.random.Generator, context: Tokens, *, first: bool) -> tuple[Segment, ...]:
    """Those of a trajectory: with observations, a context of its own, and once without a trained token."""
    own = rng.integers(VOCAB, size=rng.integers(1, 10)).astype(np.int32)
    empty = Segment(own, (3, 4), (), (), np.zeros(2, bool))
    return (_segment(rng, context, every=False), _segment(rng, own, every=False), *([empty] if first else []))


def perturbed(log_probs: Sequence[np.ndarray], seed: int = 11) -> list[np.ndarray]:
    """Behaviour log-probs: the model's own plus noise whose size differs per sequence (1e-4, 0.1, 0.5).

    Small noise keeps a sequence inside every clip range, large noise puts it outside on either side.
    """
    scales = (1e-4, 0.1, 0.5)
    noise = drawn(log_probs, seed)
    return [
        (own + scales[i % 3] * extra).astype(np.float32)
        for i, (own, extra) in enumerate(zip(log_probs, noise, strict=True))
    ]


def drawn(like: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Standard normal numbers in the shapes of `like`."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(values.shape).astype(np.float32) for values in like]


def prompt_values(batch: RolloutBatch) -> list[np.ndarray]:
    """[N] of [1] a standard normal number of each sample's group."""
    groups = {group: number for number, group in enumerate(dict.fromkeys(batch.group_ids))}
    values = np.random.default_rng(13).standard_normal((len(groups), 1)).astype(np.float32)
    return [values[groups[group]] for group in batch.group_ids]


def check(recorded: Recorded, log_probs: Sequence[np.ndarray]) -> None:
    """NumericsError unless the data can tell a wrong layout: ratios off 1, each clip acting on both sides.

    Below 1 it cannot where no advantage is negative.
    """
    ratio, clipped = _ratio_and_clipped(recorded, log_probs)
    spread = ratio.min() < 0.95 and ratio.max() > 1.05
    below = above = clipped is None
    if clipped is not None:
        never_negative = recorded.algorithm.advantage is best_of_group
        below, above = clipped[ratio < 1].any() or never_negative, clipped[ratio > 1].any()
    if not spread or (recorded.algorithm.loss in _TWO_SIDED and not (below and above)):
        raise NumericsError(
            f"verify/layouts/problem.py: ratios from {ratio.min():.3f} to {ratio.max():.3f}, clipped below "
            f"1: {bool(below)}, above 1: {bool(above)}; that proves nothing: raise the noise of `perturbed`"
        )


def _ratio_and_clipped(recorded: Recorded, log_probs: Sequence[np.ndarray]) -> tuple[Tensor, Tensor | None]:
    """The ratio of every row, and whether its clip acts, as the algorithm's own loss says."""
    lengths = torch.tensor([len(values) for values in log_probs])
    samples = recorded.batch.samples
    segments = torch.tensor([len(s.log_probs) for sample in samples for s in sample.segments])
    sequence = torch.arange(len(segments)).repeat_interleave(segments)
    per_sample = [torch.as_tensor(a, dtype=torch.float32).reshape(-1) for a in recorded.fields["advantage"]]
    advantage = torch.cat([a.expand(n) for a, n in zip(per_sample, lengths.tolist(), strict=True)])
    own, old, rollout, reference = (
        torch.from_numpy(np.concatenate(values))
        for values in (
            log_probs,
            recorded.fields["old_log_prob"],
            [sample.log_probs for sample in recorded.batch.samples],
            drawn(log_probs, 0),
        )
    )
    rows = Rows.of(own, -own, old=old, rollout=rollout, advantage=advantage, reference=reference)

    def sums(values: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(f(values, sequence, len(segments))[sequence] for f in (sequence_sum, sequence_mean))  # type: ignore

    algorithm = recorded.algorithm
    marked = recorded.fields.get("marked")
    chosen = None if marked is None else torch.from_numpy(np.concatenate(list(marked))) > 0  # type: ignore
    place = torch.from_numpy(np.concatenate([places(one) for one in token_sequences(samples)]))

    def ahead(values: Tensor, discount: float) -> Tensor:
        grid = values.new_zeros(len(segments), int(place.max()) + 1)
        grid[sequence, place] = values
        return sums_ahead(grid, discount)[sequence, place]

    extras = readings(algorithm.loss, rows, algorithm.loss_params, sums, marked=chosen, ahead=ahead)
    token = algorithm.loss(
        replace(rows, sequence_tokens=segments[sequence].float(), extras={**rows.extras, **extras}),
        **algorithm.loss_params,
    )
    known = {name: metric.values for name, metric in token.metrics.items()}
    ratio = known.get("ratio/mean")
    return (own - old).exp() if ratio is None else ratio, known.get("clip/fraction")
