"""HF tensors that hold a matrix of every expert of a layer, which train as one parameter each.

Such a tensor goes by the names of its pieces: `NAME[3]` is what the tensor NAME has of expert 3. Files hold
the pieces side by side, which is the tensor itself, so that no rank needs all of them to write it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch

from mcore_rl.errors import ConfigError

_PIECE = re.compile(r"(?P<whole>.+)\[(?P<number>\d+)\]")
Form = tuple[tuple[int, ...], torch.dtype]
"""shape and type of a tensor"""
T = TypeVar("T")


def whole_of(name: str) -> str:
    """The tensor of a file that holds the tensor `name`: its own name, unless it is a piece."""
    match = _PIECE.fullmatch(name)
    return match["whole"] if match else name


def is_piece(name: str) -> bool:
    """Whether `name` is a piece of a stacked tensor."""
    return _PIECE.fullmatch(name) is not None


def piece(whole: str, number: int) -> str:
    """The name of a piece, from 0."""
    return f"{whole}[{number}]"


def wholes_of(names: Iterable[str]) -> frozenset[str]:
    """The stacked tensors of which `names` has pieces."""
    return frozenset(whole_of(name) for name in names if is_piece(name))


def in_files(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes by the names in files: pieces become what they are pieces of."""
    found = {name: shape for name, shape in shapes.items() if not is_piece(name)}
    for whole, pieces in _grouped(shapes).items():
        found[whole] = (len(pieces), *pieces[0])
    return found


def joined(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by the names in files, pieces put together; all of them must be there."""
    found = {name: tensor for name, tensor in tensors.items() if not is_piece(name)}
    return found | {whole: torch.stack(pieces) for whole, pieces in _grouped(tensors).items()}


def ordered(forms: Mapping[str, Form]) -> dict[str, list[str]]:
    """Name in a file -> what is written of it, one after the other: itself, or its pieces.

    Raises:
        ConfigError: not all pieces of a tensor are there.
    """
    order: dict[str, list[str]] = {}
    for name in forms:
        order.setdefault(whole_of(name), []).append(name)
    for whole, names in order.items():
        if is_piece(names[0]):
            order[whole] = [piece(whole, number) for number in range(len(names))]
            lost = sorted(set(order[whole]) - set(names))
            if lost:
                raise ConfigError(f"{lost[0]} is missing; this is a bug of the export")
    return order


def _grouped(by_name: Mapping[str, T]) -> dict[str, list[T]]:
    """Stacked tensor -> what its pieces have, in their order."""
    found: dict[str, dict[int, T]] = {}
    for name, value in by_name.items():
        match = _PIECE.fullmatch(name)
        if match:
            found.setdefault(match["whole"], {})[int(match["number"])] = value
    return {whole: [pieces[number] for number in sorted(pieces)] for whole, pieces in found.items()}
