"""Whose a run's directories are: what another program wrote, another run, another process."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_rl.checkpoint import Saved, manifest
from mcore_rl.checkpoint.image import write_file
from mcore_rl.config import Config, load_config
from mcore_rl.config.lora import LoraConfig
from mcore_rl.directories import MARK, kind_of, make, mark, read_mark
from mcore_rl.errors import ConfigError, StorageError
from mcore_rl.log import read_metrics
from mcore_rl.training.checkpoint import check_adapters_of, check_form
from mcore_rl.training.rundir import (
    RUN_LOCK,
    WEIGHTS_LOCK,
    begin,
    check_history,
    held,
    held_once,
    identity_of,
    open_samples,
    warn_of_others,
)
from tests.sources import ROOT


def config(directory: Path, recipe: str = "gspo_tiny", **overrides: Path) -> Config:
    """A recipe's config with run.dir `directory`; `publish__dir` is publish.dir."""
    keys = {"run.dir": directory, **{key.replace("__", "."): path for key, path in overrides.items()}}
    flags = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return load_config(ROOT / "examples" / f"{recipe}.toml", flags)


def plant(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("precious")
    return file


def save(root: Path, step: int, **document: object) -> Saved:
    """A committed checkpoint with this document."""
    path = root / f"step_{step}"
    make(path, "", kind="checkpoint")
    manifest.commit(path, [write_file(path / "data", b"x")], step=step, run=document)
    return manifest.read(path)


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


# --- what something else wrote --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("run/metrics.jsonl", r"run holds metrics.jsonl without the mark.*set run.dir to another directory"),
        ("run/events.jsonl", "run holds events.jsonl"),
        ("run/resolved.toml", "run holds resolved.toml"),
        ("run/server.log", "run holds server.log"),
        ("run/samples/step_1.jsonl", "run holds samples"),
        ("run/samples", "run holds samples"),
        ("run/weights/1/mine", "weights holds 1 without"),
        ("run/weights/initial/mine", "weights holds initial without"),
        ("run/weights/12.partial/mine", "weights holds 12.partial without"),
        ("publish/1/mine", r"publish holds 1 without the mark.*set publish.dir to another directory"),
    ],
)
def test_what_another_program_wrote_is_refused_and_nothing_is_touched(
    tmp_path: Path, file: str, says: str
) -> None:
    mine = plant(tmp_path / file)
    elsewhere = {"publish__dir": tmp_path / "publish"} if "publish" in file else {}
    with pytest.raises(ConfigError, match=says):
        held(config(tmp_path / "run", **elsewhere), publishes=True).__enter__()
    assert mine.read_text() == "precious"
    assert files(tmp_path) == {file}


def test_files_that_are_not_in_the_way_stay(tmp_path: Path) -> None:
    names = {"notes.txt", "samples/mine.txt", "weights/mine/x", "weights/followers/a.json", "1/x", "step_1/x"}
    for name in names:
        plant(tmp_path / name)
    for keep in (False, True, False):
        with held(config(tmp_path), publishes=True):
            open_samples(tmp_path, keep=keep)
            (tmp_path / "samples" / "step_1.jsonl").write_text("ours")
    open_samples(tmp_path, keep=False)
    assert files(tmp_path) == names | {MARK, RUN_LOCK, f"samples/{MARK}", f"weights/{WEIGHTS_LOCK}"}


def test_an_exported_model_is_replaced_by_supervised_runs_only_where_it_is_ours(tmp_path: Path) -> None:
    plant(tmp_path / "model" / "mine")
    with pytest.raises(ConfigError, match="holds model without the mark"):
        held(config(tmp_path, "sft_tiny"), publishes=False).__enter__()
    mark(tmp_path / "model", "model")
    with held(config(tmp_path, "sft_tiny"), publishes=False):
        pass


