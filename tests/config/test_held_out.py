"""Held-out sets in a configuration: their names, and keys that cannot go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_rl.config import Config, load_config, to_toml
from mcore_rl.config.held_out import set_name
from mcore_rl.errors import ConfigError

BASE = """
[run]
dir = "r"
[model]
path = "m"
[data]
train = "t.jsonl"
[train]
steps = 3
[eval.sets.one]
path = "e.jsonl"
"""
MANY = {"samples": 4, "pass_at": [1, 4], "majority_at": [3]}
MODEL = ["--reward.model=rm"]


def load(tmp_path: Path, *flags: str, **keys: object) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(BASE)
    of_set = [f"--eval.sets.one.{key}={value}" for key, value in keys.items()]
    return load_config(path, [*of_set, *flags])


@pytest.mark.parametrize(
    ("keys", "flags", "message", "remedy"),
    [
        (MANY | {"pass_at": [5]}, [], "eval.sets.one.pass_at: 5 of 4 samples", {"samples": 5}),
        (MANY | {"majority_at": [5]}, [], "eval.sets.one.majority_at: 5 of 4 samples", {"samples": 5}),
        (MANY | {"pass_at": [2, 2]}, [], "pass_at: names a number twice", {"pass_at": [2]}),
        (MANY | {"temperature": 0}, [], "eval.sets.one.samples: the likeliest", {"temperature": 0.5}),
        (MANY | {"top_k": 1}, [], "eval.sets.one.samples: the likeliest", {"top_k": 2}),
        ({"top_k": 1, "top_p": 0.5}, [], "top_p: has no effect", {"top_p": 1}),
        ({"pass_reward": 0.5}, [], "pass_reward: has no effect", {"pass_at": [1]}),
        ({"answer": "a:b"}, [], "answer: has no effect without majority_at", {"majority_at": [1]}),
        (MANY | {"reward": "a:b"}, [], "eval.sets.one.answer: required", {"answer": "a:c"}),
        ({"pass_at": [1]}, MODEL, "pass_reward: required", {"pass_reward": 0.1}),
        ({"majority_at": [1], "pass_reward": 1}, MODEL, "answer: required", {"answer": "a:b"}),
        ({"samples": 0}, [], "eval.sets.one.samples: must be greater", {"samples": 1}),
        ({"top_p": 0}, [], "eval.sets.one.top_p: must be greater", {"top_p": 0.1}),
        ({"pth": 3}, [], "unknown key; did you mean eval.sets.one.path", None),
        ({}, ["--data.eval=x/One.jsonl"], "data.eval: .* a set called One too", None),
        ({}, ["--eval.sets.ONE.path=x"], "eval.sets: two sets are called one, but for capitals", None),
        ({}, ["--eval.sets.a/b.path=x"], "eval.sets: the name of a set", None),
        ({}, ["--eval.sets.-a.path=x"], "eval.sets: the name of a set", None),
        ({}, ["--eval.sets.two.samples=1"], "eval.sets.two.path: required", None),
        ({}, ["--eval.sets=3"], "eval.sets: must be an object", None),
    ],
)
def test_what_cannot_be_is_refused_and_its_remedy_accepted(tmp_path, keys, flags, message, remedy) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, *flags, **keys)
    if remedy is not None:
        load(tmp_path, *flags, **{**keys, **remedy})


def test_a_configuration_with_sets_is_read_back_as_it_was_written(tmp_path) -> None:
    config = load(tmp_path, "--data.eval=held out.jsonl", "--eval.sets.two.path=f.jsonl", **MANY)
    text = to_toml(config)
    assert "[eval.sets.one]" in text
    (tmp_path / "again.toml").write_text(text)
    assert load_config(tmp_path / "again.toml") == config
    assert list(config.held_out) == ["held_out", "one", "two"]


@pytest.mark.parametrize(
    ("file", "name"), [("a/math.jsonl", "math"), ("gsm8k test.parquet", "gsm8k_test"), (".jsonl", "_jsonl")]
)
def test_a_file_without_a_set_gives_its_name(file: str, name: str) -> None:
    assert set_name(Path(file)) == name


def test_a_reward_model_has_to_hold_what_a_set_samples(tmp_path) -> None:
    flags = ["--train.tokens_per_micro_batch=1100", *MODEL]
    load(tmp_path, "--train.tokens_per_micro_batch=1100", max_new_tokens=100)
    with pytest.raises(ConfigError, match="cannot hold one sequence of 1125"):
        load(tmp_path, *flags, max_new_tokens=100)
    load(tmp_path, *flags, max_new_tokens=100, reward='"a:b"')
