"""Losses that do to a rank what native code does sooner or later."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from mcore_rl.algo.losses import TokenLoss, reinforce
from mcore_rl.algo.rows import Rows


def vanish(rows: Rows) -> TokenLoss:
    """Rank 0 is gone, with the exit code of success."""
    if os.environ.get("RANK", "0") == "0":
        os._exit(0)
    return reinforce(rows)


def crash(rows: Rows) -> TokenLoss:
    """A native library reads where it must not, in the second step."""
    if Path(os.environ["METRICS"]).read_text().count("\n") == 2:
        ctypes.string_at(0)
    return reinforce(rows)