@pytest.mark.parametrize(
    ("recipe", "key", "inside", "says"),
    [
        ("gspo_tiny", "model__path", "weights/20", "model.path: .*20 lies in .*20, which this run replaces"),
        ("gspo_tiny", "reward__model", "weights/initial/critic", "reward.model: .* lies in .*initial, which"),
        ("sft_tiny", "model__path", "model", "model.path: .*model lies in .*model, which this run replaces"),
        ("gspo_tiny", "data__train", "samples/step_4.jsonl", "data.train: .* whose files of steps go"),
        ("gspo_tiny", "data__train", "samples", "data.train: .* whose files of steps go"),
        ("gspo_tiny", "data__eval", "eval/step_4.held_out.jsonl", "data.eval: .*set run.dir to another"),
    ],
)
def test_what_a_run_reads_is_not_where_it_would_remove_it(
    tmp_path: Path, recipe: str, key: str, inside: str, says: str
) -> None:
    run_dir, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(run_dir)
    for marked, kind in (("weights/20", "weights"), ("weights/initial", "weights"), ("model", "model")):
        plant(run_dir / marked / "config.json")
        mark(run_dir / marked, kind)
    for name in ("samples/step_4.jsonl", "samples/mine.jsonl", "eval/step_4.held_out.jsonl"):
        plant(run_dir / name)
    for name in ("samples", "eval"):
        mark(run_dir / name, "samples")
    before = files(run_dir)
    for through in (run_dir, link):
        one = config(run_dir, recipe, **{key: through / inside})
        with pytest.raises(ConfigError, match=says):
            held(one, publishes=recipe == "gspo_tiny").__enter__()
    assert files(run_dir) == before


def test_what_a_run_reads_may_lie_beside_what_it_removes(tmp_path: Path) -> None:
    plant(tmp_path / "samples" / "mine.jsonl")
    mark(tmp_path / "samples", "samples")
    plant(tmp_path / "model" / "config.json")
    mark(tmp_path / "model", "model")
    read = {"model__path": tmp_path / "model", "data__train": tmp_path / "samples" / "mine.jsonl"}
    with held(config(tmp_path, **read), publishes=True):  # rl writes no RUN_DIR/model
        pass


def test_a_run_of_a_version_without_marks_is_marked_where_its_checkpoints_say_so(tmp_path: Path) -> None:
    run_dir, root = tmp_path / "run", tmp_path / "disk"
    for name in ("metrics.jsonl", "samples/step_1.jsonl", "weights/2/model.safetensors.index.json"):
        plant(run_dir / name)
    here = config(run_dir, checkpoint__dir=root)
    saved = save(root, 2, config={"run": {"dir": str(tmp_path / "another")}})
    with pytest.raises(ConfigError, match=r"holds metrics.jsonl, samples"):
        held(here, publishes=True).__enter__()
    assert saved.path.is_dir()
    save(root, 3, config={"run": {"dir": str(run_dir)}})
    with held(here, publishes=True):
        kinds = {".": "run", "samples": "samples", "weights/2": "weights"}
        assert {name: kind_of(run_dir / name) for name in kinds} == kinds


def test_a_run_that_lies_where_another_one_publishes_is_refused_and_stays(tmp_path: Path) -> None:
    run = config(tmp_path / "shared" / "1")
    with held(run, publishes=True):
        mine = plant(run.run.dir / "checkpoints" / "step_1" / "data")
    with pytest.raises(ConfigError, match=r"shared holds 1 without the mark"):
        held(config(tmp_path / "a", publish__dir=tmp_path / "shared"), publishes=True).__enter__()
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("kind", ["weights", "model", "checkpoint"])
@pytest.mark.parametrize("below", ["", "run"])
def test_a_run_is_refused_in_a_directory_that_goes_as_a_whole(tmp_path: Path, kind, below: str) -> None:
    make(tmp_path / "1", "", kind=kind)
    with pytest.raises(ConfigError, match=rf"1 is marked as of the kind '{kind}'"):
        held(config(tmp_path / "1" / below), publishes=True).__enter__()
    assert files(tmp_path) == {f"1/{MARK}"}


def test_a_run_in_the_place_of_another_ones_samples_or_model_stays(tmp_path: Path) -> None:
    for name in ("samples", "model"):
        with held(config(tmp_path / name), publishes=True):
            pass
        with pytest.raises(ConfigError, match=f"holds {name} without"):
            held(config(tmp_path, "sft_tiny"), publishes=False).__enter__()
        shutil.rmtree(tmp_path / name)


