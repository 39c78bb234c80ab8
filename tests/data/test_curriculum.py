"""A function of the user's that chooses prompts: what it is told, what it decides, what it may not do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.data.curriculum import Candidate, Curriculum, load_curriculum, uniform
from mcore_rl.data.cursor import PromptCursor
from mcore_rl.data.prompts import PromptSet, open_prompts
from mcore_rl.errors import ConfigError, DamagedCheckpointError, DataError
from mcore_rl.types import Group, Prompt, Sample

PROMPTS = tuple(Prompt(f"p{i}", "", (1,), str(i)) for i in range(10))
Cursor = Callable[[], PromptCursor]


@pytest.fixture(scope="module")
def data(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> PromptSet:
    """Ten prompts p0 to p9 in one file, and as many in another."""
    folder = tmp_path_factory.mktemp("curriculum")
    return open_prompts([written(folder, name) for name in "ab"], tokenizer, max_prompt_tokens=8)


@pytest.fixture(scope="module")
def cursor(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Cursor:
    """A new cursor over ten prompts, p0 to p9."""
    path = written(tmp_path_factory.mktemp("curriculum"), "a")
    ten = open_prompts([path], tokenizer, max_prompt_tokens=8)
    return lambda: PromptCursor(ten, 3)


def written(folder: Path, name: str) -> Path:
    rows = [{"id": f"p{i}", "prompt": "1", "label": str(i)} for i in range(10)]
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def curriculum(function: Callable[[Candidate], Any]) -> Curriculum:
    return Curriculum("mine:function", function, seed=0)


def group(prompt: Prompt, *rewards: float | None) -> Group:
    """None is a void sample."""
    samples = [Sample(f"{i}", prompt, (), "", "stop", r, void=r is None) for i, r in enumerate(rewards)]
    return Group(f"{prompt.id}@1", tuple(samples))


@given(st.lists(st.integers(0, 4), max_size=12), st.sets(st.integers(0, 9), min_size=4))
def test_what_is_not_taken_is_passed_over_in_the_order_of_the_epoch(
    cursor: Cursor, counts: list[int], liked: set[int]
) -> None:
    chosen, every = cursor(), cursor()
    takes = curriculum(lambda candidate: int(candidate.prompt.label) in liked).takes(1)
    drawn = [chosen.next(count, takes) for count in counts]
    assert all(
        len({prompt.id for prompt in batch}) == len(batch) == n
        for batch, n in zip(drawn, counts, strict=True)
    )
    walked = [prompt.id for batch in drawn for prompt in batch]
    first = [p.id for p in every.next(10) if int(p.label) in liked]
    assert walked[: len(first)] == first[: len(walked)]
    for start in range(0, len(walked), len(liked)):
        epoch = walked[start : start + len(liked)]
        assert len(set(epoch)) == len(epoch), "each at most once per epoch"


def test_taking_everything_is_the_cursor_without_a_curriculum(cursor: Cursor) -> None:
    chosen, every = cursor(), cursor()
    for count in (3, 4, 7, 0, 10, 1):
        assert chosen.next(count, curriculum(lambda _: 1).takes(1)) == every.next(count)
        assert chosen.state() == every.state()


def test_another_rank_follows_to_the_place_and_the_prompts_that_were_chosen(cursor: Cursor) -> None:
    """It never asks the function, whose answers are the main rank's alone."""
    main, other = cursor(), cursor()
    takes = curriculum(lambda candidate: int(candidate.prompt.label) % 3 > 0).takes(1)
    for count in (4, 0, 5, 6):
        chosen = main.next(count, takes)
        other.move(json.loads(json.dumps(main.place)))
        assert [other.drawn[prompt.id] for prompt in chosen] == chosen
        assert other.state() == main.state()
        for each in (main, other):
            each.keep({prompt.id for prompt in chosen[:2]})
    assert other.next(3) == main.next(3)


def test_a_mixture_keeps_its_quotas_where_a_curriculum_chooses(data: PromptSet) -> None:
    walked = PromptCursor(data, 3, weights=(3, 1))
    takes = curriculum(lambda candidate: int(candidate.prompt.label) < 7).takes(1)
    for _ in range(5):
        drawn = walked.next(8, takes)
        assert sum(prompt.id.startswith("a.jsonl:") for prompt in drawn) == 6
        assert all(int(prompt.label) < 7 for prompt in drawn)
        walked.keep(())
    with pytest.raises(DataError, match=r"takes 1 of 10 prompts of .*a.jsonl:1 and on by the end of epoch"):
        walked.next(8, curriculum(lambda candidate: candidate.prompt.label == "1").takes(1))


def test_too_few_that_are_taken_end_the_walk_after_one_more_epoch(cursor: Cursor) -> None:
    asked: list[tuple[str, int]] = []

    def function(candidate: Candidate) -> float:
        asked.append((candidate.prompt.id, candidate.epoch))
        return candidate.prompt.id == "p4"

    with pytest.raises(
        DataError, match=r"data.curriculum takes 1 of 10 prompts by the end of epoch 1, and 2 are"
    ):
        cursor().next(2, curriculum(function).takes(1))
    assert len(set(asked)) == len(asked) <= 20


def test_a_chance_is_drawn_for_each_prompt_and_epoch() -> None:
    numbers = [uniform(f"{i}") for i in range(2000)]
    assert 0 <= min(numbers) <= 0.01
    assert 0.99 <= max(numbers) < 1
    assert abs(sum(number < 0.25 for number in numbers) / 2000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)
    takes = curriculum(lambda _: 0.5).takes(1)
    drawn = [[takes(prompt, epoch) for prompt in PROMPTS] for epoch in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_function_is_told_what_was_measured_and_a_checkpoint_keeps_it() -> None:
    told: list[Candidate] = []
    one = curriculum(lambda candidate: told.append(candidate) or 1)
    one.measure([group(PROMPTS[0], 0.0, 1.0, None, 0.5), group(PROMPTS[1], None), group(PROMPTS[0], 1.0)])
    other = curriculum(lambda candidate: told.append(candidate) or 1)
    other.restore(json.loads(json.dumps(one.state())))
    for each in (one, other):
        for prompt in PROMPTS[:2]:
            assert each.takes(7)(prompt, 2)
    assert told[:2] == told[2:] == [Candidate(PROMPTS[0], 7, 2, (0.5, 1.0)), Candidate(PROMPTS[1], 7, 2, ())]


@pytest.mark.parametrize(
    "wrong", [None, "1", 1.5, -0.1, math.nan, math.inf, [1], 1j, Ellipsis], ids=lambda wrong: repr(wrong)
)
def test_what_is_no_chance_is_refused(wrong: object) -> None:
    with pytest.raises(
        ConfigError, match=r"mine:function, of prompt p3, returned .*return a number from 0 to 1"
    ):
        curriculum(lambda _: wrong).takes(1)(PROMPTS[3], 0)


@pytest.mark.parametrize("error", [ZeroDivisionError("by 0"), SystemExit(0), KeyboardInterrupt()])
def test_what_it_raises_names_it_and_the_prompt(error: BaseException) -> None:
    def function(candidate: Candidate) -> float:
        raise error

    with pytest.raises(ConfigError, match=rf"mine:function, of prompt p3, raised {type(error).__name__}"):
        curriculum(function).takes(1)(PROMPTS[3], 0)


def test_a_function_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.curriculum: math \(.*\) has no nothing"):
        load_curriculum("math:nothing")
    with pytest.raises(ConfigError, match="must be a function of one argument, the candidate"):
        load_curriculum("math:gamma_of_two".replace("gamma_of_two", "atan2"))


@pytest.mark.parametrize("state", [{"p": 1}, {"p": ["a"]}, {"p": [None]}, []])
def test_a_state_of_another_form_is_a_damaged_checkpoint(state: Any) -> None:
    with pytest.raises(DamagedCheckpointError, match="mean rewards of prompts"):
        curriculum(lambda _: 1).restore(state)
