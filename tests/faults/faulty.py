"""`torchrun ... tests/faults/faulty.py FAULTS train ...`: the mcore-rl command with ranks that misbehave.

FAULTS is JSON: one fault for each attempt of torchrun, `{"do": ..., "rank": r, "step": s}`, or null. It fires
in the middle of supervised step s: the gradients are there, no weight has changed. Step 0 is the start of the
rank, before it has imported Megatron; "late" is before anything of mcore-rl's.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from mcore_rl.__main__ import main
from mcore_rl.errors import ConfigError


def refuse() -> None:
    raise ConfigError("only this rank has a wrong file")


def fail() -> None:
    raise ValueError("only this rank has this bug")


def open_all_files() -> None:
    """Use up the files as a leak does; then comes what all code may meet."""
    while True:
        os.open(os.devnull, os.O_RDONLY)


FAULTS: dict[str, Callable[[], None]] = {
    "raise": fail,
    "refuse": refuse,
    "hang": lambda: time.sleep(600),
    "slow": lambda: time.sleep(4),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "vanish": lambda: os._exit(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "no more files": open_all_files,
}


def plant(fault: dict[str, Any]) -> None:
    """On the rank and at the step that it names."""
    if str(fault["rank"]) not in ("any", os.environ["RANK"]):
        return
    if fault["do"] == "late":
        time.sleep(4)
        return
    if fault["step"] == 0:
        from mcore_rl.launch import preflight as module

        name = "check_rank"
    else:
        from mcore_rl.training import model_passes as module

        name = "forward_backward"
    original, calls = getattr(module, name), iter(range(min(1, fault["step"]), 1000))

    def then_misbehave(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        if next(calls) == fault["step"]:
            print(f"fault: {fault['do']} in process {os.getpid()}", file=sys.stderr, flush=True)
            FAULTS[fault["do"]]()
        return result

    setattr(module, name, then_misbehave)


if __name__ == "__main__":
    mine = json.loads(sys.argv[1])[int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))]
    if mine is not None:
        plant(mine)
    sys.exit(main(sys.argv[2:]))
