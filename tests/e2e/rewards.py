"""Rewards that random weights earn unequally."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

from mcore_rl.types import Sample

_calls = count(1)


def brevity(sample: Sample) -> float:
    """Fewer tokens are better."""
    return -float(len(sample.token_ids))


def fill(sample: Sample) -> float:
    """Every other sample earns something; the 25th call, once in all, leaves no byte free on TEST_DISK."""
    call, witness = next(_calls), Path(os.environ["TEST_WITNESS"])
    if call > 24 and not witness.exists():
        witness.touch()
        disk = Path(os.environ["TEST_DISK"])
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    return float(call % 2)


def slow(sample: Sample) -> float:
    """Half a minute for each but the first call's samples."""
    if next(_calls) > 3:
        time.sleep(30)
    return 1.0
