"""Advantages of a rollout that several replicas sampled: the same bits for every split, one error for all."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch.distributed as dist

from mcore_rl.algo.algorithms import configure
from mcore_rl.errors import RewardError
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import build_mesh, destroy_mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.training.advantage import compute_advantages
from mcore_rl.training.batch import build_batch
from mcore_rl.training.generation import gather_groups
from mcore_rl.types import Group, Prompt, RewardPart, Sample, TurnReward, VersionSpan

REWARDS = [0.0, 1.0, 0.1, -2.5, 1e4, 1e4 + 0.1, 1e4 + 0.2]
ALGORITHMS = ("grpo", "liteppo", "reinforce++-baseline", "reinforce++", "gdpo")
"""statistics of a group, of the batch, of all tokens' advantages per sample, per token, and of parts"""


def group(number: int, rewards: list[float]) -> Group:
    prompt = Prompt(f"p{number}", "", (1, 2), "")
    samples = []
    for k, reward in enumerate(rewards):
        n = 1 + (number + k) % 5
        tokens, log_probs = np.full(n, 5, np.int32), np.zeros(n, np.float32)
        spans = (VersionSpan("0", 0, n),)
        samples.append(
            Sample.of_response(f"p{number}@1/{k}", prompt, tokens, log_probs, "", "stop", spans, reward)
        )
    return Group(f"p{number}@1", tuple(samples))


def in_parts(one: Group, draw: random.Random) -> Group:
    """Some samples of the group with another part beside the reward, and the reward at a token of its own."""
    samples = []
    for sample in one.samples:
        if sample.reward is not None and draw.random() < 0.7:
            parts = (RewardPart("own", sample.reward, 1.0), RewardPart("other", draw.choice(REWARDS), 0.1))
            first = TurnReward(0, sample.reward)
            last = TurnReward(sample.trained_tokens - 1, 0.1 * parts[1].value)
            total = sample.reward + 0.1 * parts[1].value
            sample = replace(sample, reward=total, parts=parts, turn_rewards=(first, last))
        samples.append(sample)
    return replace(one, samples=tuple(samples))


def placed(seed: int) -> list[tuple[Group, int]]:
    """(group, replica that samples it): up to 6 groups of up to 6 samples, some constant."""
    draw = random.Random(seed)
    replicas = draw.randint(1, 4)
    groups = []
    for number in range(draw.randint(1, 6)):
        size, constant = draw.randint(0, 6), draw.random() < 0.3
        rewards = [draw.choice([draw.choice(REWARDS), draw.uniform(-1e3, 1e3)]) for _ in range(size)]
        one = group(number, rewards[:1] * size if constant else rewards)
        one = in_parts(one, draw) if draw.random() < 0.5 else one
        groups.append((one, draw.randrange(replicas)))
    draw.shuffle(groups)
    return groups


def advantages_of(groups: list[Group]) -> list[list[float]]:
    batch = build_batch(groups)
    found = []
    for name in ALGORITHMS:
        algorithm = configure(name, {"kl_in_reward": 0.0} if name == "reinforce++" else {})
        advantages = compute_advantages(batch, algorithm).fields["advantage"]
        found.append([float(x) for one in advantages for x in np.ravel(one)])
    return found


def shared(mesh, cases: list[tuple[Group, int]]) -> list[Group]:
    mine = [one for one, replica in cases if replica == mesh.dp_rank]
    prompts = {one.samples[0].prompt.id: one.samples[0].prompt for one, _ in cases if one.samples}
    groups, _ = gather_groups(mesh, prompts, lambda: ([one for one in mine if one.samples], None))
    return groups


def of_all_seeds(seeds: range) -> list[list[list[float]]]:
    mesh = build_mesh(Layout(data=dist.get_world_size()), timeout=60.0)
    try:
        return [advantages_of(shared(mesh, placed(seed))) for seed in seeds]
    finally:
        destroy_mesh()


@pytest.mark.slow
def test_advantages_do_not_depend_on_the_split_bit_for_bit(pool4: Pool) -> None:
    seeds = range(60)
    together = [advantages_of([one for one, _ in placed(seed)]) for seed in seeds]
    assert pool4.run(of_all_seeds, seeds) == [together] * 4
    assert sum(bool(case[0]) for case in together) > 50, "most rollouts have samples"


def error_of(reward: float | None) -> str:
    """What this replica says when replica 1 brings `reward`."""
    mesh = build_mesh(Layout(data=2), timeout=60.0)
    try:
        rewards = [1.0, reward if mesh.dp_rank == 1 else 0.0]
        mine = group(mesh.dp_rank, rewards)  # type: ignore[arg-type]
        prompts = {f"p{number}": group(number, [0.0]).samples[0].prompt for number in range(2)}
        compute_advantages(
            build_batch(gather_groups(mesh, prompts, lambda: ([mine], None))[0]), configure("grpo")
        )
    except RewardError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        destroy_mesh()
    return "no error"


@pytest.mark.parametrize(("reward", "seen"), [(math.nan, True), (math.inf, True), (0.5, False)])
def test_a_bad_reward_on_one_replica_is_the_same_error_on_all(pool2: Pool, reward: float, seen: bool) -> None:
    first, second = pool2.run(error_of, reward)
    assert first == second
    assert ("RewardError: sample 3 of group 'p1@1'" in first) is seen
