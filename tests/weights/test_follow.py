"""Followers: the newest version whole on their machine, by changes where they can, and an error where not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mcore_rl.directories import make
from mcore_rl.errors import ConfigError, StorageError, WeightSyncError
from mcore_rl.weights.delta import SUFFIX, Writer
from mcore_rl.weights.follow import (
    DEAD_SECONDS,
    FOLLOWERS,
    Follower,
    State,
    announce,
    states,
    wait_for_followers,
)
from tests.sources import ROOT
from tests.weights.test_delta import damaged, stepped, weights, write


class Trainer:
    """Writes versions as a run does: complete, then announced."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.writer = Writer()
        self.tensors = weights()

    def publish(self, version: int, *, then: Callable[[Path], None] = lambda _: None) -> str:
        self.tensors = stepped(self.tensors) if version else self.tensors
        target = self.directory / str(version)
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(f'{{"version": {version}}}')
        (target / "templates").mkdir(exist_ok=True)
        (target / "templates" / "a.jinja").write_text(f"{version}")
        write(self.writer, self.tensors, target / "m.safetensors")
        then(target)
        return announce(self.directory, str(version))


def holds(directory: Path, trainer: Trainer) -> bool:
    found = load_file(directory / "m.safetensors")
    return all(torch.equal(found[name], tensor) for name, tensor in trainer.tensors.items())


def test_it_keeps_up_and_keeps_two(tmp_path):
    trainer, target = Trainer(tmp_path / "shared"), tmp_path / "local"
    follower = Follower(trainer.directory, target)
    for version in range(4):
        edition = trainer.publish(version)
        assert (trainer.directory / str(version) / f"m.safetensors{SUFFIX}").exists() is (version > 0)
        follower.step()
        wait_for_followers(trainer.directory, edition, timeout=0.0)
        assert holds(target / str(version), trainer)
        assert (target / str(version) / "config.json").read_text() == f'{{"version": {version}}}'
        assert (target / str(version) / "templates" / "a.jinja").read_text() == str(version)
    assert sorted(path.name for path in target.iterdir()) == ["2", "3"]


@pytest.mark.parametrize(("name", "kind"), [("7", "run"), ("initial", "checkpoint"), ("mine", "weights")])
def test_what_is_not_named_and_marked_as_a_version_stays(tmp_path, name, kind):
    trainer, target = Trainer(tmp_path / "shared"), tmp_path / "local"
    make(target / name, "", kind=kind)
    (target / name / "mine").write_text("precious")
    make(target / "9.partial", "", kind="weights")
    follower = Follower(trainer.directory, target)
    for version in range(3):
        trainer.publish(version)
        follower.step()
    assert (target / name / "mine").read_text() == "precious"
    assert {path.name for path in target.iterdir()} == {name, "1", "2"}


def test_the_same_version_of_another_run_is_news(tmp_path):
    trainer, target = Trainer(tmp_path / "shared"), tmp_path / "local"
    follower = Follower(trainer.directory, target)
    trainer.publish(1)
    follower.step()
    again = Trainer(tmp_path / "shared")
    again.tensors = {name: -tensor for name, tensor in again.tensors.items()}
    edition = again.publish(1)
    with pytest.raises(WeightSyncError, match="have not made version 1"):
        wait_for_followers(again.directory, edition, timeout=0.0)
    follower.step()
    assert holds(target / "1", again)


def test_one_that_came_late_says_so_and_takes_the_next_whole_version(tmp_path):
    trainer, target = Trainer(tmp_path / "shared"), tmp_path / "local"
    trainer.publish(0)
    edition = trainer.publish(1)
    follower = Follower(trainer.directory, target)
    follower.step()
    with pytest.raises(WeightSyncError, match=r"version 1: .*nothing here"):
        wait_for_followers(trainer.directory, edition, timeout=0.0)
    able = Follower(trainer.directory, tmp_path / "other")
    able.state = State("able", have=edition)
    able.step()
    able._say(able.state)
    wait_for_followers(trainer.directory, edition, timeout=0.0, able={"able"})  # the late one is not asked
    trainer.writer.forget()
    trainer.publish(2)
    follower.step()
    assert holds(target / "2", trainer)


