"""What is ours on a disk: nothing without a mark is removed, locks end with a process, files are whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mcore_rl import directories
from mcore_rl.directories import (
    LOCK,
    MARK,
    append_line,
    keeps_no_files,
    locked,
    make,
    mark,
    read_mark,
    remove,
    write_whole,
)
from mcore_rl.errors import EXIT_CONFIG, EXIT_RETRYABLE, CheckpointError, ConfigError, StorageError


def test_what_is_ours_is_made_anew_and_removed(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    make(place, "set x", kind="weights")
    (place / "old").mkdir()
    (place / "old" / "file").touch()
    make(place, "set x", kind="weights")
    assert [path.name for path in place.iterdir()] == [MARK]
    remove(place, "set x", kind="weights")
    assert not place.exists()
    remove(place, "set x", kind="weights")


def as_directory(place: Path) -> Path:
    place.mkdir()
    (place / "mine").write_text("precious")
    return place / "mine"


def as_file(place: Path) -> Path:
    place.write_text("precious")
    return place


def as_link(place: Path) -> Path:
    """Even to a directory with the mark: it may be that of another run."""
    elsewhere = place.with_name("elsewhere")
    make(elsewhere, "", kind="weights")
    (elsewhere / "mine").write_text("precious")
    place.symlink_to(elsewhere)
    return elsewhere / "mine"


def as_broken_link(place: Path) -> Path:
    place.symlink_to("nowhere")
    place.with_name("mine").write_text("precious")
    return place.with_name("mine")


@pytest.mark.parametrize("foreign", [as_directory, as_file, as_link, as_broken_link])
@pytest.mark.parametrize("act", [make, remove])
def test_what_something_else_wrote_stays_and_is_named(tmp_path: Path, act, foreign) -> None:
    mine = foreign(tmp_path / "place")
    with pytest.raises(ConfigError, match=r"place holds .*no mark of mcore_rl.*Move it away, or set x"):
        act(tmp_path / "place", "set x", kind="weights")
    assert mine.read_text() == "precious"
    assert os.path.lexists(tmp_path / "place")


@pytest.mark.parametrize("place", ["/proc/mcore_rl", "/proc/self/mcore_rl/run", "/sys/mcore_rl"])
def test_where_nothing_can_ever_be_written_no_retry_is_advised(place: str, small_disk) -> None:
    """A place of the kernel's own; on a disk that is full, or may not be written, there may be room later."""
    with (
        pytest.raises(ConfigError, match=rf"^{place}: .*keeps no files, .*; set x$"),
        locked(Path(place), "set x"),
    ):
        pass
    assert not os.path.lexists(place)
    refused, broken = OSError(errno.ENOENT, "none"), OSError(errno.EIO, "broken")
    assert not keeps_no_files(small_disk("size=64k") / "new" / "run", refused)
    assert keeps_no_files(Path(place), refused)
    assert not keeps_no_files(Path(place), broken)


def test_an_empty_directory_may_be_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty", "set x", kind="weights")
    assert directories.is_ours(tmp_path / "empty", "weights")


