"""What a checkpoint directory holds, checked: checksums, every parameter, and equality with an HF model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mcore_rl.checkpoint import manifest
from mcore_rl.errors import McoreRLError, NumericsError
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.model.hf.stacked import whole_of
from mcore_rl.model.weights_io import reader
from mcore_rl.terminal import CommandParser, printable


def verify_checkpoint(
    directory: Path, *, config: Path | None = None, against: Path | None = None
) -> dict[str, Any]:
    """Check the manifest, that every parameter can be read and is finite, and its bits against another model.

    Args:
        config: HF directory with config.json, where `directory` has none.
        against: directory of either form that must hold the same weights, bit for bit.

    Raises:
        ConfigError, CheckpointError: not a committed checkpoint of that model, or damaged.
        NumericsError: lists the tensors that are not finite, or differ.
    """
    manifest.read(Path(directory)).check()
    arch = read_architecture(config or directory)
    mapping = ParameterMap(arch, arch.vocab)
    read = reader(directory, mapping)
    other = reader(against, mapping) if against is not None else None
    names = [name for entry in mapping.entries() for name in entry.hf]
    infinite, different = [], []
    for name in names:
        tensor = read(name)
        if not bool(torch.isfinite(tensor).all()):
            infinite.append(name)
        if other is not None and not _same(tensor, other(name)):
            different.append(name)
    if infinite:
        raise NumericsError(f"{directory}: not finite: {infinite}")
    if different:
        raise NumericsError(f"{directory} differs from {against} in {different}")
    return {
        "tensors": len({whole_of(name) for name in names}),
        "equal_to": None if against is None else str(against),
    }


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def main(argv: Sequence[str] | None = None) -> int:
    """`verify_checkpoint.py DIRECTORY [--config DIR] [--against DIR] [--json]`."""
    parser = CommandParser(prog="verify_checkpoint.py", description=__doc__)
    parser.add_argument(
        "directory", type=Path, metavar="DIRECTORY", help="converted, or a training checkpoint"
    )
    parser.add_argument("--config", type=Path, help="HF directory of config.json, if DIRECTORY has none")
    parser.add_argument("--against", type=Path, help="must hold the same weights, bit for bit")
    parser.add_argument("--json", action="store_true", help="the last line of stdout is one JSON object")
    arguments = parser.parse_args(argv)
    try:
        found = verify_checkpoint(arguments.directory, config=arguments.config, against=arguments.against)
    except McoreRLError as error:
        print(printable(f"verify_checkpoint.py: {type(error).__name__}: {error}"), file=sys.stderr)
        return error.exit_code
    equal = f", equal to {arguments.against}" if arguments.against else ""
    text = f"{arguments.directory}: whole, {found['tensors']} tensors{equal}"
    print(printable(text), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(found))
    return 0