def test_a_run_directory_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to("disk")
    here = config(tmp_path / "run")
    for _ in range(2):
        with held(here, publishes=True):
            run = begun(tmp_path / "run")
            plant(tmp_path / "run" / "events.jsonl")
    assert read_mark(tmp_path / "disk")["run"] == run


@pytest.mark.parametrize("key", ["run", "publish"])
@pytest.mark.parametrize("taken", [Path.touch, lambda place: place.symlink_to("nowhere")])
def test_a_file_or_a_broken_link_in_the_place_of_a_directory_is_a_fault_of_the_config(
    tmp_path: Path, key: str, taken
) -> None:
    taken(tmp_path / key)
    with pytest.raises(ConfigError, match=rf"{key} cannot be a directory.*set {key}.dir to another"):
        held(config(tmp_path / "run", publish__dir=tmp_path / "publish"), publishes=True).__enter__()
    assert not (tmp_path / key).is_dir()


def test_a_place_that_may_not_be_looked_at_is_named(tmp_path: Path, monkeypatch) -> None:
    """Root may look everywhere, so the system's refusal is put in its place."""

    def refuse(config: Config, saved: object = None) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "closed"))

    monkeypatch.setattr("mcore_rl.training.rundir._is_of_an_earlier_version", refuse)
    with pytest.raises(StorageError, match=r"closed: Permission denied.*set run.dir to another"):
        held(config(tmp_path / "closed" / "run"), publishes=True).__enter__()


# --- another run ------------------------------------------------------------------------------------------


def begun(directory: Path, saved: Saved | None = None) -> str:
    """A run in `directory` goes on after `saved`; its id."""
    known = [(int(path.name[5:]), path) for path in sorted((directory / "checkpoints").glob("step_*"))]
    if saved is not None:
        check_history(config(directory), saved, known)
    identity = identity_of(config(directory), saved)
    begin(config(directory), identity)
    assert read_mark(directory)["run"] == identity.run
    return identity.run


def test_a_run_keeps_its_id_and_a_new_one_gets_another(tmp_path: Path) -> None:
    run = begun(tmp_path)
    assert begun(tmp_path, save(tmp_path / "checkpoints", 1, run_id=run)) == run
    assert begun(tmp_path) != run
    assert "[run]" in (tmp_path / "resolved.toml").read_text()


def test_a_run_directory_that_was_moved_or_lost_is_taken_up_again(tmp_path: Path) -> None:
    saved = save(tmp_path / "checkpoints", 1, run_id="a")
    assert begun(tmp_path, saved) == "a"


def test_a_checkpoint_of_another_run_is_refused_where_a_run_is(tmp_path: Path) -> None:
    other = save(tmp_path / "other" / "checkpoints", 1, run_id="other")
    run = begun(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"a holds another run than .*step_1 is of.*another run.dir"):
        begun(tmp_path / "a", other)
    save(tmp_path / "a" / "checkpoints", 4, run_id=run)
    with pytest.raises(ConfigError, match=r"a holds another run up to step 4 than"):
        begun(tmp_path / "a", other)
    assert read_mark(tmp_path / "a")["run"] == run
    old = save(tmp_path / "old" / "checkpoints", 1, config={})
    with pytest.raises(ConfigError, match="holds another run up to step 4"):
        begun(tmp_path / "a", old)


def test_another_run_is_refused_where_only_the_checkpoints_are_of_one(tmp_path: Path) -> None:
    """Two run directories, one checkpoint.dir."""
    saved = save(tmp_path / "disk", 1, run_id="a")
    here = config(tmp_path / "b", checkpoint__dir=tmp_path / "disk")
    begin(here, identity_of(here, None))
    with pytest.raises(ConfigError, match="b holds another run up to step 1"):
        check_history(here, saved, [(1, saved.path)])


