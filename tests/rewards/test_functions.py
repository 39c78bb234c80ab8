"""Several reward functions: which of them are for a prompt, and what their rewards make together."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mcore_rl.errors import ConfigError, RewardError
from mcore_rl.lookup import MISSING, look_up
from mcore_rl.rewards import RewardFunction, RewardPool, Task, load_rewards
from mcore_rl.rewards.outcome import Outcome, join_outcomes
from mcore_rl.training.rewards import check_weights
from mcore_rl.types import Group, Prompt, RewardPart, Sample, TurnReward, VersionSpan
from tests.rewards.test_pool import FUNCTIONS


def function(
    name: str, of: str, weight: float = 1.0, when: Mapping | None = None, **args: Any
) -> RewardFunction:
    key = f"reward.functions.{name}.function"
    return RewardFunction(f"{FUNCTIONS}:{of}", name, weight, when or {}, args, key)


def group(name: str, *texts: str, **metadata: Any) -> Group:
    prompt = Prompt(name, "", (1,), "", metadata)
    spans = (VersionSpan("0", 0, 2),)
    made = [
        Sample.of_response(f"{name}@0/{k}", prompt, (2, 3), (-0.5, -1.0), text, "stop", spans)
        for k, text in enumerate(texts)
    ]
    return Group(f"{name}@0", tuple(made))


SEVERAL = (
    function("length", "length", 0.5, {"data_source": ("gsm8k", "chat")}, bonus=2.0),
    function("rank", "compared", 10.0, {"data_source": ("gsm8k",)}),
    function("turn", "turns", 1.0, {"extra.kind": (1,)}),
    function("none", "void", 1.0, {"data_source": ("broken",)}),
    function("one", "does", 0.0, {"data_source": ("chat", "broken")}),
)


def test_the_reward_is_the_weighted_sum_of_what_is_for_the_prompt() -> None:
    """Functions of samples and of groups, with parts and turns; each prompt by its own."""
    asked = [
        group("a", "bb", "aaaa", data_source="gsm8k"),
        group("b", "ccc", data_source="chat", extra={"kind": 1}),
        group("c", "c", data_source="broken"),
        group("d", "c", data_source="unknown", extra={"kind": True}),
    ]
    with RewardPool(Task(SEVERAL, {"length/long": 3.0}, 8.0, None, timeout=10.0), workers=1) as pool:
        (a, b, c, d), reasons = pool.score(asked)
    assert [sample.reward for sample in a.samples] == [0.5 * (3 * 2 + 2) + 10, 0.5 * (3 * 4 + 2)]
    assert a.samples[0].parts == (
        RewardPart("length/long", 2.0, 1.5),
        RewardPart("length/short", 2.0, 0.5),
        RewardPart("rank", 1.0, 10.0),
    )
    (one,) = b.samples
    assert one.reward == 0.5 * (3 * 3 + 2) + 4.0
    assert [part.name for part in one.parts] == ["length/long", "length/short", "turn", "one"]
    assert one.turn_rewards == (TurnReward(1, one.reward),)
    assert c.samples[0].void, "a sum without what cannot be judged is another reward"
    assert d.samples[0].void
    assert reasons.counts == {"grader": 1, "no_function": 1}
    assert reasons.examples == [
        "c@0/0 returned said HTTP 500",
        "d@0/0 has no function for data_source = 'unknown', extra.kind = True",
    ]


def test_outcomes_join_where_one_has_turns_and_another_none() -> None:
    (sample,) = group("a", "b").samples
    turns = Outcome(3.0, (RewardPart("t", 3.0, 1.0),), (TurnReward(0, 1.0), TurnReward(1, 2.0)))
    whole = Outcome(0.5, (RewardPart("w", 0.5, 1.0),))
    assert join_outcomes([turns], sample) == turns
    assert join_outcomes([whole, whole], sample) == Outcome(1.0, whole.parts * 2)
    assert join_outcomes([whole, turns], sample) == Outcome(
        3.5, whole.parts + turns.parts, (TurnReward(0, 1.0), TurnReward(1, 2.5))
    )
    with pytest.raises(RewardError, match="a sum that is infinity"):
        join_outcomes([Outcome(3e38), Outcome(3e38)], sample)


def test_a_field_is_found_by_its_name_or_in_objects() -> None:
    row = {"a": {"b": {"c": 1}}, "a.b": 2, "n": None}
    names = ("a.b", "a.b.c", "n", "x", "n.x", "a.x")
    assert [look_up(row, name) for name in names] == [2, 1, None, MISSING, MISSING, MISSING]


@pytest.mark.parametrize(
    ("of", "args", "said"),
    [
        ("no_such", {}, r"reward\.functions\.n\.function: .* has no no_such"),
        ("does", {"url": 1}, r"reward\.functions\.n\.args: .*:does cannot be called .*'url'"),
        ("noted", {}, r"reward\.functions\.n\.args: .*missing a required.*'file'"),
        ("WHAT", {}, r"reward\.functions\.n\.args: .*WHAT cannot be called"),
    ],
)
def test_what_cannot_be_called_with_its_arguments_is_refused_by_its_key(
    of: str, args: dict, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load_rewards([function("n", of, **args)])


def scored(*parts: str) -> Sample:
    (sample,) = group("a", "b").samples
    return replace(sample, reward=1.0, parts=tuple(RewardPart(name, 1.0, 1.0) for name in parts))


def test_a_weight_of_no_part_is_refused_by_name() -> None:
    check_weights({"format": 0.5}, [scored("answer"), scored("answer", "format")], ())
    with pytest.raises(ConfigError, match=r"part fromat.*the parts are answer, format: corr") as error:
        check_weights({"fromat": 0.5}, [scored("answer", "format")], ())
    assert error.value.shared
    with pytest.raises(ConfigError, match="the reward has no parts"):
        check_weights({"format": 0.5}, [scored()], ())
    check_weights({"chat/help": 2.0}, [scored("math/right")], ("math", "chat"))
    for parts in (("chat",), ("chat/helpful",)):
        with pytest.raises(ConfigError, match="chat/help,"):
            check_weights({"chat/help": 2.0}, [scored(*parts)], ("math", "chat"))


def test_a_group_is_scored_while_another_is_waited_for(tmp_path: Path) -> None:
    """Its thread needs nobody who waits; what nobody asks for any more is not scored."""
    witness = tmp_path / "scored"
    functions = (function("noted", "noted", file=str(witness)),)
    with RewardPool(Task(functions, {}, 8.0, None), workers=1) as pool:
        for name in ("first", "second"):
            pool.begin(f"{name}@0", lambda name=name: group(name, "a"))
            until = time.monotonic() + 60
            while not witness.exists() or name not in witness.read_text():
                assert time.monotonic() < until
                time.sleep(0.01)
        pool.begin("fourth@0", lambda: group("fourth", *["a"] * 50))
        pool.begin("fifth@0", lambda: group("fifth", "a"))
        pool.forget(["fourth@0", "never begun"])
        found, _ = pool.finish(["second@0", "first@0", "fifth@0"])
        assert [one.id for one in found] == ["second@0", "first@0", "fifth@0"]
        assert all(sample.reward == 1.0 for one in found for sample in one.samples)
    assert witness.read_text().count("fourth") < 50


def test_a_group_that_cannot_be_made_is_an_error_of_whoever_asks() -> None:
    def fail() -> Group:
        raise ValueError("no such id")

    with RewardPool(Task((function("one", "does"),), {}, 8.0, None), workers=1) as pool:
        pool.begin("a@0", fail)
        with pytest.raises(ValueError, match="no such id"):
            pool.finish(["a@0"])
        (again,), _ = pool.score([group("a", "b")])
        assert again.samples[0].reward == 1.0, "and the next are scored"
