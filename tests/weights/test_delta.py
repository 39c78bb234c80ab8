"""What changed between two files: applied, it is the new file bit for bit, and small where little changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from mcore_rl.errors import WeightSyncError
from mcore_rl.model.hf.files import Form
from mcore_rl.weights.delta import SUFFIX, SUM_SUFFIX, Writer, apply, difference, patch

BLOCK = 1 << 16


@given(
    size=st.sampled_from([0, 1, BLOCK - 1, BLOCK, 3 * BLOCK + 7]),
    kind=st.sampled_from([np.uint8, np.uint16, np.uint32]),
    share=st.sampled_from([0.0, 1e-4, 0.5, 1.0]),
    seed=st.integers(0, 9),
)
def test_a_patched_file_is_the_new_one(size, kind, share, seed):
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 255, size).astype(kind)
    new = np.where(rng.random(size) < share, rng.integers(0, 255, size), old).astype(kind)
    delta = difference(old, new)
    assert len(delta.values) == np.count_nonzero(old != new)
    patch(old, delta)
    assert np.array_equal(old, new)


def test_places_beyond_one_comparison(monkeypatch):
    monkeypatch.setattr("mcore_rl.weights.delta._BLOCKS_AT_ONCE", 2)
    old = np.zeros(7 * BLOCK + 5, np.uint16)
    new = old.copy()
    new[[0, BLOCK - 1, 2 * BLOCK, 5 * BLOCK + 3, 7 * BLOCK + 4]] = 1, 2, 3, 4, 5
    delta = difference(old, new)
    assert delta.counts.tolist() == [2, 0, 1, 0, 0, 1, 0, 1]
    patch(old, delta)
    assert np.array_equal(old, new)


def weights(rows: int = 512) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(rows, 256, generator=generator).bfloat16(),
        "b.weight": torch.randn(rows, generator=generator).bfloat16(),
    }


def stepped(tensors: dict[str, Tensor], share: float = 0.02) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.where(torch.rand(t.shape, generator=generator) < share, t * 1.01, t)
        for name, t in tensors.items()
    }


def write(writer: Writer, tensors: dict[str, Tensor], path: Path) -> None:
    """The next version of a file."""
    with writer.open(path, forms_of(tensors)) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)


def test_a_version_that_was_not_finished_is_no_base(tmp_path):
    """The next one is written whole: nobody has what it would be the change of."""
    writer, tensors = Writer(), weights()
    write(writer, tensors, tmp_path / "m.safetensors")
    with (
        pytest.raises(ValueError, match="not written"),
        writer.open(tmp_path / "m.safetensors", forms_of(tensors)),
    ):
        pass
    (tmp_path / "m.safetensors").unlink()
    write(writer, stepped(tensors), tmp_path / "m.safetensors")
    assert not (tmp_path / f"m.safetensors{SUFFIX}").exists()
    assert torch.equal(load_file(tmp_path / "m.safetensors")["a.weight"], stepped(tensors)["a.weight"])


def forms_of(tensors: dict[str, Tensor]) -> dict[str, Form]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def written(directory: Path, *versions: dict[str, Tensor]) -> list[Path]:
    """The directory of each version, by one Writer."""
    writer, paths = Writer(), []
    for number, tensors in enumerate(versions):
        paths.append(directory / str(number))
        paths[-1].mkdir(parents=True)
        write(writer, tensors, paths[-1] / "m.safetensors")
    return paths


def test_two_versions_are_a_file_and_its_changes(tmp_path):
    before, after = weights(), stepped(weights())
    first, second = written(tmp_path, before, after)
    assert {p.name for p in first.iterdir()} == {"m.safetensors", f"m.safetensors{SUM_SUFFIX}"}
    assert [p.name for p in second.iterdir()] == [f"m.safetensors{SUFFIX}"]
    apply(second / f"m.safetensors{SUFFIX}", first / "m.safetensors")
    found = load_file(first / "m.safetensors")
    assert all(torch.equal(found[name], after[name]) for name in after)


def test_a_changed_weight_takes_four_bytes(tmp_path):
    """Two for its place and two for itself; at most 1.2 times that, with all that is around them."""
    before, after = weights(8192), stepped(weights(8192))
    changed = sum(int((before[n].view(torch.int16) != after[n].view(torch.int16)).sum()) for n in before)
    _, second = written(tmp_path, before, after)
    assert 4 * changed < (second / f"m.safetensors{SUFFIX}").stat().st_size < 1.2 * 4 * changed


@pytest.mark.parametrize("other", ["all changed", "another shape", "another type"])
def test_what_would_not_be_smaller_is_written_whole(tmp_path, other):
    after = {
        "all changed": {name: -t for name, t in weights().items()},
        "another shape": weights(500),
        "another type": {name: t.float() for name, t in weights().items()},
    }[other]
    _, second = written(tmp_path, weights(), after)
    found = load_file(second / "m.safetensors")
    assert all(torch.equal(found[name], after[name]) for name in after)


def test_a_writer_that_forgets_writes_whole(tmp_path):
    writer = Writer()
    write(writer, weights(), tmp_path / "m.safetensors")
    writer.forget()
    write(writer, stepped(weights()), tmp_path / "m.safetensors")
    assert not (tmp_path / f"m.safetensors{SUFFIX}").exists()


def damaged(delta: Path) -> None:
    content = bytearray(delta.read_bytes())
    content[-1] ^= 1
    delta.write_bytes(bytes(content))


def cut(delta: Path) -> None:
    delta.write_bytes(delta.read_bytes()[:-100])


def of_another_file(delta: Path) -> None:
    _, second = written(delta.parent.parent / "other", weights(4000), stepped(weights(4000)))
    shutil.copy(second / delta.name, delta)


@pytest.mark.parametrize("mistake", [damaged, cut, of_another_file])
def test_a_wrong_delta_is_refused(tmp_path, mistake):
    first, second = written(tmp_path, weights(), stepped(weights()))
    delta = second / f"m.safetensors{SUFFIX}"
    mistake(delta)
    with pytest.raises(WeightSyncError):
        apply(delta, first / "m.safetensors")


def test_a_wrong_base_is_refused(tmp_path):
    first, second = written(tmp_path, weights(), stepped(weights()))
    damaged(first / "m.safetensors")
    with pytest.raises(WeightSyncError, match="not the file that was written"):
        apply(second / f"m.safetensors{SUFFIX}", first / "m.safetensors")


def test_a_delta_with_fewer_values_than_places_is_refused(tmp_path: Path) -> None:
    arrays = {"counts": np.array([3], np.uint32), "offsets": np.array([0, 1, 2], np.uint16)}
    save_file(arrays | {"values": np.zeros(2, np.uint16)}, tmp_path / "d", metadata={"sha256": ""})
    (tmp_path / "f").write_bytes(bytes(64))
    with pytest.raises(WeightSyncError, match="cannot be applied"):
        apply(tmp_path / "d", tmp_path / "f")
