"""The command line itself; what each command does is tested where it is done."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from mcore_rl import __version__
from mcore_rl.__main__ import build_parser, main


def test_the_version_is_that_of_everything_an_error_may_come_from(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(f"mcore_rl {__version__}, Python 3.")
    assert f"megatron-core {version('megatron-core')}" in others
    assert "version" not in vars(build_parser().parse_args(["plan", "a.toml"])), (
        "it is no argument of a command"
    )


def test_an_unknown_command_names_those_there_are(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["trian"])
    assert end.value.code == 2
    assert "train" in capsys.readouterr().err
