"""The export to files: whole or not there, never over what is not ours, typed where the disk is full."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mcore_rl.convert.command import hf_to_mcore
from mcore_rl.convert.to_hf import write_hf
from mcore_rl.directories import MARK, make
from mcore_rl.errors import McoreRLError, NumericsError, StorageError
from mcore_rl.model.build import build_policy
from mcore_rl.model.hf.files import Form, SafetensorsWriter
from mcore_rl.model.hf.tables import Rule
from mcore_rl.parallel.control import raise_everywhere
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.weights.buckets import export_of, plan_of, take_turn, turns_of
from mcore_rl.weights.disk import OpenFile, export
from mcore_rl.weights.encoding import FP8, Encoding, Fp8Encoding, PlainEncoding
from tests.model.support import at_layout
from tests.weights.test_buckets import BUCKET, Allocations, Recorder


def read(directory: Path) -> dict[str, Tensor]:
    """Every tensor in the files of a directory."""
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


# --- one form for every transport ---------------------------------------------------------------------------


class InBfloat16(PlainEncoding):
    """What a change of what is published takes: this class."""

    def forms(self, rule: Rule, name: str, form: Form) -> dict[str, Form]:
        """The tensor in bf16."""
        return {name: (form[0], torch.bfloat16)}


def as_bytes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Type and bytes of each: FP8 can neither be compared nor pickled."""
    return {name: (str(tensor.dtype), tensor.view(torch.uint8)) for name, tensor in tensors.items()}


def sent_and_written(
    mesh: Mesh, source: Path, target: Path, encoding: Encoding
) -> dict[str, tuple[str, Tensor]]:
    """What a rank sends to servers that run; the same model is exported to `target`."""
    model = build_policy(source, mesh)
    weights = export_of(model, encoding)
    plan = plan_of(weights, BUCKET)
    recorder = Recorder(max((bucket.nbytes for bucket in plan.of(mesh.rank)), default=0))
    for owner in turns_of(plan, mesh):
        take_turn(weights, plan, owner, recorder if owner == mesh.rank else None)
    raise_everywhere(mesh, None)
    export(model, target, encoding=encoding, bucket_bytes=BUCKET)
    return as_bytes(recorder.sent)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", [InBfloat16(), FP8], ids=["cast", "fp8"])
@pytest.mark.parametrize("layout", ["tp2+sp", "pp2", "ep2", "tp2ep2"])
def test_files_servers_and_conversion_get_the_same(
    pool2: Pool, layout: str, encoding: Encoding, dense_dir: Path, moe_dir: Path, tmp_path: Path
) -> None:
    source = moe_dir if "ep" in layout else dense_dir
    ranks = at_layout(pool2, layout, sent_and_written, source, tmp_path / "published", encoding)
    sent = {name: tensor for rank in ranks for name, tensor in rank.items()}
    written = read(tmp_path / "published")
    hf_to_mcore(source, tmp_path / "mcore")
    (tmp_path / "converted").mkdir()
    write_hf(tmp_path / "mcore", tmp_path / "converted", config=source, shard_bytes=30_000, encoding=encoding)
    converted, original = read(tmp_path / "converted"), read(source)
    assert sent.keys() == written.keys() == converted.keys()
    assert (
        written.keys() > original.keys()
        if isinstance(encoding, Fp8Encoding)
        else written.keys() == original.keys()
    )
    for others in (as_bytes(written), as_bytes(converted)):
        for name, (dtype, data) in sent.items():
            assert others[name][0] == dtype, name
            assert torch.equal(others[name][1], data), name
    if not isinstance(encoding, Fp8Encoding):
        assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in original.items())


def not_finite(mesh: Mesh, source: Path, target: Path) -> str:
    model = build_policy(source, mesh)
    with torch.no_grad():
        for name, parameter in model.unwrapped[0].named_parameters():
            if "layers.0.mlp.linear_fc2" in name:
                parameter[0, 0] = torch.inf
    try:
        export(model, target, encoding=FP8, bucket_bytes=BUCKET)
    except NumericsError as error:
        return str(error)
    return "nothing"


def test_a_weight_that_cannot_be_encoded_leaves_no_rank_waiting_and_no_file(
    pool2: Pool, dense_dir: Path, tmp_path: Path
) -> None:
    said = at_layout(pool2, "tp2", not_finite, dense_dir, tmp_path / "x")
    assert all(one.startswith("model.layers.0.mlp.down_proj.weight is not finite") for one in said)
    assert list(tmp_path.iterdir()) == []


# --- memory -------------------------------------------------------------------------------------------------


def exported(mesh: Mesh, source: Path, target: Path) -> tuple[int, int, int]:
    """Bytes of memory that an export takes, bytes of a copy of the model, and bytes of its files."""
    model = build_policy(source, mesh)
    with Allocations() as made:
        export(model, target, bucket_bytes=BUCKET)
    with Allocations() as copied:
        for tensor in export_of(model).tensors.values():
            tensor.clone()
    return made.nbytes, copied.nbytes, sum(file.stat().st_size for file in target.glob("*.safetensors"))


def test_an_export_holds_two_buckets_however_large_the_model(
    pool1: Pool, dense_dir: Path, tmp_path: Path
) -> None:
    ((held, copied, written),) = at_layout(pool1, "tp1", exported, dense_dir, tmp_path / "x")
    assert held <= 2 * BUCKET
    assert copied > 2 * BUCKET, "the witness sees no memory"
    assert written > 2 * BUCKET


# --- what lies there already --------------------------------------------------------------------------------


def export_twice(mesh: Mesh, source: Path, target: Path) -> list[str]:
    """What each of two exports to the same place says; the second one has other weights."""
    said = []
    model = build_policy(source, mesh)
    for _ in range(2):
        try:
            export(model, target)
            said.append("")
        except McoreRLError as error:
            said.append(f"{type(error).__name__}: {error}")
        with torch.no_grad():
            for parameter in model.unwrapped[0].parameters():
                parameter.add_(1)
    return said


