"""The command line itself; what each command does is tested where it is done."""

from __future__ import annotations

import argparse
import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.outputs import output_directory, output_file
from mcore_rl import __version__
from mcore_rl.__main__ import _apart, _check_paths, build_parser, main
from mcore_rl.errors import ConfigError
from mcore_rl.server.__main__ import main as serve
from tests.sources import ROOT


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


@pytest.mark.parametrize(
    ("argv", "words", "overrides"),
    [
        (["demo", "--train.steps", "5"], ["demo"], ["--train.steps", "5"]),
        (["demo", "DIR", "--train.steps=5"], ["demo", "DIR"], ["--train.steps=5"]),
        (["train", "--optimizer.lr", "-1", "a.toml"], ["train", "a.toml"], ["--optimizer.lr", "-1"]),
        (["train", "a.toml", "--run.dir", "--resume"], ["train", "a.toml", "--resume"], ["--run.dir"]),
        (["plan", "a.toml", "--gpus", "8"], ["plan", "a.toml", "--gpus", "8"], []),
    ],
)
def test_a_value_of_a_key_is_no_path(argv: list[str], words: list[str], overrides: list[str]) -> None:
    assert _apart(argv) == (words, overrides)


def in_shell(what: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """`what` with "$@" as the command, or as Python with that code."""
    program = ["-c", code] if code else ["-m", "mcore_rl"]
    line = ["bash", "-c", f"set -o pipefail; {what}", "bash", sys.executable, *program]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=200, check=False)


def test_output_that_nobody_takes_is_no_success() -> None:
    full = in_shell('"$@" config run >/dev/full')
    assert (full.returncode, "Traceback" in full.stderr) == (75, False)
    assert full.stderr.startswith("mcore-rl: StorageError: standard output: No space left")


@pytest.mark.parametrize("words", ["--version", "train --help", "config run"])
def test_a_reader_that_leaves_ends_the_command_without_a_word(words: str) -> None:
    """However Python buffers what is printed, and with the code that a shell gives for it."""
    for unbuffered in ("", "1"):
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-m", "mcore_rl", *words.split()]
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        streams = {"stdout": writer, "stderr": subprocess.PIPE}
        ended = subprocess.run(command, **streams, text=True, env=environment, cwd=ROOT, check=False)
        os.close(writer)
        assert (ended.returncode, ended.stderr) == (141, "")


def test_an_error_is_said_though_nobody_reads_what_was_printed_before_it() -> None:
    code = "import sys; from mcore_rl.streams import printing\n"
    code += "def work():\n    print(1)\n    raise ValueError('gone wrong')\nprinting(work)"
    full = in_shell('"$@" >/dev/full', code)
    assert (full.returncode, full.stderr.strip().splitlines()[-1]) == (1, "ValueError: gone wrong")


def test_a_closed_standard_output_takes_nothing_that_is_needed() -> None:
    code = "import sys; from mcore_rl.streams import guard; guard(output=True); print(1); sys.stdout.flush()"
    assert "StorageError: standard output: Bad file descriptor" in in_shell('"$@" >&-', code).stderr
    assert in_shell('"$@"', code).stdout == "1\n"


GUARDED = """
import faulthandler, os, sys
from mcore_rl.streams import guard
guard(output=False)
for _ in range(1000):
    print("step", flush=True)
    print("step", file=sys.stderr)
faulthandler.enable()
assert os.open("/dev/null", os.O_RDONLY) > 2, "a file has taken the place of standard error"
os._exit(7)
"""


