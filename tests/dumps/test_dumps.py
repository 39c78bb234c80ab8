"""A step kept whole: what a dump holds comes back bit by bit, and what is none is refused."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mcore_rl.directories import mark
from mcore_rl.dumps.archive import archive_bytes, read_archive
from mcore_rl.dumps.directory import (
    dumped_steps,
    find_dumps,
    find_sample,
    groups_file,
    read_step,
    trained_file,
    write_groups,
)
from mcore_rl.dumps.rollouts import KIND, dump_bytes, read_dump
from mcore_rl.dumps.trained import read_trained
from mcore_rl.errors import DataError, StorageError
from tests.dumps.support import CURSOR, WORDS, segments_equal, step_of_run, trajectories, write


def test_a_step_comes_back_whole(tmp_path: Path) -> None:
    groups = step_of_run()
    dump = read_step(write(tmp_path, 4, groups), 4)
    assert (dump.step, dump.temperature, dump.cursor) == (4, 0.5, CURSOR)
    assert [(group.id, len(group.samples)) for group in dump.groups] == [
        (group.id, len(group.samples)) for group in groups
    ]
    for got, wanted in zip(dump.groups, groups, strict=True):
        for one, other in zip(got.samples, wanted.samples, strict=True):
            assert one.prompt == other.prompt
            assert (one.id, one.finish_reason, one.reward) == (other.id, other.finish_reason, other.reward)
            assert (one.void, one.text) == (other.void, other.text)
            assert len(one.segments) == len(other.segments)
            assert all(map(segments_equal, one.segments, other.segments))
    assert dump.pieces[5] == "<5>"
    assert any(sample.void for group in groups for sample in group.samples)
    assert any(len(sample.segments) > 1 for group in groups for sample in group.samples)


def test_what_the_trainer_made_of_it_comes_back_by_sample(tmp_path: Path) -> None:
    directory = write(tmp_path, 4, groups := step_of_run())
    found = read_trained(trained_file(directory, 4))
    alive = [s for group in groups for s in group.samples if not s.void]
    assert list(found) == [sample.id for sample in alive]
    assert [len(its.log_probs) for its in found.values()] == [sample.trained_tokens for sample in alive]
    ratios = np.concatenate([its.ratios for its in found.values()])
    assert np.isnan(ratios[0])
    assert np.allclose(ratios[1:], np.exp(0.25))
    assert read_trained(directory / "step_5.trained.npz") == {}


def test_a_dump_is_numpys_own_and_holds_no_object(tmp_path: Path) -> None:
    path = groups_file(write(tmp_path, 4, step_of_run()), 4)
    with np.load(path, allow_pickle=False) as loaded:
        assert loaded["tokens"].dtype == np.int32
        assert json.loads(loaded["document"].tobytes())["kind"] == KIND


def test_a_token_takes_few_bytes() -> None:
    def size(count: int) -> tuple[int, int]:
        groups = trajectories(count)
        tokens = sum(len(x.token_ids) for g in groups for s in g.samples for x in s.segments)
        return len(dump_bytes(4, groups, temperature=1.0, cursor={}, words=WORDS)), tokens

    (small, few), (large, many) = size(20), size(320)
    assert (large - small) / (many - few) < 100, "of tiny samples; their ids, texts and prompts included"


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> None:
    """Write the dump again with something else in it."""
    document, arrays = read_archive(path, KIND)
    arrays = {name: array.copy() for name, array in arrays.items()}
    change(document, arrays)
    path.write_bytes(archive_bytes(document, arrays))


def detailed(document: dict[str, Any]) -> list[Any]:
    """The row of the sample whose reward has parts and turns."""
    return next(row for row in document["columns"]["samples"] if len(row) > 5)


def sample_row(document: dict[str, Any], place: int, value: Any) -> None:
    document["columns"]["samples"][0][place] = value


WRONG: dict[str, Callable[[dict[str, Any], dict[str, np.ndarray]], Any]] = {
    "another kind": lambda d, a: d.update(kind="something else"),
    "no step": lambda d, a: d.pop("step"),
    "a step that is a text": lambda d, a: d.update(step="4"),
    "a temperature that is none": lambda d, a: d.update(temperature=None),
    "no columns": lambda d, a: d.update(columns=[]),
    "more columns": lambda d, a: d["columns"].update(extra=1),
    "a text less": lambda d, a: d["texts"].pop(),
    "a text that is a number": lambda d, a: d["texts"].__setitem__(0, 3),
    "a prompt twice": lambda d, a: d["prompts"][1].__setitem__(0, d["prompts"][0][0]),
    "another prompt": lambda d, a: d["prompts"].pop(),
    "metadata that is a list": lambda d, a: d["prompts"][0].__setitem__(3, "[]"),
    "metadata that is deep": lambda d, a: d["prompts"][0].__setitem__(3, "[" * 9999),
    "no tokens": lambda d, a: a.pop("tokens"),
    "a token less": lambda d, a: a.update(tokens=a["tokens"][1:]),
    "tokens as floats": lambda d, a: a.update(tokens=a["tokens"].astype(np.float32)),
    "a negative token": lambda d, a: a["tokens"].__setitem__(0, -1),
    "a negative token of a prompt": lambda d, a: a["prompt_tokens"].__setitem__(0, -1),
    "a NaN": lambda d, a: a["log_probs"].__setitem__(0, np.nan),
    "a log-prob above 0": lambda d, a: a["log_probs"].__setitem__(0, 0.5),
    "an infinite log-prob": lambda d, a: a["log_probs"].__setitem__(0, -np.inf),
    "ends that fall": lambda d, a: a["ends"].__setitem__((0, 0), 10**9),
    "ends of more segments": lambda d, a: a.update(ends=np.zeros((6, 99), np.int64)),
    "another mask": lambda d, a: a.update(trained=~a["trained"]),
    "a shorter mask": lambda d, a: a.update(trained=a["trained"][1:]),
    "experts of other tokens": lambda d, a: a.update(experts=a["experts"][1:]),
    "a piece less": lambda d, a: d["pieces"].pop(),
    "an infinite reward": lambda d, a: sample_row(d, 2, float("inf")),
    "no reward": lambda d, a: sample_row(d, 2, None),
    "a reward that is a text": lambda d, a: sample_row(d, 2, "1"),
    "void that is no bool": lambda d, a: sample_row(d, 3, 1),
    "another end": lambda d, a: sample_row(d, 1, "\x1b[2J"),
    "an id that is a number": lambda d, a: sample_row(d, 0, 7),
    "an id twice": lambda d, a: sample_row(d, 0, d["columns"]["samples"][1][0]),
    "no segments": lambda d, a: sample_row(d, 4, 0),
    "segments that are a text": lambda d, a: sample_row(d, 4, "1"),
    "a version that is a name": lambda d, a: d["columns"]["versions"].__setitem__(0, "x"),
    "spans of other versions": lambda d, a: a.update(spans=a["spans"][:, 1:]),
    "a part that is no number": lambda d, a: detailed(d)[5][0].__setitem__(1, None),
    "a part without a weight": lambda d, a: detailed(d)[5][0].pop(),
    "a part whose name is a number": lambda d, a: detailed(d)[5][0].__setitem__(0, 3),
    "a turn beyond the tokens": lambda d, a: detailed(d)[6][0].__setitem__(0, 99),
    "an infinite turn": lambda d, a: detailed(d)[6][0].__setitem__(1, float("inf")),
    "a group of more samples": lambda d, a: d["columns"]["groups"][0].__setitem__(2, 2),
    "a row that is a number": lambda d, a: d["columns"]["samples"].__setitem__(0, 7),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_nobody_can_have_sampled_is_refused_with_its_place(tmp_path: Path, what: str) -> None:
    path = groups_file(write(tmp_path, 4, step_of_run()), 4)
    changed(path, WRONG[what])
    with pytest.raises(DataError) as refused:
        read_dump(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\x1b" not in str(refused.value)


def test_a_dump_that_nothing_changed_is_read_again(tmp_path: Path) -> None:
    """The control of the test above."""
    path = groups_file(write(tmp_path, 4, step_of_run()), 4)
    changed(path, lambda document, arrays: None)
    assert len(read_dump(path).groups) == 11


def npy(header: str, data: bytes = b"") -> bytes:
    """A file with one array `document` of that header."""
    text = header.encode().ljust(117) + b"\n"
    array = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        zipped.writestr("document.npy", array)
    return buffer.getvalue()


def compressed() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, document=np.zeros(10**6, np.uint8))
    return buffer.getvalue()


def objects() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, document=np.array([{"a": 1}], dtype=object))
    return buffer.getvalue()


FOREIGN = {
    "empty": b"",
    "text": b"precious",
    "a zip of nothing": b"PK\x05\x06" + bytes(18),
    "compressed": compressed(),
    "objects": objects(),
    "huge": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000,)}"),
    "negative": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-1,)}", b"{}"),
    "of no bytes": npy("{'descr': '|V0', 'fortran_order': False, 'shape': (3,)}"),
    "a header that is code": npy("__import__('os').abort()"),
    "of nothing and much": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (0, 10**99)}"),
    "no JSON": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2,)}", b"}{"),
    "a list": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (2,)}", b"[]"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_file_is_refused_with_its_place(tmp_path: Path, what: str) -> None:
    path = tmp_path / "step_1.npz"
    path.write_bytes(FOREIGN[what])
    for read in (read_dump, read_trained):
        with pytest.raises(DataError, match="not what mcore_rl wrote, or damaged"):
            read(path)


@pytest.mark.parametrize("file", [groups_file, trained_file])
def test_a_file_that_was_cut_or_of_which_a_byte_changed_is_refused(tmp_path: Path, file: Callable) -> None:
    path = file(write(tmp_path, 4, step_of_run()), 4)
    whole = path.read_bytes()
    read = read_dump if file is groups_file else read_trained
    for cut in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError):
            read(path)
    payload = whole.index(b"\n", whole.index(b"log_probs.npy")) + 3
    path.write_bytes(whole[:payload] + bytes([whole[payload] ^ 1]) + whole[payload + 1 :])
    with pytest.raises(DataError, match="CRC"):
        read(path)


def test_a_directory_a_link_to_nowhere_and_a_pipe_are_no_dumps(tmp_path: Path) -> None:
    (tmp_path / "step_1.npz").mkdir()
    (tmp_path / "step_2.npz").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "step_3.npz")
    for step in (1, 2, 3):
        with pytest.raises(DataError, match="no such file"):
            read_step(tmp_path, step)


def test_a_file_under_another_name_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path, 4, step_of_run())
    groups_file(directory, 4).rename(groups_file(directory, 5))
    with pytest.raises(DataError, match="holds step 4"):
        read_step(directory, 5)


def test_dumps_and_samples_are_found(tmp_path: Path) -> None:
    directory = write(tmp_path, 4, step_of_run())
    write(tmp_path, 12, step_of_run(12))
    (directory / "step_07.npz").write_bytes(b"")
    (directory / "notes.npz").write_bytes(b"")
    assert dumped_steps(directory) == [4, 12]
    assert find_dumps(tmp_path) == find_dumps(directory) == directory
    assert find_sample(directory, "a@4/1", [4, 12]) == 4
    with pytest.raises(DataError, match="no sample 'x'"):
        find_sample(directory, "x", [4, 12])
    with pytest.raises(DataError, match="no dumps of rollouts"):
        find_dumps(tmp_path / "nothing")


def test_only_the_newest_stay_and_nothing_of_others_goes(tmp_path: Path) -> None:
    directory = tmp_path / "rollouts"
    directory.mkdir()
    mark(directory, "rollouts")
    (directory / "notes.txt").write_text("precious")
    for step in range(1, 6):
        write_groups(directory, step, b"groups", keep=2)
        trained_file(directory, step).write_bytes(b"trained")
    names = {"notes.txt", ".mcore_rl", *(f"step_{n}{x}.npz" for n in (4, 5) for x in ("", ".trained"))}
    assert {path.name for path in directory.iterdir()} == names
    write_groups(directory, 4, b"again", keep=2)
    assert {path.name for path in directory.iterdir()} == names - {"step_4.trained.npz"}


def test_a_full_disk_leaves_the_older_dumps(tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    directory = write(small_disk("size=200k"), 1, step_of_run())
    with pytest.raises(StorageError, match=r"step_2\.npz"):
        write_groups(directory, 2, bytes(10**6), keep=1)
    assert dumped_steps(directory) == [1]
    assert len(read_step(directory, 1).groups) == 11
    assert not list(directory.glob("*.partial"))
