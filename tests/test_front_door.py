"""The public names of the package, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mcore_rl
from mcore_rl import errors
from mcore_rl.errors import McoreRLError


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
    [("import mcore_rl", "torch"), ("from mcore_rl import load_config, RewardFn, Sample", "megatron")],
)
def test_a_name_loads_only_what_it_needs(statement: str, absent: str) -> None:
    program = f"import sys\n{statement}\nprint({absent!r} in sys.modules)"
    words = [sys.executable, "-c", program]
    assert subprocess.run(words, capture_output=True, text=True, check=True, timeout=100).stdout == "False\n"