def test_an_export_is_replaced_and_nothing_else_is_left(pool1: Pool, dense_dir: Path, tmp_path: Path) -> None:
    (said,) = at_layout(pool1, "tp1", export_twice, dense_dir, tmp_path / "x")
    assert said == ["", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    before, after = read(dense_dir), read(tmp_path / "x")
    assert all(torch.equal(after[name], before[name] + 1) for name in before)


@pytest.mark.parametrize("place", ["x", "x.partial"])
def test_a_directory_that_mcore_rl_did_not_write_is_never_removed(
    pool1: Pool, dense_dir: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / place).mkdir()
    (tmp_path / place / "thesis.tex").write_text("years of work")
    (said,) = at_layout(pool1, "tp1", export_twice, dense_dir, tmp_path / "x")
    assert all(one.startswith(f"ConfigError: {tmp_path / place} holds files and no mark") for one in said)
    assert (tmp_path / place / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == [place]


@pytest.mark.parametrize("place", ["x", "x.partial", "x.replaced"])
def test_a_whole_run_in_the_place_of_a_version_is_never_removed(
    pool1: Pool, dense_dir: Path, tmp_path: Path, place: str
) -> None:
    mark_as_run(tmp_path / place)
    (said, _), *_ = at_layout(pool1, "tp1", export_twice, dense_dir, tmp_path / "x")
    assert said.startswith(f"ConfigError: {tmp_path / place} is marked as of the kind 'run'")
    assert (tmp_path / place / "checkpoint").read_text() == "days of work"


def mark_as_run(directory: Path) -> None:
    make(directory, "", kind="run")
    (directory / "checkpoint").write_text("days of work")


def test_a_marked_one_is_replaced_whatever_it_holds(pool1: Pool, dense_dir: Path, tmp_path: Path) -> None:
    for name in ("x", "x.partial", "x.replaced"):  # as a run leaves them that is killed between two renames
        (tmp_path / name).mkdir()
        (tmp_path / name / MARK).write_text('{"kind": "weights"}')
        (tmp_path / name / "old").write_text("")
    (said,) = at_layout(pool1, "tp1", export_twice, dense_dir, tmp_path / "x")
    assert said == ["", ""]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert not (tmp_path / "x" / "old").exists()


# --- a disk that does not take it ---------------------------------------------------------------------------


def export_to(mesh: Mesh, source: Path, target: Path) -> str:
    model = build_policy(source, mesh)
    try:
        export(model, target, bucket_bytes=BUCKET)
    except StorageError as error:
        return f"{error.exit_code}: {error}"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
@pytest.mark.parametrize("options", ["size=40k", "size=120k", "nr_inodes=3", "nr_inodes=6"])
def test_a_full_disk_is_said_on_every_rank_with_the_file_and_the_remedy(
    pool2: Pool, layout: str, options: str, dense_dir: Path, small_disk: Callable[[str], Path]
) -> None:
    """The weights, the index or the side files have no room; with room again the same export works."""
    place = small_disk(options)
    said = at_layout(pool2, layout, export_to, dense_dir, place / "1")
    assert said[0] == said[1]
    assert said[0].startswith("75: ")
    assert f"{place}/1.partial" in said[0]
    assert "No space left on device" in said[0]
    assert "publish.dir" in said[0]
    assert list(place.iterdir()) == [], "what fills the disk stays there"
    subprocess.run(["mount", "-o", "remount,size=4m,nr_inodes=100", str(place)], check=True)
    assert at_layout(pool2, layout, export_to, dense_dir, place / "1") == ["", ""]
    assert read(place / "1").keys() == read(dense_dir).keys()


@contextmanager
def breaking(path: Path, forms: Mapping[str, Form]) -> Iterator[SafetensorsWriter]:
    """A file whose end cannot be written, as a network file system says only when it is closed."""
    with SafetensorsWriter(path, forms) as writer:
        yield writer
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def export_breaking(mesh: Mesh, source: Path, target: Path) -> str:
    with pytest.raises(StorageError) as error:
        export(build_policy(source, mesh), target, open_file=breaking)
    return str(error.value)


def test_an_error_that_comes_when_a_file_is_closed_is_said_too(
    pool2: Pool, dense_dir: Path, tmp_path: Path
) -> None:
    said = at_layout(pool2, "tp2", export_breaking, dense_dir, tmp_path / "1")
    assert all("model-00001-of-00001.safetensors: Input/output error" in one for one in said)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def out_of_memory(path: Path, forms: Mapping[str, Form]) -> Iterator[SafetensorsWriter]:
    """A file whose beginning fails with what is no error of the disk."""
    raise MemoryError("no room for the header")
    yield


class Failing(SafetensorsWriter):
    """A file that takes no tensor."""

    def write(self, name: str, tensor: Tensor) -> None:
        """Fail with what is no error of the disk."""
        raise MemoryError(f"no room for {name}")


def export_failing(mesh: Mesh, source: Path, target: Path, open_file: OpenFile) -> str:
    with pytest.raises((MemoryError, RuntimeError)) as error:
        export(build_policy(source, mesh), target, open_file=open_file)
    return str(error.value)


@pytest.mark.parametrize("open_file", [out_of_memory, Failing])
def test_an_error_that_is_not_of_the_disk_leaves_no_rank_waiting(
    pool2: Pool, dense_dir: Path, tmp_path: Path, open_file: OpenFile
) -> None:
    said = at_layout(pool2, "tp2", export_failing, dense_dir, tmp_path / "1", open_file)
    assert all("no room for" in one for one in said)
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_fails_is_said_and_the_old_version_stays(
    pool1: Pool, dense_dir: Path, tmp_path: Path
) -> None:
    """A directory that may not be renamed: a mount point is one."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / MARK).write_text('{"kind": "weights"}')
    (said,) = at_layout(pool1, "tp1", export_onto_a_mount, dense_dir, tmp_path / "x")
    if said == "skip":
        pytest.skip("this user may not mount a tmpfs")
    assert "Device or resource busy" in said
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def export_onto_a_mount(mesh: Mesh, source: Path, target: Path) -> str:
    content = (target / MARK).read_text()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "tmpfs", str(target)], capture_output=True, check=False
    ).returncode:
        return "skip"
    try:
        (target / MARK).write_text(content)
        return export_to(mesh, source, target)
    finally:
        subprocess.run(["umount", str(target)], check=True)


def test_the_index_names_every_tensor_and_the_files_are_numbered(
    pool2: Pool, dense_dir: Path, tmp_path: Path
) -> None:
    assert at_layout(pool2, "pp2", export_to, dense_dir, tmp_path / "x") == ["", ""]
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert index.keys() == read(dense_dir).keys()