@pytest.mark.parametrize("lost", [">/dev/full 2>&1", ">&- 2>&-", "2>&1 | true", ">/dev/full 2>&-"])
def test_a_run_does_not_end_because_nobody_reads_what_it_says(lost: str) -> None:
    assert in_shell(f'"$@" {lost}', GUARDED).returncode == 7
    unguarded = GUARDED.replace("guard(output=False)", "")
    assert in_shell(f'"$@" {lost}', unguarded).returncode != 7


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["convert", "hf-to-mcore", "here", "new"], ""),
        (["convert", "mcore-to-hf", "here", "new", "--config", "here"], ""),
        (["convert", "merge", "here", "new", "--model", "here"], ""),
        (["convert", "adapter", "here", "new", "--model", "here"], ""),
        (["follow", "here", "new"], ""),
        (["convert", "merge", "here", "new", "--model", "gone"], "gone"),
        (["convert", "mcore-to-hf", "here", "new", "--config", "gone"], "gone"),
        (["eval", "gone"], "gone"),
        (["chat", "gone"], "gone"),
        (["plan", "gone"], "gone"),
    ],
)
def test_what_is_read_must_be_there_and_what_is_made_need_not(
    words: list[str], missing: str, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    paths = {name: str(tmp_path / name) for name in ("here", "new", "gone")}
    arguments = build_parser().parse_args([paths.get(word, word) for word in words])
    if not missing:
        _check_paths(arguments)
        return
    with pytest.raises(ConfigError, match="gone: No such file or directory"):
        _check_paths(arguments)


def test_arguments_that_are_repeated_stay_text(capsys) -> None:
    wrong = [["report", "x", "--\x1b[2J"], ["\u202e"], ["plan", "x", "--gpus", "\x1b[2J"]]
    wrong += [["serve", "x", "--\x1b[2J"], ["serve", "x", "--port", "\u202e"]]
    for command in wrong:
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 2
    said = capsys.readouterr().err
    assert "\\x1b[2J" in said
    assert not {"\x1b", "\u202e"} & set(said)


def test_the_servers_own_command_repeats_arguments_as_text(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["server", "x", "--\x1b[2J\nmcore-rl: done"])
    with pytest.raises(SystemExit) as end:
        serve()
    said = capsys.readouterr().err
    assert (end.value.code, "\\x1b[2J" in said, "\x1b" in said) == (2, True, False)


def test_a_benchmark_that_could_not_write_what_it_found_does_not_begin(tmp_path: Path) -> None:
    file, absent = tmp_path / "file", tmp_path / "absent"
    file.touch()
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=output_file)
    parser.add_argument("--into", type=output_directory)
    sound = [["--out", file], ["--out", tmp_path / "new.json"], ["--out", "new.json"], ["--into", tmp_path]]
    wrong = [["--out", tmp_path], ["--out", absent / "new.json"], ["--out", file / "new.json"]]
    wrong += [["--into", file], ["--into", absent]]
    for words in sound:
        parser.parse_args([*map(str, words)])
    for words in wrong:
        with pytest.raises(SystemExit):
            parser.parse_args([*map(str, words)])
    scripts = [path for path in (ROOT / "benchmarks").glob("*.py") if '"--out", type=' in path.read_text()]
    ends = r'"--out", type=(output_file|output_directory)\b'
    unchecked = {path.stem for path in scripts if not re.search(ends, path.read_text())}
    assert unchecked == {"gpu_record"}, "which makes its directory before anything is measured"


def test_no_memory_is_worth_a_retry_and_said_in_a_line(monkeypatch, tmp_path, capsys) -> None:
    """Also where what lacked it called a file wrong; an error of its own stays what it is."""

    def lack(*_: object, **__: object) -> None:
        try:
            raise MemoryError
        except MemoryError as error:
            raise ConfigError("no readable file\n  here") from error

    for what in (
        MemoryError(),
        OSError(errno.ENOMEM, "mmap"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        monkeypatch.setattr("mcore_rl.report.write_report", raises(what))
        assert main(["report", str(tmp_path)]) == 75
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.startswith("mcore-rl: ResourceError: process ")
    monkeypatch.setattr("mcore_rl.report.write_report", lack)
    assert main(["report", str(tmp_path)]) == 75
    assert "no readable file" in capsys.readouterr().err
    monkeypatch.setattr("mcore_rl.report.write_report", raises(KeyError("a bug")))
    with pytest.raises(KeyError):
        main(["report", str(tmp_path)])


def raises(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail
