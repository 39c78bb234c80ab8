"""Which safetensors files of a Hugging Face directory hold its weights, for the trainer and embedded servers.

Other programs look at the same directory: transformers takes `model.safetensors` where there is one, before
any index; SGLang takes the files of the index. A directory in which they would find different weights is
refused. `consolidated.safetensors`, in which Mistral publishes a model a second time under names of its own,
is left where it lies by all of them, and so is what an index does not name; `unread` tells.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from mcore_rl.errors import ConfigError
from mcore_rl.terminal import listed, quoted, short

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONSOLIDATED = "consolidated*.safetensors"
ADAPTER = ("adapter_config.json", "adapter_model*.safetensors", "adapter_model.bin")


def check_model_directory(directory: Path) -> None:
    """Raises ConfigError where there is no model; what imports nothing heavy can ask it first."""
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory}: no config.json; give a local HF checkpoint directory")


def weight_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files in the order of their names, and tensor name -> file name where there is an index.

    Raises:
        ConfigError: no safetensors, an index that is malformed, points out of the directory or names a file
            that is not there, files that two readers would choose differently, or an adapter.
    """
    _refuse_adapter(directory)
    index = directory / INDEX
    found = _safetensors_in(directory)
    single = directory / SINGLE
    for path in (index, *found):
        if os.path.lexists(path) and not path.is_file():  # to read a pipe could take for ever
            what = "not a plain file" if path.exists() else "a link that leads nowhere"
            raise ConfigError(f"{path}: {what}; fetch or export it again")
    if not index.exists():
        if not found:
            raise ConfigError(
                f"{directory}: no *.safetensors; put the published ones beside config.json, or set "
                "model.random_init = true"
            )
        return _without_index(found, single), None
    weight_map = _read_index(index)
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise ConfigError(f"{index}: {short(name)} points to {quoted(file)}, outside the directory")
    names = sorted(set(weight_map.values()))
    if single.exists() and names != [SINGLE]:
        raise ConfigError(_two_readers(single, index, "other programs read the files of"))
    missing = [name for name in names if not _is_file(directory / name)]
    if missing or not names:
        raise ConfigError(
            f"{index}: names {listed(missing)}, which are not in the directory; fetch or export it again"
        )
    return [directory / name for name in names], weight_map


def unread(directory: Path) -> str | None:
    """What to say of safetensors files in `directory` that no reader takes for weights; None for none.

    Also None where its weights cannot be told, which who reads them says.
    """
    try:
        files, weight_map = weight_files(directory)
    except (ConfigError, OSError):
        return None
    others = [path.name for path in _safetensors_in(directory) if path not in files]
    if not others:
        return None
    of = SINGLE if weight_map is None else f"the files of {INDEX}"
    return (
        f"{directory}: {listed(others)} are not read, neither here nor by servers: the weights are {of}; "
        "where they belong to it, export the model again"
    )


def _safetensors_in(directory: Path) -> list[Path]:
    """Those that any reader sees: hidden ones, as macOS leaves beside what it copies, are nobody's."""
    return sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("."))


def _refuse_adapter(directory: Path) -> None:
    """transformers adds an adapter to the weights when it has the package for it; nothing here does."""
    for path in sorted(directory.glob("*")):  # a pattern without a star would miss a link that leads nowhere
        if any(path.match(pattern) for pattern in ADAPTER):
            raise ConfigError(
                f"{path}: an adapter beside the weights, which some programs add to them and others do not; "
                "merge it into them, or move its files away"
            )


def _without_index(found: list[Path], single: Path) -> list[Path]:
    """The files that all readers take: of `found`, or the one besides Mistral's form."""
    others = [path for path in found if path != single]
    consolidated = [path for path in others if path.match(CONSOLIDATED)]
    if single in found and others in ([], [single.with_name("consolidated.safetensors")]):
        return [single]
    if single in found:
        raise ConfigError(_two_readers(single, others[0], "other programs read"))
    if consolidated:
        raise ConfigError(
            f"{consolidated[0]}: weights under Mistral's own names; fetch model*.safetensors and its index, "
            "in the form of transformers"
        )
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file system takes
        return False


def _two_readers(single: Path, other: Path, others: str) -> str:
    return (
        f"{single} and {other}: transformers reads the first alone, {others} the second, and they may be two "
        "models; remove one of them"
    )


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if all(isinstance(file, str) for file in weight_map.values()):
            return weight_map
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ConfigError(
        f"{index}: not an index of safetensors files (weight_map: name -> file); export it again"
    )
