"""What a launcher says to a rank in its environment, checked before any of it is used."""

from __future__ import annotations

import os

from mcore_rl.errors import ConfigError

_MOST_RANKS = 1 << 24


def check_environment() -> None:
    """Raises ConfigError for what no launcher says to a rank, such as RANK without MASTER_ADDR."""
    world = _number("WORLD_SIZE", 1, _MOST_RANKS)
    _number("RANK", 0, world - 1)
    _number("MASTER_PORT", 1, (1 << 16) - 1)
    if not os.environ.get("MASTER_ADDR"):
        raise _wrong("MASTER_ADDR", "the address of the first rank's host")
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        if name in os.environ:
            _number(name, 0, _MOST_RANKS)


def _number(name: str, low: int, high: int) -> int:
    text = os.environ.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        raise _wrong(name, f"a number from {low} to {high}")
    return int(text)


def _wrong(name: str, expected: str) -> ConfigError:
    given = f"is {os.environ[name]!r:.100}" if name in os.environ else "is not set"
    return ConfigError(
        f"environment: {name} {given}, expected {expected}. RANK and WORLD_SIZE make this process a rank "
        "of a launcher: start it with torchrun, which sets them all, or unset them to train on this machine"
    )
