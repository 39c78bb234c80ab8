"""Built-in rewards: what counts as the answer of a response, and what it costs to be long."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.errors import ConfigError
from mcore_rl.rewards.answers import (
    boxed_match,
    has_tags,
    last_boxed,
    last_number,
    numeric_match,
    regex_match,
    tags_match,
)
from mcore_rl.rewards.length import overlong, overlong_penalty
from mcore_rl.rewards.math_answer import math_match
from mcore_rl.rewards.outcome import Void
from tests.rewards.test_score import sample


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7.", Fraction(7)),
        ("$1,234.50", Fraction("1234.5")),
        ("it is -0.5", Fraction(-1, 2)),
        ("3/4 of it", Fraction(3, 4)),
        ("1 / 0", None),
        ("25%", Fraction(1, 4)),
        ("2.5e3", Fraction(2500)),
        (".5", Fraction(1, 2)),
        ("1,2,3", Fraction(3)),
        ("one", None),
        ("", None),
        ("9" * 5000, None),
        ("1e999999999", Fraction(999999999)),
        ("x1e-5y", Fraction(1, 100000)),
    ],
)
def test_the_last_number_of_a_text(text: str, number: Fraction | None) -> None:
    assert last_number(text) == number


def test_a_label_of_any_json_is_read_as_json_writes_it() -> None:
    assert numeric_match(sample(0, "it is 1/2", 0.5)) == 1
    assert boxed_match(sample(0, r"\boxed{4}", 4)) == boxed_match(sample(0, r"\boxed{[1,2]}", [1, 2])) == 1
    assert regex_match(sample(0, "true", True)) == 1


def test_numbers_are_equal_by_value() -> None:
    assert [numeric_match(sample(0, text, "0.5")) for text in ("1/2", "50%", "0.50", "5", "")] == [
        1,
        1,
        1,
        0,
        0,
    ]
    assert numeric_match(sample(0, "none", "none")) == 0.0, "no number equals no number"


@given(st.text(alphabet="0123456789.,eE+-/% \n", max_size=60))
def test_any_text_has_a_number_or_none(text: str) -> None:
    assert last_number(text) is None or isinstance(last_number(text), Fraction)


@pytest.mark.parametrize(
    "text", ["1," * 50_000, "1" * 100_000, "1e" * 50_000, "\\boxed{" * 20_000, "1 /" * 30_000]
)
def test_a_long_text_takes_no_time(text: str) -> None:
    began = time.process_time()
    last_number(text)
    last_boxed(text)
    assert time.process_time() - began < 2


def test_a_label_may_be_a_pattern() -> None:
    assert regex_match(sample(0, " Paris\n", "(?i)paris")) == 1.0
    assert regex_match(sample(0, "Paris, I think", "(?i)paris")) == 0.0


def test_the_last_box_is_the_answer() -> None:
    text = r"first \boxed{1}, then \boxed{\frac{3}{4}} and \{"
    assert last_boxed(text) == r"\frac{3}{4}"
    assert boxed_match(sample(0, text, r"\frac{3} {4}")) == 1.0
    assert boxed_match(sample(0, text, "1")) == 0.0
    assert last_boxed(r"\boxed{1") is None
    assert last_boxed("1") is None


def test_tags_come_in_turn_and_once() -> None:
    tags = ("think", "answer")
    assert has_tags(" <think>a\nb</think>\n<answer>7</answer> ", tags)
    for text in (
        "<answer>7</answer><think>a</think>",
        "<think>a</think>7<answer>7</answer>",
        "<think>a</think><answer>7</answer><answer>8</answer>",
        "<think><think>a</think><answer>7</answer>",
        "<think>a</think>",
        "",
    ):
        assert not has_tags(text, tags)


def test_the_overlong_penalty_is_linear_in_the_cache() -> None:
    assert [overlong_penalty(n, max_length=10, cache=4) for n in (0, 6, 7, 8, 10, 99)] == [
        *(0.0, 0.0, -0.25, -0.5, -1.0, -1.0)
    ]
    with pytest.raises(ConfigError, match="overlong cache 11"):
        overlong_penalty(5, max_length=10, cache=11)


@pytest.mark.parametrize(
    ("label", "text", "wanted"),
    [
        ("1/2", r"so \boxed{0.5}", 1.0),
        ("1/2", r"so \boxed{\frac12}", 1.0),
        (r"\frac{1}{2}", "the answer is 0.5", 1.0),
        ("1/2", r"\boxed{0.5}, or rather \boxed{2}", 0.0),
        ("x^2+2x+1", r"\boxed{(x+1)^2}", 1.0),
        (r"$\{1,2\}$", r"\boxed{\{2,1\}}", 1.0),
        ("[0,1]", r"\boxed{[0,1)}", 0.0),
        ("42", "41, then 42.", 1.0),
        ("42", "", 0.0),
        ("42", rf"\boxed{{{'(' * 2000}}}", 0.0),
        (4, r"\boxed{4}", 1.0),
    ],
)
def test_answers_are_equal_as_mathematics_has_them(label: object, text: str, wanted: float) -> None:
    """By the package itself, whose deadline is an alarm of the main thread, where this runs too."""
    assert math_match(sample(0, text, label)) == wanted


def test_a_label_without_an_expression_is_no_answer_to_compare_with() -> None:
    void = math_match(sample(0, "4", ""))
    assert isinstance(void, Void)
    assert void.reason == "label"


def test_parts_of_a_reward_that_need_no_code_of_ones_own() -> None:
    made = sample(0, "<a>x</a><b>y</b>", "")
    assert [tags_match(made, tags=tags) for tags in (["a", "b"], ["b", "a"])] == [1.0, 0.0]
    assert overlong(made, max_length=1, cache=1) == -1.0 * (made.trained_tokens >= 1)
