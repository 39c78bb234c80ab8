"""Hugging Face safetensors on disk: strict reading by name, writing one tensor at a time; no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.architecture import Architecture, read_json_object
from mcore_rl.model.hf.blocks import multiplied_out
from mcore_rl.model.hf.families import PREDICTING
from mcore_rl.model.hf.fields import GENERATION_KINDS, check_kinds
from mcore_rl.model.hf.mxfp4 import take_quantized
from mcore_rl.model.hf.parameters import HF_DTYPES, ParameterMap
from mcore_rl.model.hf.stacked import Form, is_piece, ordered, wholes_of
from mcore_rl.model.hf.stored import StoredTensor, open_safetensors, stored_tensors
from mcore_rl.terminal import listed, short
from mcore_rl.weight_files import INDEX, weight_files

EMBEDDING = "model.embed_tokens.weight"
"""never quantized: it has the type that config.json tells"""
_COMPUTED = ".rotary_emb.inv_freq"
TEMPLATES = "additional_chat_templates"
"""the folder of chat templates with names of their own"""
SIDE_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
    # tokenizer.4.0.0.json: an older form, by fast_tokenizer_files; tokenizer.model.v3: Mistral's
    *("tokenizer.json", "tokenizer.*.json", "tokenizer.model", "tokenizer.model.*"),
    *("tiktoken.model", "tekken.json", "spiece.model", "spm.model", "sentencepiece*.model"),
    *("vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", f"{TEMPLATES}/*.jinja", "SYSTEM_PROMPT.txt"),
)
"""Patterns of what transformers and SGLang read beside the weights of a language model. Copied beside ours,
so that they load the directory as they load the one that the run began with."""

_NAMES = {dtype: name for name, dtype in HF_DTYPES.items()} | {torch.float8_e4m3fn: "F8_E4M3"}


def checkpoint_files(directory: Path) -> dict[str, Path]:
    """HF tensor name -> the safetensors file in `directory` that holds it.

    Raises:
        ConfigError: see `weight_files`; also a damaged file, a tensor in two files, or an index that names a
            tensor which is not there.
    """
    directory = Path(directory)
    files, weight_map = weight_files(directory)
    held = _files_by_name(files)
    if weight_map is not None:
        lost = sorted(name for name, file in weight_map.items() if held.get(name) != directory / file)
        if lost:
            raise ConfigError(f"{directory / INDEX}: {listed(lost)} are not in the files that it names")
    return held


def _files_by_name(files: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in files:
        with open_safetensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dictionary
                if name in found:
                    raise ConfigError(
                        f"{short(name)} is in both {found[name]} and {file}; remove one of them"
                    )
                found[name] = file
    return found


def hf_reader(directory: Path, table: ParameterMap) -> Callable[[str], Tensor]:
    """A function that reads an HF tensor of `directory` by name, after a strict check of names and shapes.

    A tied model may hold a copy of its embedding as output layer (Qwen3-0.6B does), if it is one. Rotary
    frequencies, which old versions of transformers saved with every layer, follow from config.json.

    Raises:
        ConfigError: lists every tensor that is missing, unexpected, or of a wrong shape or type.
    """
    stored = hf_tensors(directory, table)
    pair = ("lm_head.weight", "model.embed_tokens.weight")
    if (
        table.arch.tied
        and stored.keys() >= set(pair)
        and torch.equal(*(stored[name].read() for name in pair))
    ):
        del stored[pair[0]]
    for name in _predicting(stored, table.arch):
        del stored[name]
    problems = table.problems({name: (tensor.shape, tensor.type) for name, tensor in stored.items()})
    if problems:
        raise ConfigError(f"{directory}: weights do not fit config.json: " + "; ".join(problems))
    return lambda name: stored[name].read()


def hf_tensors(directory: Path, table: ParameterMap) -> dict[str, StoredTensor]:
    """HF tensor name -> where it lies, rotary frequencies left out; raises as `checkpoint_files`.

    Matrices in FP8 are multiplied out when they are read, where config.json tells of them.
    """
    files = checkpoint_files(directory)
    kept = {name: file for name, file in files.items() if not name.endswith(_COMPUTED)}
    stacked = wholes_of(table.hf_shapes())
    stored = stored_tensors(kept, stacked)
    take_quantized(stored, stacked)
    quantized = table.arch.quantized
    return stored if quantized is None else multiplied_out(stored, quantized, str(directory))


def left_out(directory: Path, arch: Architecture) -> str:
    """What `hf_reader` leaves in the files, for a warning; "" where it reads everything.

    Layers behind the last one predict later tokens (multi-token prediction, arXiv 2412.19437 section 2.2).
    They have no part in a log-prob of the next one, so that training would leave them behind.
    """
    names = _predicting(checkpoint_files(directory), arch)
    if not names:
        return ""
    return (
        f"{directory}: {len(names)} tensors of the {arch.predicting_layers} layers that predict later tokens "
        f"({listed(names)}) are not trained and not exported"
    )


def _predicting(names: Iterable[str], arch: Architecture) -> list[str]:
    layers = range(arch.layers, arch.layers + arch.predicting_layers)
    prefixes = tuple(f"model.layers.{layer}." for layer in layers)
    return sorted(name for name in names if prefixes and name.startswith(prefixes))


def side_files(directory: Path) -> dict[str, Path]:
    """Name -> path of what matches SIDE_FILES; a name has a slash in TEMPLATES.

    Raises:
        ConfigError: one is a link that leads nowhere, whose content would be left out in silence, or no plain
            file: to read a pipe could take for ever.
    """
    directory = Path(directory)
    names = _names_in(directory) + [f"{TEMPLATES}/{name}" for name in _names_in(directory / TEMPLATES)]
    found = {
        name: directory / name
        for name in names
        if any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in SIDE_FILES)
    }
    for path in found.values():
        if not path.is_file():
            raise _not_a(path, "plain file")
    return found


def _names_in(directory: Path) -> list[str]:
    """What is in a directory, sorted; nothing where it is not there."""
    if not os.path.lexists(directory):
        return []
    if not directory.is_dir():
        raise _not_a(directory, "directory")
    return sorted(os.listdir(directory))


def _not_a(path: Path, kind: str) -> ConfigError:
    what = f"not a {kind}" if path.exists() else "a link that leads nowhere"
    return ConfigError(f"{path}: {what}; fetch the file again, or remove it")


def check_side_files(directory: Path) -> None:
    """Raises ConfigError for a damaged JSON file beside the weights: a server reads it in mid-run.

    tokenizer.json, vocab.json and tekken.json are megabytes of JSON, which the tokenizer checks itself.
    """
    for name, path in side_files(directory).items():
        if path.suffix == ".json" and not name.startswith(("tokenizer.", "vocab.", "tekken.")):
            fields = read_json_object(path)
            if path.name == "generation_config.json":
                check_kinds(fields, GENERATION_KINDS, str(path))


def read_side_files(source: Path) -> dict[str, bytes]:
    """config.json, tokenizer and the rest of SIDE_FILES, as they are now. Raises as `side_files`."""
    return {name: path.read_bytes() for name, path in side_files(source).items()}


def write_side_files(
    files: Mapping[str, bytes],
    directory: Path,
    dtype: torch.dtype,
    quantization: Mapping[str, Any] | None = None,
    *,
    classifier: bool = False,
) -> None:
    """Put `files` beside weights.

    config.json tells the type of the weights beside it, `dtype`, whatever it told before: a reader that goes
    by config.json would round them, or take twice the memory. Layers that predict later tokens are not among
    the weights, and config.json says so. `quantization` becomes part of it, in place of what the source told.
    `classifier`: the weights are those of a sequence classifier with one label, whatever it was before.
    """
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    config = json.loads(files["config.json"])
    told = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    config |= dict.fromkeys(told, str(dtype).removeprefix("torch."))
    config |= dict.fromkeys(PREDICTING & config.keys(), 0)
    if classifier:
        config |= _as_classifier(config)
    config.pop("quantization_config", None)  # of the source, whose weights were read as plain numbers
    if quantization is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class StackedWriter:
    """A file of stacked tensors (hf.stacked) to which several processes write, each pieces of its own."""

    def __init__(self, path: Path, forms: Mapping[str, Form]) -> None:
        """Open what `begin` made of the same `forms`."""
        self._forms = dict(forms)
        _, self._begins, _ = safetensors_layout(forms)
        self._file = path.open("r+b")

    @staticmethod
    def begin(path: Path, forms: Mapping[str, Form]) -> None:
        """Make the file, in its whole length. Raises OSError where there is no room."""
        header, _, length = safetensors_layout(forms)
        with path.open("xb") as file:
            file.write(header)
            file.truncate(length)

    def write(self, name: str, tensor: Tensor) -> None:
        """One piece of `forms`, on the CPU. Raises OSError where there is no room."""
        if (tuple(tensor.shape), tensor.dtype) != self._forms[name]:
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype}: not the piece to come")
        self._file.seek(self._begins[name])
        self._file.write(tensor_bytes(tensor))

    def __enter__(self) -> StackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _as_classifier(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of config.json that make transformers read one label, at the last token but padding."""
    names = [name.replace("ForCausalLM", "ForSequenceClassification") for name in config["architectures"]]
    return {
        "architectures": names,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": config.get("pad_token_id"),
        "tie_word_embeddings": False,
    }


