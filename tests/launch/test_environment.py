"""What a launcher says to a rank: all of it is there and makes sense, or it is named."""

from __future__ import annotations

import pytest

from mcore_rl.errors import ConfigError
from mcore_rl.launch.environment import check_environment

SOUND = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MASTER_ADDR", None),
        ("MASTER_ADDR", ""),
        ("MASTER_PORT", None),
        ("MASTER_PORT", "abc"),
        ("MASTER_PORT", "65536"),
        ("RANK", "abc"),
        ("RANK", ""),
        ("RANK", "-1"),
        ("RANK", "2"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "9" * 5000),
        ("LOCAL_RANK", "\u0663"),
        ("TORCHELASTIC_RESTART_COUNT", ""),
        ("SLURM_RESTART_COUNT", "x\x1b[2J"),
    ],
)
def test_what_no_launcher_says_is_named(monkeypatch, name: str, value: str | None) -> None:
    for key, sound in SOUND.items():
        monkeypatch.setenv(key, sound)
    check_environment()
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"environment: {name} is .*torchrun") as refused:
        check_environment()
    assert len(str(refused.value)) < 500
    assert "\x1b" not in str(refused.value)
