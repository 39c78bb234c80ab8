"""A directory of checkpoints after everything that can happen to it: only whole ones count, by name."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mcore_rl.checkpoint import committed, find, manifest
from mcore_rl.checkpoint.directory import CheckpointDirectory
from mcore_rl.checkpoint.image import Written
from mcore_rl.checkpoint.manifest import COMMITTED, MANIFEST
from mcore_rl.checkpoint.torch_dist import METADATA, data_file
from mcore_rl.directories import LOCK, MARK, is_ours
from mcore_rl.errors import CheckpointError, ConfigError, DamagedCheckpointError
from mcore_rl.model.hf.unpickle import read_metadata
from tests.checkpoint.support import step_in, write

FILES = (data_file(0), METADATA, "metadata.json", "common.pt", MANIFEST, COMMITTED)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Steps 1 and 2, committed."""
    directory = CheckpointDirectory(tmp_path / "checkpoints", keep=2)
    with directory.locked():
        write(directory, 1)
        write(directory, 2)
    return directory.root


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def test_the_newest_and_the_one_before(two: Path) -> None:
    assert [step_in(find(two, which)) for which in ("latest", "previous", str(two / "step_1"))] == [2, 1, 1]
    assert {path.name for path in (two / "step_2").iterdir()} == {*FILES, MARK}


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, link])
def test_damage_is_refused_by_name_and_previous_works(two: Path, name: str, damage: Callable) -> None:
    damage(two / "step_2" / name)
    with pytest.raises((DamagedCheckpointError, ConfigError)) as caught:
        step_in(find(two, "latest"))
    if name == MANIFEST and damage is Path.unlink:
        assert "step_2" in str(caught.value)
    else:
        assert str(two / "step_2" / name) in str(caught.value)
        assert "--resume previous" in str(caught.value)
    assert step_in(find(two, "previous")) == 1


def test_without_its_mark_it_is_none(two: Path) -> None:
    (two / "step_2" / COMMITTED).unlink()
    assert find(two, "latest").step == 1
    with pytest.raises(ConfigError, match="no committed checkpoint"):
        find(two, str(two / "step_2"))
    with pytest.raises(ConfigError, match="holds 1 committed"):
        find(two, "previous")


def test_what_a_crash_left_is_cleared_away(two: Path) -> None:
    shutil.copytree(two / "step_2", two / "step_3.partial")
    (two / "step_3.partial" / COMMITTED).unlink()
    (two / "step_2" / COMMITTED).unlink()
    (two / "step_1").rename(two / "step_1.superseded")
    with CheckpointDirectory(two, 2).locked():
        assert sorted(path.name for path in two.iterdir()) == ["LOCK", "step_1"]
        assert step_in(find(two, "latest")) == 1


def test_a_whole_one_is_kept_although_its_rename_was_missed(two: Path) -> None:
    (two / "step_2").rename(two / "step_2.partial")
    assert find(two, "latest").step == 1
    with CheckpointDirectory(two, 2).locked():
        assert step_in(find(two, "latest")) == 2


def test_the_newest_stay_and_a_left_history_goes(two: Path) -> None:
    directory = CheckpointDirectory(two, keep=2)
    with directory.locked():
        write(directory, 4)
        write(directory, 6)
        assert [step for step, _ in committed(two)] == [4, 6]
        write(directory, 5)  # a run that continued after step 4
        assert [step for step, _ in committed(two)] == [4, 5]
        flip(two / "step_5" / data_file(0))
        write(directory, 5)  # reached again
        assert step_in(find(two, "latest")) == 5


def test_two_jobs(two: Path) -> None:
    busy = pytest.raises(CheckpointError, match=rf"in use by process {os.getpid()} on")
    with CheckpointDirectory(two, 2).locked(), busy:
        CheckpointDirectory(two, 2).locked().__enter__()
    with CheckpointDirectory(two, 2).locked():
        pass


# --- what is not ours ----------------------------------------------------------------------------------


def foreign(place: Path) -> Path:
    """A directory of another program."""
    (place / "policy").mkdir(parents=True)
    (place / "policy" / "weights.bin").write_text("precious")
    (place / COMMITTED).write_text("a word of its own")
    return place / "policy" / "weights.bin"


