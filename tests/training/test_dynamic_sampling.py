"""Which groups have a signal, what a step lacks, and the ids of what is asked in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from mcore_rl.config import load_config
from mcore_rl.errors import EXIT_CONFIG, NoSignalError
from mcore_rl.training.assemble_rollouts import sizes_of
from mcore_rl.training.dynamic_sampling import FilteredGroups, has_signal
from mcore_rl.training.generation import named
from mcore_rl.types import Group, Prompt, RewardPart, Sample, VersionSpan

VOID = None
"""in the place of a reward: the sample is void, with a reward that must not count"""
PROMPT = Prompt("p", "1+1=", (1, 2), "2")


def group(*rewards: float | None, name: str = "p@1", reason: str = "stop") -> Group:
    def sample(number: int, reward: float | None) -> Sample:
        made = Sample.of_response(
            id=f"{name}/{number}",
            prompt=PROMPT,
            token_ids=(3,),
            log_probs=(-1.0,),
            text="",
            finish_reason=reason,
            versions=(VersionSpan("0", 0, 1),),
            reward=7.0 if reward is VOID else reward,
        )
        return replace(made, void=reward is VOID)

    return Group(name, tuple(sample(number, reward) for number, reward in enumerate(rewards)))


@pytest.mark.parametrize(
    ("rewards", "signal"),
    [
        ((), False),
        ((1.0,), False),
        ((VOID, VOID), False),
        ((0.0, 0.0, 0.0), False),
        ((0.1, 0.1), False),
        ((1.0, VOID), False),
        ((1.0, 1.0, VOID), False),
        ((0.0, 1.0), True),
        ((0.0, VOID, 1.0), True),
        ((0.1, 0.1 + 1e-12), True),
        ((0.0, -0.0), False),
    ],
)
def test_a_group_has_a_signal_where_two_live_rewards_differ(
    rewards: Sequence[float | None], signal: bool
) -> None:
    assert has_signal(group(*rewards), by_parts=False) is signal
    assert has_signal(group(*rewards), by_parts=True) is signal, "one number is one part"


def test_truncated_samples_are_compared_too() -> None:
    assert has_signal(group(0.0, 1.0, reason="length"), by_parts=False)


@pytest.mark.parametrize(
    ("parts", "of_sums", "of_parts"),
    [
        ([{"right": (1, 1.0), "short": (0, 1.0)}, {"right": (0, 1.0), "short": (1, 1.0)}], False, True),
        ([{"right": (1, 1.0), "short": (0, 1.0)}, {"right": (1, 1.0)}], False, False),
        ([{"right": (1, 1.0), "seen": (3, 0.0)}, {"right": (1, 1.0), "seen": (4, 0.0)}], False, False),
        ([{"right": (1, 1.0)}, {"right": (0, 1.0)}], True, True),
    ],
    ids=["equal sums", "an absent part is 0", "weight 0", "one part"],
)
def test_where_parts_are_compared_one_by_one_one_that_differs_is_a_signal(
    parts: list[dict[str, tuple[float, float]]], of_sums: bool, of_parts: bool
) -> None:
    sums = [sum(value * weight for value, weight in its.values()) for its in parts]
    plain = group(*sums)
    samples = (
        replace(one, parts=tuple(RewardPart(name, *its[name]) for name in its))
        for one, its in zip(plain.samples, parts, strict=True)
    )
    both = replace(plain, samples=tuple(samples))
    assert has_signal(both, by_parts=False) is of_sums
    assert has_signal(both, by_parts=True) is of_parts


@pytest.mark.parametrize(
    ("flags", "by_parts"),
    [
        (["--algorithm.name=grpo"], False),
        (["--algorithm.name=grpo", "--algorithm.params.decoupled=true"], True),
        (["--algorithm.name=gdpo"], True),
        (["--algorithm.name=gdpo", "--algorithm.params.decoupled=false"], False),
        (["--run.kind=sft"], False),
    ],
)
def test_a_run_asks_for_parts_where_its_algorithm_compares_them(tmp_path, flags: list[str], by_parts: bool):
    path = tmp_path / "run.toml"
    path.write_text('run.dir = "r"\nmodel.path = "m"\ndata.train = "t.jsonl"\ntrain.steps = 1\n')
    assert sizes_of(load_config(path, flags)).by_parts is by_parts


def test_a_step_lacks_what_has_no_signal_and_counts_what_it_sampled() -> None:
    filtered = FilteredGroups(wanted=2, most=4)
    filtered.add([group(0.0, 1.0), group(1.0, 1.0, VOID)])
    filtered.check(1)
    assert (filtered.missing, len(filtered.dropped)) == (1, 1)
    filtered.add([group(1.0, 0.0, 0.5)])
    filtered.check(1)
    assert filtered.missing == 0
    assert filtered.metrics() == {
        "void": 1.0,
        "sampling/groups": 3.0,
        "sampling/dropped": 1.0,
        "sampling/refill_rate": 1 / 3,
        "sampling/reward": 4.5 / 7,
    }


def test_without_the_option_every_group_is_trained() -> None:
    filtered = FilteredGroups(wanted=2, most=0)
    filtered.add([group(1.0, 1.0), group(VOID)])
    filtered.check(1)
    assert filtered.missing == 0
    assert filtered.metrics() == {"void": 1.0}


def test_more_than_may_be_sampled_ends_the_run_with_the_rate_and_what_the_rewards_were() -> None:
    filtered = FilteredGroups(wanted=2, most=4)
    filtered.add([group(1.0, 1.0), group(0.0, 0.0)])
    filtered.check(3)
    filtered.add([group(0.0, 1.0), group(0.0, VOID)])
    with pytest.raises(NoSignalError) as ended:
        filtered.check(3)
    assert str(ended.value).startswith(
        "step 3: 3 of 4 groups had no signal (75.0%): the rewards of 2 were all equal, of 1 all 1, and 1 had "
        "fewer than two live samples. rollout.dynamic_sampling allows 4 groups for the 2 of a step. "
    )
    assert ended.value.shared
    assert ended.value.exit_code == EXIT_CONFIG


def test_the_ids_of_new_groups_are_free() -> None:
    prompts = [Prompt("a@b", "", (1,), ""), Prompt("c", "", (1,), "")]
    assert named(prompts, 5, []) == ["a@b@5", "c@5"]
    assert named(prompts, 5, ["d@5", "c@4"]) == ["a@b@5", "c@5"]
    assert named(prompts, 5, ["c@5"]) == ["a@b@5.1", "c@5.1"]
    assert named(prompts, 5, ["c@5", "a@b@5.1"]) == ["a@b@5.2", "c@5.2"]
    assert named([], 5, ["c@5"]) == []
