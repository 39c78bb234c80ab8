"""The exit code of a launch, and who is named as its cause, from what ranks wrote and how they left."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcore_rl.launch.verdict import Left, exit_code_of_launch
from mcore_rl.log import append_event, read_metrics
from mcore_rl.training.faults.exits import end_of_events

NOW = 1000


def end(rank: int, code: int) -> tuple[str, dict]:
    return "end", {"rank": rank, "exit_code": code}


def error(rank: int, kind: str, code: int) -> tuple[str, dict]:
    return "error", {"rank": rank, "type": kind, "message": "", "exit_code": code}


ECHO = [error(1, "RuntimeError", 75), end(1, 75)]
CASES = {
    "all are done": ([end(0, 0), end(1, 0)], {}, 0, ""),
    "one has not said that it is done": ([end(1, 0)], {}, 75, "rank 0 left with exit code 0, without an"),
    "none has written anything": ([], {}, 75, "rank 1 left with exit code 0, without"),
    "its echo came first": (ECHO, {1: Left(75, NOW)}, 75, "rank 0 left with exit code 0, without"),
    "os._exit(3)": (ECHO, {0: Left(3, NOW), 1: Left(75, NOW)}, 75, "rank 0 left with exit code 3, without"),
    "a crash": (ECHO, {0: Left(-11, NOW), 1: Left(75, NOW)}, 75, "rank 0 was ended by signal 11 (SIGSEGV)"),
    "killed, and the other's echo": (
        ECHO,
        {0: Left(-9, NOW), 1: Left(75, NOW)},
        75,
        "rank 0 was ended by signal 9",
    ),
    "killed, and the other ended by the launcher": (
        [error(1, "AskedToLeave", 75), end(1, 75)],
        {0: Left(-9, NOW), 1: Left(75, NOW + 1)},
        75,
        "rank 0 was ended by signal 9 (SIGKILL)",
    ),
    "both silent, one ended by the launcher": (
        [],
        {0: Left(-15, NOW), 1: Left(-11, NOW)},
        75,
        "rank 1 was ended by signal 11",
    ),
    "the configuration is refused in the rank": (
        [],
        {0: Left(2, NOW), 1: Left(2, NOW)},
        2,
        "rank 1 left with",
    ),
    "a typed cause": (
        [error(1, "RewardError", 2), end(1, 2), error(0, "RuntimeError", 75), end(0, 2)],
        {0: Left(2, NOW), 1: Left(2, NOW)},
        2,
        "",
    ),
    "a typed cause, and the launcher killed the other": (
        [error(1, "RewardError", 2), end(1, 2)],
        {0: Left(-9, NOW + 60), 1: Left(2, NOW)},
        2,
        "",
    ),
    "a hang": ([error(0, "Hang", 75)], {0: Left(75, NOW), 1: Left(-9, NOW + 30)}, 75, ""),
    "an untyped error of its own": (
        [error(1, "OSError", 75), end(1, 75), end(0, 75)],
        {1: Left(75, NOW)},
        75,
        "",
    ),
    "a bug": ([error(0, "KeyError", 1), end(0, 1), end(1, 1)], {0: Left(1, NOW)}, 1, ""),
    "done, but a thread kept it": (
        [end(0, 0), end(1, 0)],
        {1: Left(1, NOW)},
        75,
        "rank 1 was done, but left with",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_who_is_named_and_with_which_code(tmp_path: Path, capsys, name: str):
    written, left, code, says = CASES[name]
    append_event(tmp_path, "error", rank=0, type="ConfigError", message="of an earlier launch", exit_code=2)
    since = end_of_events(tmp_path)
    for kind, fields in written:
        append_event(tmp_path, kind, **fields)
    assert exit_code_of_launch(tmp_path, since, 2, left) == code
    said = capsys.readouterr().err
    assert says in said
    assert says or not said
    named = [event for event in read_metrics(tmp_path / "events.jsonl", since) if event["kind"] == "error"]
    assert (named[-1]["message"] in said) if says and "done, but" not in says else True


def test_the_step_that_was_done_last_is_named(tmp_path: Path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    assert exit_code_of_launch(tmp_path, 0, 1, {0: Left(-11, NOW)}) == 75
    assert "without an `end` event, after step 1;" in capsys.readouterr().err
