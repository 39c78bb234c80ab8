"""Rewards that random weights earn unequally."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

from mcore_rl.data.curriculum import Candidate
from mcore_rl.types import Sample

_calls = count(1)


def brevity(sample: Sample) -> float:
    """Fewer tokens are better."""
    return -float(len(sample.token_ids))


def patient(sample: Sample) -> float:
    """The reward of brevity, after a moment: a run that has to last waits then, and computes little."""
    time.sleep(0.02)
    return brevity(sample)


def fill(sample: Sample) -> float:
    """Every other sample earns something; the 25th call, once, leaves TEST_SPARE bytes on TEST_DISK."""
    call, witness = next(_calls), Path(os.environ["TEST_WITNESS"])
    if call > 24 and not witness.exists():
        witness.touch()
        disk = Path(os.environ["TEST_DISK"])
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        filler = disk / "filler"
        os.truncate(filler, filler.stat().st_size - int(os.environ["TEST_SPARE"]))
    return float(call % 2)


def by_label(sample: Sample) -> float:
    """Known beforehand: a label that 3 divides never earns anything, of others every second sample does."""
    return float(int(sample.prompt.label) % 3 != 0 and int(sample.id.rpartition("/")[2]) % 2)


def killed(sample: Sample) -> float:
    """The reward of by_label; without a file TEST_WITNESS, a sample of step 3 kills the trainer."""
    if sample.id.rpartition("/")[0].endswith("@3") and not Path(os.environ["TEST_WITNESS"]).exists():
        os.kill(os.getppid(), signal.SIGKILL)
    return by_label(sample)


def nothing(sample: Sample) -> float:
    """No sample earns anything."""
    return 0.0


def half(candidate: Candidate) -> float:
    """A curriculum: half of the prompts that were not sampled yet, and no other."""
    return 0.0 if candidate.rewards else 0.5


def slow(sample: Sample) -> float:
    """Half a minute for each but the first call's samples."""
    if next(_calls) > 3:
        time.sleep(30)
    return 1.0


def noted(sample: Sample) -> float:
    """The reward of brevity, and a line of TEST_WITNESS with the time and the sample's id."""
    with Path(os.environ["TEST_WITNESS"]).open("a") as file:
        file.write(f"{time.time()} {sample.id}\n")
    return brevity(sample)
