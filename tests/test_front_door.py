"""The public names of the package, and what importing them costs."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

import mcore_rl
from mcore_rl import errors
from mcore_rl.errors import McoreRLError
from tests.sources import ROOT


@pytest.mark.parametrize("name", mcore_rl.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(mcore_rl, name).__name__ == name
    assert name in dir(mcore_rl)


def test_every_typed_error_is_public() -> None:
    typed = {name for name, x in vars(errors).items() if isinstance(x, type) and issubclass(x, McoreRLError)}
    assert "StorageError" in typed
    assert typed <= set(mcore_rl.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        getattr(mcore_rl, "Trainer")  # noqa: B009  as a user would meet it


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import mcore_rl", "torch"),
        ("from mcore_rl import load_config, RewardFn, Sample", "torch"),
        ("import mcore_rl.plan.command", "megatron"),
    ],
)
def test_a_name_loads_only_what_it_needs(statement: str, absent: str) -> None:
    program = f"import sys\n{statement}\nprint({absent!r} in sys.modules)"
    words = [sys.executable, "-c", program]
    assert subprocess.run(words, capture_output=True, text=True, check=True, timeout=100).stdout == "False\n"


def cpu_seconds(*words: str) -> tuple[float, str]:
    """CPU-seconds of Python with these words, the least of two, and what it said on stderr."""
    found = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ended = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, timeout=200, check=False, cwd=ROOT
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found), ended.stderr


def test_a_wrong_key_is_said_before_anything_heavy_is_imported() -> None:
    took, said = cpu_seconds("-m", "mcore_rl", "train", "examples/gspo_tiny.toml", "--parallel.tensr", "2")
    assert "did you mean parallel.tensor?" in said
    assert took < 0.6


def test_a_plan_does_not_wait_for_megatron() -> None:
    took, said = cpu_seconds("-m", "mcore_rl", "plan", "examples/gspo_70b.toml", "--gpus", "64")
    assert not said
    assert took < 3.5


def test_the_clock_sees_an_import_of_megatron() -> None:
    assert cpu_seconds("-c", "import mcore_rl.parallel.mesh")[0] > 0.6