def test_what_holds_no_run_is_not_continued(tmp_path: Path) -> None:
    sound: dict[str, object] = {"config": {}, "updates": {}, "layout": {}, "rng": [], "state": {"cursor": {}}}
    check_form(save(tmp_path, 1, **sound))
    for name in sound:
        without = {key: value for key, value in sound.items() if key != name}
        for document in (without, without | {name: "text"}):
            with pytest.raises(ConfigError, match=rf"holds no run to continue \({name} is not"):
                check_form(save(tmp_path / name / str(len(document)), 1, **document))
    with pytest.raises(ConfigError, match=r"state\.cursor is not"):
        check_form(save(tmp_path / "cursor", 1, **sound | {"state": {}}))


def test_adapters_are_continued_as_they_were_trained(tmp_path: Path) -> None:
    """Another alpha has tensors of the same shapes, fewer targets leave some unread."""
    then = LoraConfig(rank=8, alpha=16.0, targets=("fc1", "qkv"))
    saved = save(tmp_path, 1, config={"lora": then.model_dump(mode="json")})
    whole = save(tmp_path / "whole", 1, config={"lora": LoraConfig().model_dump(mode="json")})
    earlier = save(tmp_path / "earlier", 1, config={})
    same = then.model_copy(update={"targets": ("qkv", "fc1"), "seed": 7, "path": tmp_path})
    for checkpoint, lora in (
        (saved, then),
        (saved, same),
        (whole, LoraConfig(alpha=1.0)),
        (earlier, LoraConfig()),
    ):
        check_adapters_of(checkpoint, lora)
    for key, value in {"rank": 4, "alpha": 8.0, "rslora": True, "targets": ("qkv",)}.items():
        with pytest.raises(ConfigError, match=rf"lora\.{key} = .*step_1 was saved with"):
            check_adapters_of(saved, then.model_copy(update={key: value}))
    for checkpoint, lora in ((saved, LoraConfig()), (whole, then), (earlier, then)):
        with pytest.raises(ConfigError, match=r"lora\.rank = .*step_1 was saved with"):
            check_adapters_of(checkpoint, lora)


def test_a_branch_is_a_run_of_its_own_and_may_begin_again_until_it_has_saved(tmp_path: Path) -> None:
    source = save(tmp_path / "a" / "checkpoints", 1, run_id="a")
    branch = tmp_path / "branch"
    run = begun(branch, source)
    assert run != "a"
    assert begun(branch, source) == run, "it was ended before its first checkpoint"
    with pytest.raises(ConfigError, match="branch holds another run than"):
        begun(branch, save(tmp_path / "a" / "checkpoints", 2, run_id="a"))
    own = save(branch / "checkpoints", 2, run_id=run)
    assert begun(branch, own) == run
    with pytest.raises(ConfigError, match="branch holds another run up to step 2"):
        begun(branch, source)


def test_a_copy_of_a_runs_own_checkpoint_continues_it(tmp_path: Path) -> None:
    run = begun(tmp_path / "a")
    save(tmp_path / "a" / "checkpoints", 2, run_id=run)
    assert begun(tmp_path / "a", save(tmp_path / "archive", 1, run_id=run)) == run


# --- another process, everybody ---------------------------------------------------------------------------


def test_run_and_publish_directories_are_held_by_one(tmp_path: Path) -> None:
    one = config(tmp_path / "a", publish__dir=tmp_path / "publish")
    with held(one, publishes=True):
        with pytest.raises(StorageError, match=rf"a is in use by process {os.getpid()} on .*set run.dir to"):
            held(one, publishes=True).__enter__()
        with pytest.raises(StorageError, match=r"publish is in use by .*set publish.dir to another"):
            held(config(tmp_path / "b", publish__dir=tmp_path / "publish"), publishes=True).__enter__()
        with held(config(tmp_path / "c"), publishes=True):
            pass
    with held(one, publishes=True):
        pass


def test_two_runs_do_not_publish_into_one_directory_also_where_it_lies_in_one_of_them(tmp_path: Path) -> None:
    with held(config(tmp_path / "b"), publishes=True):
        other = config(tmp_path / "a", publish__dir=tmp_path / "b" / "weights")
        with pytest.raises(StorageError, match=r"weights is in use by .*set publish.dir to another"):
            held(other, publishes=True).__enter__()
    with held(other, publishes=True), pytest.raises(StorageError, match="weights is in use by"):
        held(config(tmp_path / "b"), publishes=True).__enter__()