@pytest.mark.parametrize("name", ["step_7", "step_900", "step_3.partial", "step_1.superseded"])
def test_what_another_program_wrote_is_refused_before_anything_is_cleared(two: Path, name: str) -> None:
    precious = foreign(two / name)
    (two / "step_2" / COMMITTED).unlink()  # ours, and due to be cleared away
    with pytest.raises(ConfigError, match=rf"holds {name}, which mcore_rl did not write.*set checkpoint.dir"):
        CheckpointDirectory(two, 2).locked().__enter__()
    assert precious.read_text() == "precious"
    assert (two / "step_2").is_dir()
    shutil.move(two / name, two.parent)
    with CheckpointDirectory(two, 2).locked():
        assert not (two / "step_2").exists()


def test_a_directory_that_was_never_ours_is_left_as_it_was(tmp_path: Path) -> None:
    foreign(tmp_path / "disk" / "step_100")
    with pytest.raises(ConfigError, match="holds step_100"):
        CheckpointDirectory(tmp_path / "disk", 2).locked().__enter__()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["step_100"]


def test_what_is_not_named_like_a_checkpoint_disturbs_nobody(two: Path) -> None:
    precious = [foreign(two / name) for name in ("lost+found", "step_1_backup", "iter_7")]
    with CheckpointDirectory(two, 2).locked():
        write(CheckpointDirectory(two, 2), 3)
    assert [path.read_text() for path in precious] == ["precious"] * 3


def test_what_comes_meanwhile_into_the_way_of_a_checkpoint_stays(two: Path) -> None:
    directory = CheckpointDirectory(two, 2)
    with directory.locked():
        precious = foreign(two / "step_3.partial")
        with pytest.raises(ConfigError, match="holds files and no mark of mcore_rl"):
            write(directory, 3)
    assert precious.read_text() == "precious"


def test_checkpoints_of_a_version_without_marks_go_on(two: Path) -> None:
    for step in ("step_1", "step_2"):
        (two / step / MARK).unlink()
    directory = CheckpointDirectory(two, keep=2)
    with directory.locked():
        assert all(is_ours(path, "checkpoint") for _, path in committed(two)), "their manifests are ours"
        write(directory, 3)
    assert [step for step, _ in committed(two)] == [2, 3]


@pytest.mark.parametrize("name", ["step_2", "step_2.partial"])
def test_what_a_version_without_marks_left_unfinished_is_not_guessed_at(two: Path, name: str) -> None:
    (two / "step_2" / COMMITTED).unlink()
    (two / "step_2" / MARK).unlink()
    (two / "step_2").rename(two / name)
    with pytest.raises(ConfigError, match=rf"holds {name}, which mcore_rl did not write, or an earlier"):
        CheckpointDirectory(two, 2).locked().__enter__()


def test_a_job_that_writes_is_not_taken_for_another_program(two: Path) -> None:
    """It makes a directory, and marks it a moment later."""
    with CheckpointDirectory(two, 2).locked():
        foreign(two / "step_3.partial")
        assert (two / LOCK).exists()
        with pytest.raises(CheckpointError, match="in use by"):
            CheckpointDirectory(two, 2).locked().__enter__()


# --- disks --------------------------------------------------------------------------------------------


def test_no_room_is_said_before_anything_is_written(small_disk) -> None:
    directory = CheckpointDirectory(small_disk("size=256k"), 2)
    with directory.locked():
        write(directory, 1)
        with pytest.raises(CheckpointError, match=r"needs 400000 bytes, \d+ are free; make room"):
            directory.begin(2, 400_000)
        assert step_in(find(directory.root, "latest")) == 1


@pytest.mark.parametrize("options", ["size=64k", "size=1m,nr_inodes=14"], ids=["bytes", "inodes"])
def test_a_disk_that_fills_up_while_writing(small_disk, options: str) -> None:
    directory = CheckpointDirectory(small_disk(options), 2)
    with directory.locked():
        write(directory, 1)
        with pytest.raises((CheckpointError, OSError), match="No space left on device"):
            write_as_if_there_were_room(directory, 2)
        assert step_in(find(directory.root, "latest")) == 1
    with directory.locked():
        assert sorted(path.name for path in directory.root.iterdir()) == ["LOCK", "step_1"]


