"""Reward functions that do what user code does sooner or later; the text of a response says what."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import sys
import time
from multiprocessing import get_context
from typing import Any

from mcore_rl.rewards.outcome import Void
from mcore_rl.types import Group, Sample


class Odd:
    """It cannot even be compared."""

    def __le__(self, other: object) -> bool:
        raise RuntimeError("odd")


class Ending(float):
    """It ends whoever looks at it, and is a float."""

    def __float__(self) -> float:
        raise SystemExit(3)


def _print_without_end(_: Sample) -> float:
    while True:
        print("x" * 10_000)


def _copy(how: str, _: Sample) -> float:
    if os.fork() == 0:
        if how == "raises":
            raise ValueError("in the copy")
        if how == "exits":
            sys.exit(0)
    return 0.5


def _pool(_: Sample) -> float:
    with get_context("fork").Pool(1) as pool:
        return float(pool.map(len, ["abc"])[0])


def _daemon(_: Sample) -> float:
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    return float(child)


def _alarm(_: Sample) -> float:
    """It sets an alarm, as math-verify does by default."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(600)
    except TimeoutError:
        return 0.25
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return 0.0


def _raise(error: BaseException) -> Any:
    raise error


def _say(said: bytes) -> float:
    """What user code writes into the worker's own connection; it waits for what is made of it."""
    os.write(int(sys.argv[2]), said)
    time.sleep(600)
    return 1.0


WHAT = {
    "raises": lambda s: _raise(ValueError("no \x1b[2J number")),
    "exits": lambda s: sys.exit(0),
    "exits 3": lambda s: sys.exit(3),
    "interrupted": lambda s: _raise(KeyboardInterrupt()),
    "generator": lambda s: _raise(GeneratorExit()),
    "_exits": lambda s: os._exit(0),
    "crashes": lambda s: os.kill(os.getpid(), signal.SIGSEGV),
    "signal": lambda s: os.kill(os.getpid(), signal.SIGRTMIN + 5),
    "hangs": lambda s: time.sleep(600),
    "prints": _print_without_end,
    "grows": lambda s: float(len(bytearray(1 << 40))),
    "nan": lambda s: float("nan"),
    "text": lambda s: "1",
    "none": lambda s: None,
    "odd": lambda s: Odd(),
    "ending": lambda s: Ending(1.0),
    "kills its group": lambda s: os.killpg(0, signal.SIGKILL),
    "closes all": lambda s: os.closerange(3, 1024),
    "stops": lambda s: os.kill(os.getpid(), signal.SIGSTOP),
    "says noise": lambda s: _say(b"\xff" * 64),
    "says half": lambda s: _say(struct.pack("!i", 1000) + b"[1"),
    "says too much": lambda s: _say(struct.pack("!i", 1 << 30)),
    "says an object": lambda s: _say(struct.pack("!i", 2) + b"{}"),
    "says NaN": lambda s: _say(struct.pack("!i", 15) + b"[[NaN, [], []]]"),
    "says a tower": lambda s: _say(struct.pack("!i", 100_000) + b"[" * 100_000),
    "says a number": lambda s: _say(struct.pack("!i", 3) + b"[1]"),
    "copy": lambda s: _copy("returns", s),
    "copy raises": lambda s: _copy("raises", s),
    "void": lambda s: Void("grader"),
    "pool": _pool,
    "daemon": _daemon,
    "alarm": _alarm,
    "parts": lambda s: {"a": 1.0, "b": [0.5]},
    "process": lambda s: float(os.getpid()),
    "torch": lambda s: float("torch" in sys.modules),
    "closes": lambda s: float(os.close(1) or 1),
    "pops": lambda s: s.prompt.metadata.pop("key"),
    "slow": lambda s: time.sleep(0.05) or 1.0,
}


def does(sample: Sample) -> Any:
    """What the text says; 1 for any other."""
    return WHAT.get(sample.text, lambda s: 1.0)(sample)


async def asynchronous(sample: Sample) -> float:
    """A coroutine."""
    await asyncio.sleep(0)
    return 2.0


def compared(group: Group) -> list[Any]:
    """The samples of a group by rank; Void where the text says so."""
    texts = sorted(s.text for s in group.samples)
    return [Void("grader") if s.text == "void" else float(texts.index(s.text)) for s in group.samples]


async def too_few(group: Group) -> list[float]:
    """Fewer rewards than samples."""
    return [1.0]


def with_special_tokens(sample: Sample) -> float:
    """Whether the tag, a special token, is seen in the full text and nowhere else."""
    from mcore_rl.rewards import full_text, tokenizer

    assert tokenizer().decode([0])
    return float("<|im_end|>" in full_text(sample) and "<|im_end|>" not in sample.text)


def noted(sample: Sample, *, file: str) -> float:
    """One, and a line with the sample's id for whoever waits."""
    with open(file, "a") as witness:
        witness.write(f"{sample.id}\n")
    return 1.0


def length(sample: Sample, bonus: float = 0.0) -> dict[str, float]:
    """Two parts."""
    return {"long": float(len(sample.text)), "short": bonus}


def turns(sample: Sample) -> list[float]:
    """One for the only turn."""
    return [4.0]


def void(sample: Sample) -> Void:
    """It cannot be judged."""
    return Void("grader", "said HTTP 500")