def test_weights_may_be_published_to_the_run_directory_itself(tmp_path: Path) -> None:
    with held(config(tmp_path, publish__dir=tmp_path), publishes=True):
        pass


def test_a_process_that_holds_its_directories_already_goes_on(tmp_path: Path) -> None:
    here = config(tmp_path)
    with held(here, publishes=True), held_once(here, publishes=True):
        pass
    with held_once(here, publishes=True), pytest.raises(StorageError, match="in use by"):
        held(here, publishes=True).__enter__()
    with held(here, publishes=True):
        pass


OWN_SCRIPT = """
import sys
from pathlib import Path
from mcore_rl.config import load_config
from mcore_rl.training.setup import start_trainer
with start_trainer(load_config(Path(sys.argv[1]), sys.argv[2:]), optimizer_steps=1, resume=None):
    print("started")
"""


@pytest.mark.slow
def test_a_script_of_ones_own_does_not_train_in_a_directory_that_a_run_holds(
    tmp_path: Path, dir_a: Path
) -> None:
    own = ["--model.path", str(dir_a), "--run.dir", str(tmp_path / "run"), "--parallel.tensor", "1"]
    (tmp_path / "own.py").write_text(OWN_SCRIPT)
    command = [sys.executable, tmp_path / "own.py", ROOT / "examples" / "gspo_tiny.toml", *own]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rank = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    with held(config(tmp_path / "run"), publishes=True):
        before = files(tmp_path / "run")
        done = subprocess.run(
            command, env=os.environ | rank, capture_output=True, text=True, timeout=120, check=False
        )
        assert files(tmp_path / "run") - before <= {"events.jsonl"}
    assert f"run is in use by process {os.getpid()}" in done.stderr
    assert done.returncode != 0


def test_the_checkpoints_may_lie_in_the_run_directory_itself(tmp_path: Path) -> None:
    from mcore_rl.checkpoint.directory import CheckpointDirectory

    with (
        held(config(tmp_path, checkpoint__dir=tmp_path), publishes=True),
        CheckpointDirectory(tmp_path, 2).locked(),
    ):
        pass


@pytest.mark.parametrize(
    ("umask", "mode", "says"), [(0o000, 0o755, "umask is 000"), (0o022, 0o777, "may write to")]
)
def test_results_that_everybody_may_change_are_warned_of(
    tmp_path: Path, capsys, umask: int, mode: int, says: str
) -> None:
    before = os.umask(0o022)
    try:
        warn_of_others(config(tmp_path))
        assert capsys.readouterr().err == ""
        tmp_path.chmod(mode)
        os.umask(umask)
        warn_of_others(config(tmp_path))
        assert os.umask(0o022) == umask, "it is only looked at"
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
        assert f"chmod -R o-w {tmp_path}" in line
        tmp_path.chmod(0o777 | stat.S_ISVTX)
        warn_of_others(config(tmp_path))
        assert capsys.readouterr().err == "", "as in /tmp, others reach only files of their own"
    finally:
        os.umask(before)
    (event,) = read_metrics(tmp_path / "events.jsonl")
    assert event["kind"] == "world_writable"
    assert event["umask"] == f"{umask:03o}"


# --- full disks -------------------------------------------------------------------------------------------


def test_a_disk_without_room_is_named_file_by_file(small_disk) -> None:
    disk = small_disk("size=64k")
    here = config(disk / "run")
    with held(here, publishes=True):
        begin(here, identity_of(here, None))
        settings = (disk / "run" / "resolved.toml").read_bytes()
        with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
            fill(filler)
        for work in (
            lambda: begin(here, identity_of(here, None)),
            lambda: open_samples(disk / "run", keep=True),
        ):
            with pytest.raises(StorageError, match=r"No space left on device \(0 bytes are free"):
                work()
        assert (disk / "run" / "resolved.toml").read_bytes() == settings
    assert not list(disk.rglob("*.partial"))


def fill(file) -> None:
    while file.write(bytes(4096)):
        pass
