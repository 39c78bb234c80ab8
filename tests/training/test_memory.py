"""Memory that malloc holds free is given back."""

from __future__ import annotations

import psutil
import pytest

from mcore_rl.training.trainer import give_back_memory

BLOCKS, EACH = 1000, 100_000
"""too small for pages of their own"""


def test_what_is_free_between_what_stays_is_given_back() -> None:
    process = psutil.Process()
    blocks = [bytearray(b"x" * EACH) for _ in range(BLOCKS)]
    stays = blocks[:: BLOCKS // 10]
    del blocks
    before = process.memory_info().rss
    give_back_memory()
    assert before - process.memory_info().rss > 0.5 * BLOCKS * EACH
    assert all(one == b"x" * EACH for one in stays)


def test_a_library_without_it_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    give_back_memory()
