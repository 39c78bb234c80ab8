"""What the records of an evaluation say, and after which steps there is one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from mcore_rl.data.prompts import open_prompts
from mcore_rl.errors import RewardError
from mcore_rl.metric_names import meaning_of
from mcore_rl.training.evaluate import EvalSchedule
from mcore_rl.training.evaluation_sets import EvalSet, Record, as_lines, measure, record_of
from mcore_rl.types import Prompt, Sample

PROMPTS = tuple(Prompt(f"p{number}", "?", (1, 2), "7") for number in range(3))
HeldOut = Callable[..., EvalSet]


@pytest.fixture(scope="module")
def held_out(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    """A set of the prompts, with other settings; its file has one more, which is too long."""
    path = tmp_path_factory.mktemp("evaluation") / "rows.jsonl"
    rows = [*({"id": p.id, "prompt": "1", "label": p.label} for p in PROMPTS), {"prompt": "12", "label": "7"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = open_prompts([path], tokenizer, max_prompt_tokens=1)
    plain = {"samples": 4, "params": {}, "function": "exact", "word": "accuracy", "answer": None}
    plain |= {"pass_reward": 1.0, "pass_at": (), "majority_at": ()}

    def one(**settings: Any) -> EvalSet:
        kept = {**plain, **settings}
        return EvalSet(name="s", key="eval.sets.s.path", found=found, prompts=PROMPTS, **kept)

    return one


def record(prompt: int, reward: float | None, answer: str | None = None, **fields) -> Record:
    base = {"prompt_id": f"p{prompt}", "reward": reward, "answer": answer}
    return {**base, "finish_reason": "stop", "tokens": 4, **fields}


def found(one: EvalSet, *records: Record) -> Mapping[str, float]:
    measured = measure(one, records)
    assert all(meaning_of(name) for name in measured), "docs/metrics.md has every metric"
    return {name.removeprefix("eval/s/"): value for name, value in measured.items()}


def test_a_prompt_counts_once_however_many_samples_it_has_left(held_out: HeldOut) -> None:
    many = [record(0, 1.0)] * 4 + [record(1, 0.0)]
    one = found(held_out(), *many)
    assert one["accuracy"] == 0.5, "0.8 would be of samples"
    assert (one["samples"], one["missing"], one["sampled"], one["prompts"]) == (5, 7, 2, 4)
    assert 0 < one["accuracy/low"] < 0.5 < one["accuracy/high"] < 1


def test_void_samples_have_no_part_and_no_sample_is_no_accuracy_of_0(held_out: HeldOut) -> None:
    assert found(held_out(), record(0, 1.0), record(0, None))["accuracy"] == 1.0
    assert found(held_out(), record(0, None)) == {"prompts": 4, "sampled": 0, "samples": 0, "missing": 12}


def test_pass_and_majority_leave_out_prompts_with_too_few_samples(held_out: HeldOut) -> None:
    one = held_out(pass_at=(1, 4), majority_at=(3,), answer=str)
    whole = [record(0, 1.0, "7"), record(0, 0.0, "8"), record(0, 0.0, "8"), record(0, 0.0, None)]
    said = found(one, *whole, record(1, 0.0, "9"))
    assert (said["pass@1"], said["pass@4"]) == (0.125, 1.0)
    # of the four subsets of three, {7 8 8} and {8 8 -} elect 8, the two of {7 8 -} share: 2 * 0.5 / 4
    assert said["majority@3"] == pytest.approx(0.25)
    assert "pass@4/low" not in said, "one prompt says nothing of others"
    assert "pass@1/low" in said


def test_a_sample_passes_from_the_reward_that_the_set_names(held_out: HeldOut) -> None:
    records = [record(0, 0.4), record(1, 0.6)]
    assert found(held_out(pass_at=(1,), pass_reward=0.5), *records)["pass@1"] == 0.5
    assert found(held_out(pass_at=(1,)), *records)["pass@1"] == 0.0


def test_a_reward_model_has_no_accuracy_and_an_interval_of_any_numbers(held_out: HeldOut) -> None:
    said = found(held_out(function=None), record(0, -3.0), record(1, 5.0))
    assert said["reward"] == 1.0
    assert said["reward/low"] < -3
    assert "accuracy" not in said


def test_lengths_and_truncation_are_of_the_samples_that_count(held_out: HeldOut) -> None:
    long = record(1, 0.0, finish_reason="length", tokens=8)
    said = found(held_out(), record(0, 1.0), long, record(2, None, tokens=100))
    assert (said["length"], said["truncated"]) == (6, 0.5)


def sample(text: str) -> Sample:
    return Sample.of_response("p0@s.0/0", PROMPTS[0], (1,), (-0.5,), text, "stop", (), reward=1.0)


def test_a_record_has_what_a_sample_votes_for(held_out: HeldOut) -> None:
    one = held_out(answer=lambda s: s.text.strip() or None)
    assert record_of(one, sample(" 7\n"))["answer"] == "7"
    assert record_of(one, sample(" "))["answer"] is None
    assert record_of(held_out(), sample("7"))["answer"] is None
    assert as_lines([record_of(one, sample("\ud800"))]).endswith("\n")


@pytest.mark.parametrize(
    ("function", "message"),
    [(lambda s: 7, "returned int for sample p0@s.0/0"), (lambda s: 1 / 0, "raised ZeroDivisionError")],
)
def test_an_answer_that_is_none_ends_the_run_with_its_sample(held_out: HeldOut, function, message) -> None:
    with pytest.raises(RewardError, match=message):
        record_of(held_out(answer=function), sample("7"))


@pytest.mark.parametrize(
    ("every", "beside", "due", "waits"),
    [
        (0, False, [0, 5], [0, 5]),
        (2, False, [0, 2, 4, 5], [0, 2, 4, 5]),
        (0, True, [0, 5], [5]),
        (1, True, [0, 1, 2, 3, 5], [5]),
    ],
)
def test_when_the_policy_is_evaluated_and_whether_the_step_waits(every, beside, due, waits) -> None:
    """Beside training the record of a step has one evaluation: that of the step before, or its own."""
    schedule = EvalSchedule(steps=5, every=every, beside=beside)
    assert [step for step in range(6) if schedule.due(step)] == due
    assert [step for step in due if not schedule.is_beside(step)] == waits
    logged = [step + schedule.is_beside(step) for step in due]
    assert len(set(logged)) == len(logged)


def test_a_run_of_one_step_is_evaluated_before_and_after_it() -> None:
    schedule = EvalSchedule(steps=1, every=1, beside=True)
    assert [(schedule.due(step), schedule.is_beside(step)) for step in (0, 1)] == [(True, False)] * 2