def write_as_if_there_were_room(directory: CheckpointDirectory, step: int) -> None:
    """The room that `begin` saw is taken by someone else before the first byte."""
    filler = directory.root / "filler"
    partial = directory.begin(step, 0)
    free = shutil.disk_usage(directory.root).free
    try:
        filler.write_bytes(bytes(max(0, free - 4096)))
        directory.commit(partial, step, [], {"data": bytes(40_000), "more": b"x"}, {})
    finally:
        filler.unlink()


def test_a_read_only_disk(small_disk) -> None:
    disk = small_disk("size=1m")
    directory = CheckpointDirectory(disk, 2)
    with directory.locked():
        write(directory, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(CheckpointError, match=r"Read-only file system.*set checkpoint.dir"):
        directory.locked().__enter__()
    assert step_in(find(disk, "latest")) == 1, "resuming from it works"


def test_a_file_where_the_directory_belongs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"a file, or a link .*Not a directory.*set checkpoint.dir"):
        CheckpointDirectory(tmp_path / "file" / "checkpoints", 2).locked().__enter__()
    with pytest.raises(ConfigError, match="holds 0 committed"):
        find(tmp_path / "file", "latest")


# --- hostile files ------------------------------------------------------------------------------------


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (str(self.canary),))


def replace(path: Path, name: str, content: bytes) -> None:
    """Put `content` in the place of a file, with checksums that fit: the attacker can write everything."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    text = json.dumps(manifest).encode()
    (path / MANIFEST).write_bytes(text)
    (path / COMMITTED).write_text(hashlib.sha256(text).hexdigest())


def test_a_metadata_that_runs_something_is_refused(two: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    content = pickle.dumps(Payload(canary))
    replace(two / "step_2", METADATA, content)
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata: refused: it names (posix|os)\.mkdir"):
        step_in(find(two, "latest"))
    assert not canary.exists()
    pickle.loads(content)  # noqa: S301  our own payload
    assert canary.exists(), "the payload was live"


def test_a_tensor_that_runs_something_is_refused(two: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    archive = io.BytesIO()
    torch.save(Payload(canary), archive)
    place = next(iter(read_metadata(two / "step_2" / METADATA).storage_data.values()))
    content = bytearray((two / "step_2" / data_file(0)).read_bytes())
    assert place.offset == 0
    assert len(archive.getvalue()) < place.length
    content[place.length - len(archive.getvalue()) : place.length] = archive.getvalue()
    content[: place.length - len(archive.getvalue())] = bytes(place.length - len(archive.getvalue()))
    replace(two / "step_2", data_file(0), bytes(content))
    with pytest.raises(DamagedCheckpointError, match=r"distcp: refused: "):
        step_in(find(two, "latest"))
    assert not canary.exists()
    torch.load(io.BytesIO(archive.getvalue()), weights_only=False)
    assert canary.exists(), "the payload was live"


def test_metadata_that_points_elsewhere_is_refused(two: Path) -> None:
    path = two / "step_2"
    metadata = read_metadata(path / METADATA)
    for place in metadata.storage_data.values():
        place.relative_path = "../step_1/" + data_file(0)
    replace(path, METADATA, pickle.dumps(metadata))
    with pytest.raises(DamagedCheckpointError, match="which the manifest does not list"):
        step_in(find(two, "latest"))
    replace(path, METADATA, pickle.dumps({"not": "metadata"}))
    with pytest.raises(DamagedCheckpointError, match="not the metadata"):
        step_in(find(two, "latest"))


@pytest.mark.parametrize("name", ["../x", "a/../b", "/etc/passwd", "a//b", "./x", "", ".", ".."])
def test_a_manifest_names_files_of_its_own_directory_only(tmp_path: Path, name: str) -> None:
    """In a folder of it too: chat templates have one."""
    for known, refused in (("folder/file", False), (name, True)):
        content = json.dumps({"format": 1, "step": 0, "run": {}, "files": {known: [1, "00"]}}).encode()
        (tmp_path / MANIFEST).write_bytes(content)
        (tmp_path / COMMITTED).write_text(hashlib.sha256(content).hexdigest())
        with pytest.raises(ConfigError, match="no files of it") if refused else nullcontext():
            assert list(manifest.read(tmp_path).files) == [known]


def test_a_name_that_no_file_system_takes_is_damage(tmp_path: Path) -> None:
    manifest.commit(tmp_path, [Written("a" * 300, 1, "00")])
    with pytest.raises(DamagedCheckpointError, match=r"cannot be looked at \(File name too long\)"):
        manifest.read(tmp_path).check()
