"""What a model directory holds, in short: a resumed run compares it with what it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.architecture import read_json_object
from mcore_rl.model.hf.families import PREDICTING
from mcore_rl.model.hf.files import checkpoint_files

WHOLE_BYTES = 1 << 28
"""weights of at most so many bytes are read whole; of larger ones three pieces of each tensor"""
_FILES = ("config.json", "generation_config.json")
_OF_WRITER = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "quantization_config"}
_OF_WRITER |= PREDICTING
"""fields of them that change with every export; the types of the weights are in the weights"""
_PIECE_BYTES = 1 << 12
_BLOCK_BYTES = 1 << 20
_HEX_BYTES = 8


def model_content(directory: Path, *, weights: bool) -> dict[str, str]:
    """Digests of config.json, generation_config.json and, where asked for, of the `weights`.

    Tensors may lie in other files, and fields that are of no model, but of who wrote it, may be others.

    Raises:
        ConfigError: the directory holds no model, or a damaged one.
    """
    found = {name: _fields_digest(directory / name) for name in _FILES if (directory / name).exists()}
    return found | ({"weights": _weights_digest(directory)} if weights else {})


def file_content(path: Path) -> str:
    """The digest of a file, or of all files in a directory in the order of their names.

    Raises OSError.
    """
    files = sorted(file for file in [path, *path.rglob("*")] if file.is_file())  # no pipe, which never ends
    digest = hashlib.blake2b(digest_size=_HEX_BYTES)
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _fields_digest(file: Path) -> str:
    fields = {key: value for key, value in read_json_object(file).items() if key not in _OF_WRITER}
    text = json.dumps(fields, sort_keys=True)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=_HEX_BYTES).hexdigest()


def _weights_digest(directory: Path) -> str:
    """A digest of every tensor by name, whatever file holds it: form, and all bytes or some of them."""
    files = checkpoint_files(directory)
    whole = sum(file.stat().st_size for file in set(files.values())) <= WHOLE_BYTES
    headers = {file: _header(file) for file in set(files.values())}
    digest = hashlib.blake2b(digest_size=_HEX_BYTES)
    for name, file in sorted(files.items()):
        begins, header = headers[file]
        form = header[name]
        digest.update(json.dumps([name, form["dtype"], form["shape"]]).encode(errors="surrogatepass"))
        first, last = (begins + int(offset) for offset in form["data_offsets"])
        with file.open("rb") as opened:
            for begin, end in _pieces(first, last, whole=whole):
                opened.seek(begin)
                digest.update(opened.read(end - begin))
    return digest.hexdigest()


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, and its header."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            return 8 + length, json.loads(opened.read(length))
        except ValueError as error:  # which safetensors itself refuses
            raise ConfigError(f"{file}: not a readable safetensors file; export it again") from error


def _pieces(first: int, last: int, *, whole: bool) -> Iterator[tuple[int, int]]:
    if whole or last - first <= 3 * _PIECE_BYTES:
        yield from ((at, min(at + _BLOCK_BYTES, last)) for at in range(first, last, _BLOCK_BYTES))
        return
    for begin in (first, (first + last - _PIECE_BYTES) // 2, last - _PIECE_BYTES):
        yield begin, begin + _PIECE_BYTES
