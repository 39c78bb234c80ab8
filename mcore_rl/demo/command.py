"""The demo: problems of arithmetic, a supervised warm start, reinforcement learning, and the report."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mcore_rl import strict_json
from mcore_rl.config import load_config
from mcore_rl.directories import storage_error
from mcore_rl.errors import ConfigError
from mcore_rl.imports import python_module
from mcore_rl.log import tell
from mcore_rl.terminal import escaped, joined

PROBLEMS = "arithmetic.py"
WARM_START, RECIPE = "sft_tiny.toml", "gspo_tiny.toml"


def files() -> Path:
    """The directory of the demo's files: this one in a wheel, `examples` in a clone."""
    here = Path(__file__).parent
    for directory in (here, here.parents[1] / "examples"):
        if (directory / PROBLEMS).is_file():
            return directory
    raise ConfigError(f"{here} lacks {PROBLEMS}, which a wheel and a clone have; install mcore-rl again")


def demo(directory: Path, overrides: Sequence[str]) -> int:
    """Write everything into `directory`, where an earlier demo goes; the exit code of what ended it.

    Args:
        overrides: `--section.key value` of both runs.

    Raises:
        ConfigError: it holds data or a run that are of no demo; nothing was touched.
        StorageError: it cannot be made.
    """
    there, warm = files(), directory / "warm_start"
    check_replaced(directory)
    data = ["--data.train", str(directory / "data" / "train.jsonl")]
    held_out = ["--data.eval", str(directory / "data" / "eval.jsonl")]
    module = python_module("mcore_rl")
    first = ["--run.dir", str(warm), "--model.path", str(directory / "data" / "model"), *data]
    second = ["--run.dir", str(directory), "--model.path", str(warm / "model"), *data, *held_out]
    for recipe, flags in ((WARM_START, first), (RECIPE, second)):  # before anything is written
        load_config(there / recipe, [*flags, *overrides])
    if what := shortened(there / WARM_START, first, overrides):
        tell(f"mcore-rl: note: {what}", is_main=True)
    tell(f"two cores take some minutes; the report will be {directory}/report.html", is_main=True)
    steps = (
        [sys.executable, str(there / PROBLEMS), str(directory / "data"), "--seed", "0"],
        [*module, "train", str(there / WARM_START), "--overwrite", *first, *overrides],
        [*module, "train", str(there / RECIPE), "--overwrite", *second, *overrides],
        [*module, "report", str(directory)],
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(directory, error) from error
    for words in steps:
        code = _run(words)
        if code:
            return code if code > 0 else 128 - code
    tell(
        f"open {directory}/report.html in a browser; `mcore-rl chat {directory}` asks the model a sum",
        is_main=True,
    )
    return 0


def shortened(recipe: Path, flags: Sequence[str], overrides: Sequence[str]) -> str:
    """What to say where the overrides leave the warm start fewer steps than its recipe has; else nothing."""
    own, given = (load_config(recipe, [*flags, *more]).train.steps for more in ((), overrides))
    if given >= own:
        return ""
    return (
        f"train.steps = {given} is that of the warm start too, in the place of its {own}: what is trained "
        "then begins with less"
    )


def check_replaced(directory: Path) -> None:
    """Raises ConfigError where a demo would replace files or a run that are of no earlier demo."""
    data = directory / "data"
    written = [data / name for name in ("train.jsonl", "eval.jsonl", "model")]
    ours = _is_demo_data(written[0])
    found = [] if ours else [path for path in written if os.path.lexists(path)]
    if not (ours or found) and (directory / "resolved.toml").exists():
        found = [directory / "resolved.toml"]
    if found:
        raise ConfigError(
            f"{joined(map(escaped, found))} would be replaced, and of no earlier demo; nothing "
            "was touched: give another directory, or move them away"
        )


def _is_demo_data(path: Path) -> bool:
    """Whether a file begins with a problem as PROBLEMS writes them."""
    try:
        with path.open("rb") as file:
            row = strict_json.parse(file.readline(1000))
    except (OSError, ValueError):
        return False
    return (
        isinstance(row, dict) and row.keys() == {"id", "prompt", "label"} and row["prompt"] == f"{row['id']}="
    )


def _run(words: Sequence[str]) -> int:
    """The exit code of a command, which ends as it likes when this process is asked to.

    Ctrl-C reaches it too, as one of the terminal's; SIGTERM is passed on.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    process = subprocess.Popen(words)
    try:
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
