"""What a directory of samples remembers of the config that they follow from; what a run on dumps is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_rl.config import Config, load_config
from mcore_rl.directories import mark
from mcore_rl.errors import ConfigError
from mcore_rl.training.dump_directories import check_directory, doubts_of_source, origin_of

DYNAMIC = ("--rollout.dynamic_sampling", "4")
DECOUPLED = ("--algorithm.params.decoupled", "true")


def config_of(folder: Path, *flags: str) -> Config:
    path = folder / "run.toml"
    path.write_text(f'run.dir = "{folder}/r"\nmodel.path = "m"\ndata.train = "t.jsonl"\ntrain.steps = 1\n')
    return load_config(path, ("--algorithm.name", "grpo", *flags))


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        ((), DECOUPLED, None),  # no group is replaced, and the samples are the same
        (DYNAMIC, (*DYNAMIC, *DECOUPLED), "algorithm.params.decoupled"),
        ((*DYNAMIC, *DECOUPLED), DYNAMIC, "algorithm.params.decoupled"),
        ((), ("--rollout.routing_replay", "true"), "rollout.routing_replay"),
        (("--rollout.routing_replay", "true"), (), "rollout.routing_replay"),
        ((), ("--rollout.temperature", "0.5"), "rollout.temperature"),
    ],
)
def test_samples_of_another_config_are_not_gone_on_with(
    tmp_path: Path, before: tuple[str, ...], now: tuple[str, ...], changed: str | None
) -> None:
    directory = tmp_path / "r" / "rollouts"
    directory.mkdir(parents=True)
    mark(directory, "sampled", follows_from=origin_of(config_of(tmp_path, *before)))
    assert check_directory(config_of(tmp_path, *before)) == 0
    if changed is None:
        assert check_directory(config_of(tmp_path, *now)) == 0
        return
    with pytest.raises(ConfigError, match=rf"other values of \['{changed}'\]"):
        check_directory(config_of(tmp_path, *now))


def test_a_run_on_dumps_that_keeps_no_weights_is_told(tmp_path: Path) -> None:
    (said,) = doubts_of_source(config_of(tmp_path, "--checkpoint.every", "0"))
    assert said.startswith("checkpoint.every: 0, and training on dumps publishes nothing")
    assert doubts_of_source(config_of(tmp_path, "--checkpoint.every", "5")) == []


def test_a_curriculum_over_dumps_is_said_to_do_nothing(tmp_path: Path) -> None:
    flags = ("--checkpoint.every", "5", "--data.curriculum", "tests.doctor.rewards:nothing_taken")
    (said,) = doubts_of_source(config_of(tmp_path, *flags))
    assert said.startswith("data.curriculum: has no effect on dumps")
