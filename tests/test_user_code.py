"""Errors of the user's own code say where they were raised: whatever function of the user's it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mcore_rl.data.curriculum import Curriculum
from mcore_rl.errors import ConfigError, RewardError
from mcore_rl.functions import find_function
from mcore_rl.parallel.control import _portable
from mcore_rl.training.evaluation_sets import _answer
from mcore_rl.training.faults.exits import read_events, recorded
from mcore_rl.types import Prompt
from mcore_rl.user_code import MOST_CHARS, place, said
from tests.rewards.test_pool import groups, pool_of

MODULE = """import json


def parsed(text):
    return json.loads(text)


def wrong(one):
    return parsed("{")


def nested(one, depth=9):
    return nested(one, depth - 1) if depth else 1 / 0


class Rows:
    def __getattr__(self, name):
        raise ValueError("\\x1b[2J" * 500)


class Mute(RuntimeError):
    def __str__(self):
        raise KeyError("no text")


def mute(one):
    raise Mute
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch):
    (tmp_path / "of_a_user.py").write_text(MODULE)
    (tmp_path / "does_not_parse.py").write_text("x = 1\nif:\n")
    (tmp_path / "does_not_load.py").write_text('raise KeyError("a")\n')
    (tmp_path / "is_mute.py").write_text("import of_a_user\n\nof_a_user.mute(0)\n")
    (tmp_path / "is_lazy.py").write_text("def __getattr__(name):\n    raise KeyError(name)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "of_a_user", raising=False)
    return __import__("of_a_user")


def caught(function, *arguments) -> BaseException:
    with pytest.raises(BaseException) as error:  # noqa: PT011
        function(*arguments)
    return error.value


HERE = 'of_a_user.py:9, in wrong: return parsed("{"), then of_a_user.py:5, in parsed: return json.loads(text)'


def test_the_last_frames_of_the_users_files_are_named_and_no_others(module) -> None:
    said = place(caught(module.wrong, None))
    assert said.endswith(HERE)
    assert "json/" not in said, "where the standard library raised it"
    deep = place(caught(module.nested, None))
    assert deep.count("of_a_user.py:13") == 3
    assert place(caught(json.loads, "{")).count(":") > 0, "nothing of the user's: where the other code is"
    assert place(ValueError()) == "", "never raised"


def test_foreign_text_in_it_is_text_and_short(module, tmp_path: Path, monkeypatch) -> None:
    long = tmp_path / "a_long_line.py"
    long.write_text(f"def f(one):\n    return one.{'x' * 5000} # \x1b\n")
    monkeypatch.syspath_prepend(tmp_path)
    said = place(caught(__import__("a_long_line").f, module.Rows()))
    assert len(said) <= MOST_CHARS
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("does_not_parse", "does_not_parse.py:2: if:"),
        ("does_not_load", "does_not_load.py:1, in <module>: raise"),
        ("is_mute", "Mute: its text cannot be had: __str__ raised KeyError at is_mute.py:3"),
        ("is_lazy", "is_lazy.py:2, in __getattr__: raise"),
        ("is_nowhere", "No module named 'is_nowhere');"),
    ],
)
def test_a_module_that_cannot_be_imported_says_its_line(module, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match="cannot import") as error:
        find_function("reward.function", f"{name}:f")
    assert said in str(error.value)
    assert "importlib" not in str(error.value), "where Python looks for modules is no place to look at"


def test_an_error_without_a_text_and_one_with_too_much_are_said_and_recorded(module, tmp_path: Path) -> None:
    mute = caught(module.mute, None)
    assert said(mute) == "its text cannot be had: __str__ raised KeyError"
    assert len(said(ValueError("x" * 100_000))) < 3000
    with pytest.raises(type(mute)), recorded(tmp_path):
        raise mute
    assert str(_portable(mute)) == f"Mute: {said(mute)}", "the other ranks wait for it"
    (event,) = read_events(tmp_path, 0)
    assert (event["type"], event["message"]) == ("Mute", said(mute))
    with pytest.raises(ConfigError, match="raised Mute: its text cannot be had"):
        Curriculum("of_a_user:mute", module.mute, 0).takes(1)(Prompt("p", "text", (1,), None), 0)
    with pytest.raises(RewardError, match="raised Mute on sample"):
        _answer(module.mute, groups("a")[0].samples[0])


def test_a_curriculum_and_an_answer_say_theirs(module) -> None:
    chosen = Curriculum("of_a_user:wrong", module.wrong, 0)
    prompt = Prompt("p", "text", (1,), None)
    with pytest.raises(ConfigError) as error:
        chosen.takes(1)(prompt, 0)
    assert HERE in str(error.value)
    group = groups("a")[0]
    with pytest.raises(RewardError) as of_answer:
        _answer(module.wrong, group.samples[0])
    assert HERE in str(of_answer.value)


def test_a_reward_in_its_own_process_says_its_line() -> None:
    with pool_of("does") as pool:
        _, reasons = pool.score(groups("raises"))
    (said,) = reasons.examples
    assert "raised ValueError" in said
    assert "tests/rewards/functions.py:" in said
