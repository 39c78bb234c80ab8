"""The files that a path in [data] names, and which of their rows."""

from __future__ import annotations

import glob
import json
import re
from dataclasses import dataclass
from pathlib import Path

from mcore_rl import strict_json
from mcore_rl.errors import DataError
from mcore_rl.terminal import listed, quoted

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
"""of the files that a folder is read for; any other file that is named itself is read as jsonl"""
_ANY_SLICE = re.compile(r"@\[[^\]/]*\]$")
_SLICE = re.compile(r"(?s)(?P<path>.*)@\[(?P<start>-?\d{0,18}):(?P<end>-?\d{0,18})\]")


@dataclass(frozen=True)
class Located:
    """The files behind one path of the configuration."""

    files: tuple[Path, ...]
    """in the order in which they are read; a directory is one that `datasets` saved"""
    rows: slice
    """of all their rows together"""


def locate(path: Path) -> Located:
    """The files that `path` names.

    `PATH@[a:b]` takes the rows a to b of them, counted from 0, as Python slices do (slime's form).

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    match = _SLICE.fullmatch(str(path))
    rows = slice(None)
    if match is not None and not path.exists():
        rows = slice(*(int(match[end]) if match[end] else None for end in ("start", "end")))
        path = Path(match["path"])
    elif not path.exists() and _ANY_SLICE.search(str(path)):
        raise DataError(f"{path}: rows are taken as PATH@[START:END], of whole numbers; write them so")
    return Located(tuple(_files(path)), rows)


def _files(path: Path) -> list[Path]:
    if not path.exists() and glob.has_magic(str(path)):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        files = _once([one for one in found if not one.is_dir() or is_saved_dataset(one)])
        if not files:
            raise DataError(f"{path}: no file matches; check the pattern")
        return files
    if not path.is_dir() or is_saved_dataset(path):
        return [path]
    if (path / "dataset_dict.json").is_file():
        raise DataError(
            f"{path}: several saved datasets, {listed(_splits(path))}; name one, as in {path}/train"
        )
    named = [one for one in path.iterdir() if one.name.endswith(SUFFIXES) and one.name[0] not in "._"]
    files = _once(sorted(one for one in named if not one.is_dir()))
    if not files:
        raise DataError(
            f"{path}: Is a directory without a file of {', '.join(SUFFIXES)}, and none that datasets saved; "
            "name a file, or put files into it"
        )
    return files


def identity_of(path: Path) -> object:
    """What two names of one file share; a name of nothing is itself."""
    try:
        status = path.stat()
    except OSError:
        return path
    return status.st_dev, status.st_ino


def _once(files: list[Path]) -> list[Path]:
    """Each file under the first of its names; links in a folder may give it several."""
    return list({identity_of(path): path for path in reversed(files)}.values())[::-1]


def is_saved_dataset(path: Path) -> bool:
    """Whether `path` is a directory of `Dataset.save_to_disk`."""
    return (path / "state.json").is_file()


def arrow_files(directory: Path) -> list[Path]:
    """The Arrow files of a directory that `datasets` saved, in the order of their rows.

    Raises:
        DataError: its state.json is none.
    """
    state = directory / "state.json"
    try:
        saved = strict_json.parse(state.read_bytes())
        names = [entry["filename"] for entry in saved["_data_files"]]
        if any(not isinstance(name, str) or "/" in name for name in names) or not names:
            raise ValueError("_data_files names no files beside it")
        if saved.get("_indices_files") or saved.get("_indices_data_files"):
            raise ValueError("it holds an order of rows apart from them")
    except OSError as error:
        raise DataError(f"{state}: {error.strerror}; check the directory") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{state}: {quoted(error)} is not what datasets saves; save the dataset again (save_to_disk)"
        ) from None
    return [directory / name for name in names]


def _splits(directory: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads((directory / "dataset_dict.json").read_bytes())["splits"]]
    except (OSError, ValueError, TypeError, KeyError):
        return sorted(one.name for one in directory.iterdir() if is_saved_dataset(one))