def test_an_interrupted_removal_can_go_on(tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "place"
    make(place, "set x", kind="weights")
    for number in range(3):
        (place / f"part_{number}").mkdir()
    removed: list[Path] = []

    def stop_after_two(path: Path) -> None:
        if len(removed) == 2:
            raise KeyboardInterrupt
        removed.append(path)
        path.rmdir()

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            remove(place, "set x", kind="weights")
    assert directories.is_ours(place, "weights")
    remove(place, "set x", kind="weights")
    assert not place.exists()


@pytest.mark.parametrize("act", [make, remove])
def test_what_is_ours_but_of_another_kind_stays_and_is_named(tmp_path: Path, act) -> None:
    make(tmp_path / "place", "", kind="run")
    (tmp_path / "place" / "mine").write_text("precious")
    with pytest.raises(ConfigError, match=r"marked as of the kind 'run'.*kind 'weights'.*or set x"):
        act(tmp_path / "place", "set x", kind="weights")
    assert (tmp_path / "place" / "mine").read_text() == "precious"
    act(tmp_path / "place", "set x", kind="run")
    assert not (tmp_path / "place" / "mine").exists()


def test_the_mark_keeps_what_it_is_given_and_a_damaged_one_says_nothing(tmp_path: Path) -> None:
    mark(tmp_path, "run", run="a")
    assert read_mark(tmp_path) == {"kind": "run", "run": "a"}
    assert directories.is_ours(tmp_path, "run")
    for damaged in ("", "[1]", "{", "[" * 100_000):
        (tmp_path / MARK).write_text(damaged)
        assert read_mark(tmp_path) == {}
        assert not directories.is_ours(tmp_path, "run"), "nobody knows what it is"


# --- locks --------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from mcore_rl.directories import locked
with locked(Path(sys.argv[1]), "set x"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_by_the_name_of_the_first_and_a_dead_one_blocks_nobody(
    tmp_path: Path,
) -> None:
    place = tmp_path / "place"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(place)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        named = rf"place is in use by process {holder.pid} on .*: two runs .* Wait for it, or set x"
        with pytest.raises(StorageError, match=named) as caught:
            locked(place, "set x").__enter__()
        assert caught.value.exit_code == EXIT_RETRYABLE
        with pytest.raises(CheckpointError):
            locked(place, "set x", CheckpointError).__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=10)
        assert str(holder.pid) in (place / LOCK).read_text(), "its name is still there"
        with locked(place, "set x"):
            assert str(os.getpid()) in (place / LOCK).read_text()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close() if holder.stdout else None


FORK = """
import os, signal, sys, time
from pathlib import Path
from mcore_rl.directories import locked
with locked(Path(sys.argv[1]), "set x"):
    child = os.fork()
    os.write(1, f"{child}\\n".encode())  # whole: both of them write to one pipe
    time.sleep(60)
"""


def test_a_process_that_the_holder_forked_neither_keeps_the_lock_nor_gives_it_back(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORK, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = max(int(holder.stdout.readline()) for _ in range(2))  # it says 0 of itself
    try:
        with pytest.raises(StorageError, match=f"in use by process {holder.pid}"):
            locked(tmp_path, "set x").__enter__()
        holder.kill()
        holder.wait(timeout=10)
        os.kill(child, 0)  # it lives
        with locked(tmp_path, "set x"):
            pass
    finally:
        holder.kill()
        holder.wait()
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def as_file_above(place: Path) -> Path:
    place.touch()
    return place / "run"


def as_it_is(make_it):
    def made(place: Path) -> Path:
        make_it(place)
        return place

    return made


def as_a_loop(place: Path) -> Path:
    place.symlink_to(place)
    return place / "run"


@pytest.mark.parametrize("taken", [as_it_is(as_file), as_it_is(as_broken_link), as_file_above, as_a_loop])
def test_a_place_that_cannot_be_a_directory_is_named(tmp_path: Path, taken) -> None:
    with pytest.raises(
        ConfigError, match=r"place.*cannot be a directory: a file, or a link .*set x"
    ) as caught:
        locked(taken(tmp_path / "place"), "set x", CheckpointError).__enter__()
    assert caught.value.exit_code == EXIT_CONFIG


# --- files --------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_a_whole_file_as_it_was(small_disk) -> None:
    disk = small_disk("size=64k")
    write_whole(disk / "file", "old")
    with pytest.raises(StorageError, match=r"No space left on device \(\d+ bytes are free there, 100000 are"):
        write_whole(disk / "file", bytes(100_000))
    assert [path.name for path in disk.iterdir()] == ["file"]
    assert (disk / "file").read_text() == "old"


def fill(file: Path, line: bytes) -> None:
    for _ in range(200):
        append_line(file, line)


def test_a_full_disk_leaves_no_torn_line(small_disk) -> None:
    disk = small_disk("size=64k")
    line = b"x" * 999 + b"\n"
    with pytest.raises(StorageError, match="No space left on device") as caught:
        fill(disk / "log", line)
    assert caught.value.exit_code == EXIT_RETRYABLE
    content = (disk / "log").read_bytes()
    assert content == line * (len(content) // 1000)
    assert 30_000 < len(content) < 65_537


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("gone/file", "was removed or never there: put it back or make it, and"),
        ("plain/file", "A file stands where one of its directories belongs: move that away"),
        ("metrics.jsonl", "A directory stands where the file belongs: move that away"),
    ],
)
def test_what_somebody_moved_or_replaced_is_said_and_no_room_is_asked_for(tmp_path: Path, lost, said) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "plain").touch()
    with pytest.raises(StorageError, match=said) as error:
        append_line(tmp_path / lost, b"{}\n")
    assert "room" not in str(error.value)
    assert "bytes" not in str(error.value)


def test_a_cut_line_is_closed_before_the_next(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"whole\ncut")
    append_line(tmp_path / "log", b"next\n")
    assert (tmp_path / "log").read_bytes() == b"whole\ncut\nnext\n"


@pytest.mark.parametrize("mine", [b"precious\n", b"process 1 on here\nmine\n", b"\xff"])
def test_a_file_of_something_else_with_the_name_of_a_lock_stays_and_is_named(tmp_path: Path, mine) -> None:
    (tmp_path / LOCK).write_bytes(mine)
    with (
        pytest.raises(ConfigError, match=r"LOCK is no lock of mcore_rl.*or elsewhere"),
        locked(tmp_path, "elsewhere"),
    ):
        pass
    assert (tmp_path / LOCK).read_bytes() == mine


@pytest.mark.parametrize("left", [b"", b"process 1 on a host of dots...\n", b"process 1 on"])
def test_the_lock_of_a_process_that_was_killed_is_taken(tmp_path: Path, left) -> None:
    (tmp_path / LOCK).write_bytes(left)
    with locked(tmp_path, ""):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def test_what_a_link_with_the_name_of_a_lock_leads_to_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    (tmp_path / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(ConfigError, match="LOCK is no lock of mcore_rl"), locked(tmp_path, ""):
        pass
    assert (tmp_path / "mine").read_text() == ""


def test_a_message_repeats_the_beginning_of_the_kind_in_a_mark(tmp_path: Path) -> None:
    (tmp_path / MARK).write_text(json.dumps({"kind": "k" * 50_000}))
    with pytest.raises(ConfigError, match="kkk") as refused:
        make(tmp_path, "elsewhere", kind="weights")
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("name", ["page.partial", "page.PID.partial"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_what_a_link_beside_a_file_leads_to_is_not_written(tmp_path: Path, name: str, link) -> None:
    (tmp_path / "mine").write_text("precious")
    link(tmp_path / "mine", tmp_path / name.replace("PID", str(os.getpid())))
    write_whole(tmp_path / "page", "new")
    assert (tmp_path / "page").read_text() == "new"
    assert not (tmp_path / "page").is_symlink()
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_directory_that_was_about_to_be_marked_is_free(tmp_path: Path) -> None:
    for name in (f"{MARK}.partial", f"{MARK}.7.partial"):
        (tmp_path / name).touch()
    assert directories.is_free(tmp_path, "weights")
    (tmp_path / "x.partial").touch()
    assert not directories.is_free(tmp_path, "weights")
