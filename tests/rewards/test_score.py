"""Rewards: loading by name, scoring, and that nothing but finite numbers gets through."""

import math
import os
import signal
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from mcore_rl.errors import AskedToLeave, ConfigError, RewardError
from mcore_rl.rewards import load_reward, score_groups
from mcore_rl.rewards.exact import exact_match
from mcore_rl.rewards.score import EXIT_COPY
from mcore_rl.types import Group, Prompt, Sample, VersionSpan


def sample(k, text, label="42"):
    prompt = Prompt("p", "40+2=", (1,), label)
    return Sample.of_response(f"p@0/{k}", prompt, (2,), (-0.5,), text, "stop", (VersionSpan("0", 0, 1),))


GROUPS = [Group("p@0", (sample(0, "42"), sample(1, "41"))), Group("q@0", (sample(2, " 42\n"),))]


def test_exact_match_ignores_surrounding_white_space_only():
    assert exact_match(sample(0, " 42 ")) == 1.0
    assert exact_match(sample(0, "42", " 42\n")) == 1.0
    assert [exact_match(sample(0, text)) for text in ("4 2", "042", "", "42.")] == [0.0] * 4


def test_rewards_are_attached_and_nothing_else_changes():
    scored = score_groups(GROUPS, exact_match)
    assert [[s.reward for s in group.samples] for group in scored] == [[1.0, 0.0], [1.0]]
    assert [group.id for group in scored] == ["p@0", "q@0"]
    assert scored[0].samples[1].log_probs == (-0.5,)
    assert GROUPS[0].samples[0].reward is None


def written() -> Sample:
    """A sample with arrays, as servers' samples have them."""
    arrays = {"token_ids": np.array([2, 5], np.int32), "log_probs": np.array([-0.5, -1], np.float32)}
    one = sample(0, "42")
    (segment,) = one.segments
    return replace(one, segments=(replace(segment, **arrays, experts=np.zeros((2, 1, 2), np.uint8)),))


@pytest.mark.parametrize("name", ["token_ids", "log_probs", "experts"])
def test_a_reward_that_writes_into_a_sample_gets_an_error_that_names_it(name):
    """It trained what the reward had written, and nothing said so."""

    def rewriting(one):
        getattr(one.segments[0], name)[:] = 0
        return 1.0

    one = written()
    before = getattr(one.segments[0], name).copy()
    with pytest.raises(RewardError, match=r"rewriting raised ValueError on sample p@0/0: .*read-only"):
        score_groups([Group("p@0", (one,))], rewriting)
    assert np.array_equal(getattr(one.segments[0], name), before)
    scored = score_groups([Group("p@0", (one,))], lambda s: 1.0)[0].samples[0]
    assert not getattr(scored.segments[0], name).flags.writeable, "with its reward too"


def test_the_prompt_of_a_sample_is_read_only_too():
    def rewriting(one):
        one.prompt.token_array[:] = 0
        return 1.0

    with pytest.raises(RewardError, match="read-only"):
        score_groups(GROUPS, rewriting)
    with pytest.raises(TypeError):
        GROUPS[0].samples[0].prompt.token_ids[0] = 1


@pytest.mark.parametrize(
    "value", [1, 0.5, np.float32(0.5), np.float64(-2), np.int64(3), Fraction(1, 4), -3e38]
)
def test_real_numbers_become_floats(value):
    reward = score_groups(GROUPS, lambda s: value)[0].samples[0].reward
    assert type(reward) is float
    assert reward == value


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (True, "bool"),
        (np.bool_(True), "bool"),
        (None, "NoneType"),
        ("1", "str"),
        (1j, "complex"),
        (torch.tensor(1.0), "Tensor"),
        (np.array(1.0), "ndarray"),
        ((1.0, 0.0), "2 rewards, and the sample has 1 turns"),
        (math.nan, "NaN"),
        (np.float32("nan"), "NaN"),
        (math.inf, "infinity"),
        (-math.inf, "infinity"),
        (1e39, "beyond float32"),
        pytest.param(10**5000, "beyond float32", id="huge"),
        (({"acc": 1}, 1.0), "2 rewards"),
        (("1",), "str"),
        ({"mean": 1.0}, "a part called 'mean'"),
        ({1: 1.0}, "at token 1, and the sample has 1 trained"),
    ],
)
def test_anything_else_is_refused_with_the_sample_and_the_function(value, what):
    def my_reward(s):
        return value if s.id == "p@0/1" else 0.0

    with pytest.raises(RewardError, match=rf"my_reward returned .*{what}.* for sample p@0/1; return a"):
        score_groups(GROUPS, my_reward)