@pytest.mark.parametrize("version", [0, 1])
def test_a_damaged_version_is_not_taken(tmp_path, version):
    """Whole at 0, changes at 1: one bit is enough, and the version before stays."""
    trainer, target = Trainer(tmp_path / "shared"), tmp_path / "local"
    follower = Follower(trainer.directory, target)
    if version:
        trainer.publish(0)
        follower.step()
    file = f"m.safetensors{SUFFIX if version else ''}"
    edition = trainer.publish(version, then=lambda target: damaged(target / file))
    follower.step()
    with pytest.raises(WeightSyncError, match="not the file that was written"):
        wait_for_followers(trainer.directory, edition, timeout=0.0)
    assert not (target / str(version)).exists()
    assert (target / "0").exists() is (version == 1)


def test_nobody_follows(tmp_path):
    trainer = Trainer(tmp_path / "shared")
    with pytest.raises(WeightSyncError, match="start `mcore-rl follow"):
        wait_for_followers(trainer.directory, trainer.publish(0), timeout=0.0)


def test_the_dead_are_not_waited_for(tmp_path):
    trainer = Trainer(tmp_path / "shared")
    living, dead = (Follower(trainer.directory, tmp_path / name) for name in ("living", "dead"))
    dead.state = State("dead-1")
    for follower in (living, dead):
        follower.step()
    edition = trainer.publish(0)
    living.step()
    with pytest.raises(WeightSyncError, match="dead-1"):
        wait_for_followers(trainer.directory, edition, timeout=0.0)
    long_ago = time.time() - DEAD_SECONDS - 1
    os.utime(trainer.directory / FOLLOWERS / "dead-1.json", (long_ago, long_ago))
    wait_for_followers(trainer.directory, edition, timeout=0.0)


@pytest.mark.slow
def test_the_command_follows_until_it_is_asked_to_end(tmp_path):
    trainer, target = Trainer(tmp_path / "shared"), tmp_path / "local"
    edition = trainer.publish(0)
    command = [sys.executable, "-m", "mcore_rl", "follow", str(trainer.directory), str(target)]
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while not states(trainer.directory) and time.monotonic() < end:
            time.sleep(0.1)
        wait_for_followers(trainer.directory, edition, timeout=30.0)
        edition = trainer.publish(1)
        wait_for_followers(trainer.directory, edition, timeout=30.0)
        assert holds(target / "1", trainer)
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=30) == 128 + signal.SIGTERM
    finally:
        child.kill()
        child.wait()
    assert states(trainer.directory) == []
    assert "version 1" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("version", ["../outside", "7/..", "/", ".", "x" * 300, "\udcff"])
def test_a_version_that_is_no_name_of_one_is_not_taken(tmp_path, version):
    trainer, target = Trainer(tmp_path / "shared"), tmp_path / "there" / "local"
    trainer.publish(0)
    (trainer.directory / "LATEST").write_bytes(f"{version} 1".encode(errors="surrogateescape"))
    (tmp_path / "outside").mkdir()
    follower = Follower(trainer.directory, target)
    follower.step()
    assert "is no version of weights" in follower.state.why
    assert len(follower.state.why) < 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "shared"]


@pytest.mark.parametrize(
    "said", [{"name": 5}, {"name": ["a"]}, {"name": "a", "have": 1}, {"name": "a", "why": {}}]
)
def test_what_is_no_state_of_a_follower_is_none(tmp_path, said):
    (tmp_path / FOLLOWERS).mkdir()
    (tmp_path / FOLLOWERS / "a.json").write_text(json.dumps(said))
    assert states(tmp_path) == []


def test_a_source_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for source in (tmp_path / "file", tmp_path / ("x" * 300), tmp_path / "loop"):
        follower = Follower(source, tmp_path / "local")
        with pytest.raises(StorageError, match=r"LATEST|followers"):
            follower.run()


@pytest.mark.parametrize("inside", ["", "7", "followers"])
def test_it_does_not_follow_into_what_it_follows(tmp_path: Path, inside: str) -> None:
    source, link = tmp_path / "weights", tmp_path / "link"
    source.mkdir()
    link.symlink_to(source)
    for one, other in ((source, link / inside), (source / inside, link)):
        with pytest.raises(ConfigError, match=r"TARGET: .* are not apart; name another TARGET"):
            Follower(one, other)
    Follower(source, tmp_path / "weights_here")
