"""The built-in reward, and loading a function by name."""

import sys

import pytest

from mcore_rl.errors import ConfigError
from mcore_rl.rewards import load_reward
from mcore_rl.rewards.exact import exact_match
from mcore_rl.types import Prompt, Sample, VersionSpan


def sample(k, text, label="42"):
    prompt = Prompt("p", "40+2=", (1,), label)
    return Sample.of_response(f"p@0/{k}", prompt, (2,), (-0.5,), text, "stop", (VersionSpan("0", 0, 1),))


def test_exact_match_ignores_surrounding_white_space_only():
    assert exact_match(sample(0, " 42 ")) == 1.0
    assert exact_match(sample(0, "42", " 42\n")) == 1.0
    assert [exact_match(sample(0, text)) for text in ("4 2", "042", "", "42.")] == [0.0] * 4


def test_a_module_that_exits_while_it_is_imported_is_refused(tmp_path, monkeypatch):
    (tmp_path / "exiting_rewards.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot import .*\(SystemExit: 0 at .*exiting_rewards\.py:2"):
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


def test_the_message_names_the_key_that_names_the_function():
    with pytest.raises(ConfigError, match=r"^eval\.sets\.math\.reward: .* has no zzz"):
        load_reward("mcore_rl.rewards.exact:zzz", "eval.sets.math.reward")


def test_a_module_that_fails_to_import_keeps_its_cause(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("raise OSError('no disk')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"import .*\(OSError: no disk at .*broken_rewards\.py:1") as caught:
        load_reward("broken_rewards:f")
    assert isinstance(caught.value.__cause__, OSError)
