"""Hugging Face safetensors on disk: strict reading by name, writing one tensor at a time; no pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mcore_rl.errors import ConfigError
from mcore_rl.model.architecture import read_json_object
from mcore_rl.model.fields import GENERATION_KINDS, check_kinds
from mcore_rl.model.mapping import HF_DTYPES
from mcore_rl.model.mapping import Mapping as Table

INDEX = "model.safetensors.index.json"
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""Copied beside weights, so that a server or transformers can load the directory."""

_NAMES = {dtype: name for name, dtype in HF_DTYPES.items()} | {torch.float8_e4m3fn: "F8_E4M3"}
Form = tuple[tuple[int, ...], torch.dtype]
"""shape and type of a tensor"""


def checkpoint_files(directory: Path) -> dict[str, Path]:
    """HF tensor name -> the safetensors file in `directory` that holds it.

    Raises:
        ConfigError: no safetensors, a damaged file, a tensor in two files, or an index that is malformed,
            points out of the directory, or names a file or tensor that is not there.
    """
    directory = Path(directory)
    index = directory / INDEX
    if not index.exists():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise ConfigError(
                f"{directory}: no *.safetensors; put the published ones beside config.json, or set "
                "model.random_init = true"
            )
        return _files_by_name(files)
    weight_map = _read_index(index)
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise ConfigError(f"{index}: {name} points to {file!r}, outside the directory")
    missing = sorted({file for file in weight_map.values() if not (directory / file).is_file()})
    if missing:
        raise ConfigError(
            f"{index}: names {missing}, which are not in the directory; fetch or export it again"
        )
    held = _files_by_name(sorted({directory / file for file in weight_map.values()}))
    lost = sorted(name for name, file in weight_map.items() if held.get(name) != directory / file)
    if lost:
        raise ConfigError(f"{index}: {lost} are not in the files that it names")
    return held


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values()):
        return weight_map
    raise ConfigError(
        f"{index}: not an index of safetensors files (weight_map: name -> file); export it again"
    )


def _files_by_name(files: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in files:
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dictionary
                if name in found:
                    raise ConfigError(f"{name} is in both {found[name]} and {file}; remove one of them")
                found[name] = file
    return found


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors raises its own, untyped error for a damaged header
        raise ConfigError(f"{file}: not a readable safetensors file ({error}); export it again") from error


def hf_reader(directory: Path, table: Table) -> Callable[[str], Tensor]:
    """A function that reads an HF tensor of `directory` by name, after a strict check of names and shapes.

    A tied model may hold a copy of its embedding as output layer (Qwen3-0.6B does), if it is one.

    Raises:
        ConfigError: lists every tensor that is missing, unexpected, or of a wrong shape or type.
    """
    files = checkpoint_files(directory)

    def read(name: str) -> Tensor:
        with _open(files[name]) as tensors:
            return tensors.get_tensor(name)

    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, file in files.items():
        with _open(file) as tensors:
            part = tensors.get_slice(name)
            found[name] = (tuple(part.get_shape()), part.get_dtype())
    pair = ("lm_head.weight", "model.embed_tokens.weight")
    if table.arch.tied and found.keys() >= set(pair) and torch.equal(*(read(name) for name in pair)):
        del found[pair[0]]
    problems = table.problems(found)
    if problems:
        raise ConfigError(f"{directory}: weights do not fit config.json: " + "; ".join(problems))
    return read


def check_side_files(directory: Path) -> None:
    """Raises ConfigError for a damaged JSON file beside the weights: a server reads it in mid-run.

    tokenizer.json and vocab.json are megabytes of JSON, which the tokenizer checks itself.
    """
    for name in SIDE_FILES:
        small = name.endswith(".json") and name not in ("tokenizer.json", "vocab.json")
        if small and (directory / name).exists():
            fields = read_json_object(directory / name)
            if name == "generation_config.json":
                check_kinds(fields, GENERATION_KINDS, str(directory / name))


def copy_side_files(source: Path, directory: Path, quantization: Mapping[str, Any] | None = None) -> None:
    """config.json, tokenizer and the rest of SIDE_FILES; `quantization` becomes part of config.json."""
    for name in SIDE_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, directory / name)
    if quantization is not None:
        config = json.loads((source / "config.json").read_text())
        text = json.dumps({**config, "quantization_config": quantization}, indent=2)
        (directory / "config.json").write_text(text + "\n")


class SafetensorsWriter:
    """One safetensors file, written tensor by tensor: memory for the largest of them only.

    The format is 8 bytes of header length, a JSON header (name: type, shape, place), and the tensors' bytes.
    """

    def __init__(self, path: Path, forms: Mapping[str, Form]) -> None:
        """Write the header; `forms` are all tensors, to be written in this order."""
        self._waiting = dict(forms)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (shape, dtype) in forms.items():
            start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor of `forms`, on the CPU."""
        expected = next(iter(self._waiting), None)
        if name != expected or (tuple(tensor.shape), tensor.dtype) != self._waiting[name]:
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype}: not the next tensor, {expected}")
        del self._waiting[name]
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._waiting:
            raise ValueError(f"not written: {sorted(self._waiting)}")