def safetensors_layout(forms: Mapping[str, Form]) -> tuple[bytes, dict[str, int], int]:
    """(header, name -> where its tensor begins, length) of a safetensors file that holds `forms`.

    The format is 8 bytes of header length, a JSON header (name: type, shape, place), and the tensors' bytes.
    The widest types come first, so that every tensor begins at a multiple of its type's size, as readers
    want it. Of a tensor that `forms` has in pieces (hf.stacked) all must be there.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    order = ordered(forms)
    for name in sorted(order, key=lambda name: -forms[order[name][0]][1].itemsize):
        shape, dtype = forms[order[name][0]]
        first = end
        for part in order[name]:  # itself, or the pieces that it is made of
            begins[part], end = end, end + prod(shape) * dtype.itemsize
        shape = (len(order[name]), *shape) if is_piece(order[name][0]) else shape
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + begin for name, begin in begins.items()}, len(head) + end


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, not copied where they lie in one piece."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


class SafetensorsWriter:
    """One safetensors file, written tensor by tensor in any order: memory for the largest of them only."""

    def __init__(self, path: Path, forms: Mapping[str, Form]) -> None:
        """Write the header; `forms` are all tensors of the file."""
        self._waiting = dict(forms)
        header, self._begins, _ = safetensors_layout(forms)
        self._file = path.open("xb")
        self._file.write(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """One tensor of `forms`, on the CPU. Raises OSError where there is no room."""
        if (tuple(tensor.shape), tensor.dtype) != self._waiting.get(name):
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype}: not among the tensors to come")
        del self._waiting[name]
        self._file.seek(self._begins[name])
        self._file.write(tensor_bytes(tensor))

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and self._waiting:
            raise ValueError(f"not written: {sorted(self._waiting)}")