def test_an_exception_names_the_sample_and_keeps_its_cause():
    def fragile(s):
        return float(s.text)

    bad = [Group("p@0", (sample(0, "42"), sample(1, "forty")))]
    with pytest.raises(RewardError, match=r"fragile raised ValueError on sample p@0/1: could not") as caught:
        score_groups(bad, fragile)
    assert isinstance(caught.value.__cause__, ValueError)


def raising(error):
    def harsh(s):
        if s.id == "p@0/1":
            raise error

        return 0.0

    return harsh


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), GeneratorExit(), SystemExit("done")])
def test_what_is_no_exception_to_python_names_the_sample_too(error):
    """A reward that runs what a model wrote meets `exit()`: not the end of the run."""
    with pytest.raises(RewardError, match=rf"harsh raised {type(error).__name__} on sample p@0/1") as caught:
        score_groups(GROUPS, raising(error))
    assert caught.value.__cause__ is error
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_of_the_operator_is_no_fault_of_the_reward(number):
    """Negative control: really delivered, in the middle of the function."""

    def slow(s):
        signal.raise_signal(number)
        return 0.0

    def leave(number, frame):
        raise AskedToLeave(number)

    before = signal.signal(number, leave)
    try:
        with pytest.raises(AskedToLeave) as caught:
            score_groups(GROUPS, slow)
    finally:
        signal.signal(number, before)
    assert caught.value.code == {signal.SIGINT: 130, signal.SIGTERM: 75}[number]


@pytest.mark.parametrize(
    ("how", "code"),
    [("return", EXIT_COPY), ("raise", EXIT_COPY), ("exit 3", 3), ("exit", 0), ("exit why", 1)],
)
def test_a_process_that_the_reward_forks_never_comes_back(capfd, how, code):
    parent = os.getpid()
    children = []

    def forking(s):
        if s.id == "p@0/1" and (child := os.fork()):
            children.append(child)
        elif os.getpid() != parent:
            if how.startswith("exit"):
                sys.exit({"exit 3": 3, "exit": None, "exit why": "why"}[how])
            if how == "raise":
                raise ValueError("in the child")
        return 0.5

    scored = score_groups(GROUPS, forking)
    if os.getpid() != parent:  # the check below can fail: without the guard the copy runs on, to here
        os._exit(99)
    assert [s.reward for group in scored for s in group.samples] == [0.5] * 3
    (child,) = children
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    said = capfd.readouterr().err
    assert ("forked on sample p@0/1, and the new process came back" in said) == (not how.startswith("exit"))


def test_a_module_that_exits_while_it_is_imported_is_refused(tmp_path, monkeypatch):
    (tmp_path / "exiting_rewards.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot import exiting_rewards \(SystemExit: 0\)"):
        load_reward("exiting_rewards:f")


def test_a_function_is_loaded_from_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def length(sample):\n    return len(sample.text)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_reward("my_rewards:length")(sample(0, "123")) == 3
    assert load_reward("mcore_rl.rewards.exact:exact_match") is exact_match


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_match", "not of the form `module:function`"),
        (":f", "not of the form"),
        ("no_such_module:f", "cannot import no_such_module .*ModuleNotFoundError.*PYTHONPATH"),
        ("mcore_rl.rewards.exact:exact_mach", "has no exact_mach; did you mean exact_match"),
        ("mcore_rl.rewards.exact:zzz", "has no zzz; check the name"),
        ("math:pi", "must be a function of one argument"),
        ("math:atan2", "must be a function of one argument"),
    ],
)
def test_a_name_that_is_no_reward_function(name, message):
    with pytest.raises(ConfigError, match=message):
        load_reward(name)


def test_a_module_that_fails_to_import_keeps_its_cause(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("raise OSError('no disk')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot import broken_rewards \(OSError: no disk\)") as caught:
        load_reward("broken_rewards:f")
    assert isinstance(caught.value.__cause__, OSError)
