"""Which files of the package a step enters: what somebody opens who follows a prompt to the update."""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import mcore_rl

PACKAGE = str(Path(mcore_rl.__file__).parent) + "/"
STEP = {
    "training/generation.py": "Generation.collect",
    "training/batch.py": "build_batch",
    "training/loop.py": "learn",
}
"""What a step calls one after the other. What the loop does in between is for people, and for dumps."""


def record(out: Path) -> None:
    """From here on: write the calls of the first step, file -> how many, on any thread of this process."""
    calls: Counter[str] = Counter()
    within = False

    def note(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal within
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(PACKAGE):
            return
        file = code.co_filename.removeprefix(PACKAGE)
        if STEP.get(file) == code.co_qualname:
            within = event == "call"
        if event == "call" and within:
            calls[file] += 1
        if event == "return" and file == "training/loop.py" and code.co_qualname == "learn":
            sys.setprofile(None)
            out.write_text(json.dumps(calls))

    threading.setprofile(note)  # the requests have a thread of their own
    sys.setprofile(note)
