"""Flat ranges as blocks, and a file that torch reads."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.checkpoint.directory import CheckpointDirectory
from mcore_rl.checkpoint.image import FileImage
from mcore_rl.checkpoint.pieces import blocks
from mcore_rl.checkpoint.torch_dist import load_pieces, side_files
from mcore_rl.errors import CheckpointError, ConfigError
from tests.checkpoint.support import Piece, stored, tensors, write


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_a_range_is_cut_into_few_blocks_in_order(shape: list[int], data) -> None:
    numel = math.prod(shape)
    low = data.draw(st.integers(0, numel))
    high = data.draw(st.integers(low, numel))
    numbers = np.arange(numel).reshape(shape)
    cut = blocks(shape, low, high)
    parts = [
        numbers[tuple(slice(o, o + e) for o, e in zip(offset, extent, strict=True))].reshape(-1)
        for offset, extent in cut
    ]
    assert np.concatenate([np.zeros(0, int), *parts]).tolist() == list(range(low, high))
    assert len(cut) <= max(1, 2 * len(shape) - 1)


def test_torch_reads_what_was_written(tmp_path: Path) -> None:
    read = stored(write(CheckpointDirectory(tmp_path, 1), 7))
    expected = {piece.key: piece.data for piece in tensors(7)}
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_the_image_is_refilled_in_place(dtype: torch.dtype) -> None:
    data = torch.arange(6).view(2, 3).to(dtype)
    pieces = [Piece("a", (2, 3), (0, 0), data, True), Piece("b", (), (), torch.tensor(1.5), True)]
    image = FileImage()
    image.fill(pieces)
    places, memory = image.entries, image._buffer.data_ptr()
    data += 1
    image.fill(pieces)
    assert (image.entries, image._buffer.data_ptr()) == (places, memory)
    entry = places[0]
    archive = bytes(image._buffer[entry.start : entry.start + entry.length].numpy())
    assert torch.equal(torch.load(io.BytesIO(archive), weights_only=True), data)


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = write(CheckpointDirectory(tmp_path, 1), 7)
    files = [file.name for file in path.iterdir()]
    with pytest.raises(ConfigError, match="no tensor t3: it is of another model"):
        load_pieces(path, tensors(0, count=4), files)
    other = [Piece("t0", (64, 31), (0, 0), torch.zeros(64, 31), True)]
    with pytest.raises(ConfigError, match=r"t0 is torch.float32 \(64, 32\), this run's is"):
        load_pieces(path, other, files)
    other = [Piece("t0", (64, 32), (0, 0), torch.zeros(64, 32, dtype=torch.bfloat16), True)]
    with pytest.raises(ConfigError, match="precision of the saved run"):
        load_pieces(path, other, files)


def test_blocks_that_do_not_cover_a_tensor_are_not_saved() -> None:
    image = FileImage()
    image.fill([Piece("a", (4, 2), (0, 0), torch.zeros(3, 2), True)])
    with pytest.raises(CheckpointError, match=r"too much or too little of \['a'\]"):
        side_files([image.entries])
    with pytest.raises(CheckpointError, match="too much or too little"):
        side_files([image.entries, image.entries])


def test_padding_that_the_saved_layout_lacked_is_zero(tmp_path: Path) -> None:
    path = write(CheckpointDirectory(tmp_path, 1), 7)
    padded = Piece("t0", (66, 32), (62, 0), torch.full((4, 32), 9.0), True, padded=True)
    load_pieces(path, [padded], [file.name for file in path.iterdir()])
    assert padded.data[:2].eq(700).all()
    assert padded.data[2:].eq(0).all()
