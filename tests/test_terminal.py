"""Text of others is text: no terminal acts on what servers, files and samples wrote."""

from __future__ import annotations

import ast
import asyncio
import json
from pathlib import Path

import pytest
from aiohttp import web

from mcore_rl.__main__ import main
from mcore_rl.data.prompts import open_prompts
from mcore_rl.errors import DataError, McoreRLError, NumericsError, RewardError
from mcore_rl.report.compare import main as compare
from mcore_rl.report.runs import RunData
from mcore_rl.report.summary import text_table
from mcore_rl.rollout.client import RejectedError, RolloutClient
from mcore_rl.terminal import escaped, printable
from mcore_rl.training.faults.exits import last_words
from tests.sources import READERS, modules, report

FORGED = "mcore-rl: done, exit code 0"
HOSTILE = f"\x1b[2J\x1b]0;title\x07\r\n{FORGED}\r{FORGED}\u2028{FORGED}\x9b31m\u202etxt.exe\u2066\x7f\ud800"
ACTS = set("\x1b\x07\r\x9b\u202e\u2066\u2028\x7f\ud800")


def harmless(text: str) -> None:
    """Nothing that a terminal acts on but line feeds, and no line of ours that is not ours."""
    assert not ACTS & set(text)
    assert not any(line == FORGED for line in text.splitlines()), text


def test_the_hostile_text_is_hostile() -> None:
    """The control: printed as it is, it forges lines."""
    assert FORGED in HOSTILE.splitlines()
    with pytest.raises(AssertionError):
        harmless(HOSTILE)


def test_what_acts_is_shown_and_what_reads_stays() -> None:
    assert escaped(HOSTILE).startswith(r"\x1b[2J\x1b]0;title\x07\r\nmcore-rl: done")
    assert len(escaped(HOSTILE).splitlines()) == 1
    harmless(escaped(HOSTILE))
    for text in ("ü 日本 \u00a0 € 😀", "", "no rollout server is left:"):
        assert escaped(text) == text
    assert printable("two mistakes:\n  train.steps: 0\nrun.dir: missing") == (
        "two mistakes:\n  train.steps: 0\n  run.dir: missing"
    )
    harmless(printable(HOSTILE))


def test_the_last_words_of_a_run_are_harmless_with_or_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (RewardError(f"sample x: {HOSTILE}"), KeyError(HOSTILE), ValueError(HOSTILE)):
        try:
            raise error
        except (McoreRLError, KeyError, ValueError) as raised:
            last_words(tmp_path / type(error).__name__, raised, 0)
        said = capsys.readouterr().err
        assert type(error).__name__ in said
        harmless(said)


def test_an_error_text_of_a_server_is_one_line() -> None:
    async def go() -> str:
        async def refuse(_: web.Request) -> web.Response:
            return web.Response(status=400, body=HOSTILE.encode(errors="replace"))

        app = web.Application()
        app.router.add_route("*", "/{path:.*}", refuse)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            async with RolloutClient(f"http://127.0.0.1:{runner.addresses[0][1]}") as client:
                with pytest.raises(RejectedError) as refused:
                    await client.model_info()
            return str(refused.value)
        finally:
            await runner.cleanup()

    said = asyncio.run(go())
    assert "HTTP 400" in said
    assert FORGED in said, "it is quoted"
    assert len(said.splitlines()) == 1
    harmless(said)


def test_keys_and_names_of_a_prompt_file_are_harmless(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"a\x1b[2J\r\n{FORGED}\nb.jsonl"
    path.write_text(json.dumps({HOSTILE: 1, "k" * 100_000: 2}) + "\n")
    with pytest.raises(DataError) as refused:
        open_prompts(
            [path],
            None,  # pyright: ignore[reportArgumentType] (the key is missing before anything is encoded)
            max_prompt_tokens=8,
        )
    assert len(str(refused.value)) < 1200
    assert main(["report", str(path)]) == 2
    said = capsys.readouterr().err
    assert "a\\x1b[2J" in said
    harmless(printable(refused.value))
    harmless(said)


def test_a_metric_of_a_hostile_name_is_harmless_in_the_table_of_a_report() -> None:
    key = f"eval/{HOSTILE}/accuracy"
    steps = [{"step": step, key: 0.5, "eval/b/accuracy": 0.25} for step in range(3)]
    table = text_table(RunData("run", steps, {}, "", {}))
    assert "title" in table
    harmless(table)


ESCAPES = ("printable", "json.dumps")


def bare_prints(path: str, tree: ast.AST) -> list[str]:
    """Calls of print with anything but a constant or what one of ESCAPES has made."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        f"{path}:{call.lineno}: prints text as it came; print(printable(...))"
        for call in calls
        if ast.unparse(call.func) in ("print", "sys.stderr.write", "sys.stdout.write", "traceback.print_exc")
        for value in call.args
        if not isinstance(value, ast.Constant)
        and not (isinstance(value, ast.Call) and ast.unparse(value.func) in ESCAPES)
    ]


@READERS
def test_whatever_the_package_prints_is_printable() -> None:
    report([p for path, tree in modules("mcore_rl").items() for p in bare_prints(path, tree)])


def test_the_gate_sees_a_bare_print() -> None:
    assert len(bare_prints("x.py", ast.parse("print(f'{x}')\nprint(error, file=sys.stderr)"))) == 2
    assert bare_prints("x.py", ast.parse("print()\nprint('done')\nprint(printable(x))")) == []


def test_what_a_run_and_a_comparison_print_of_a_metric_is_the_beginning_of_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {f"eval/{name * 50_000}/accuracy": 0.5 for name in "ab"}
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        record = {"step": 1} | {key: value + number for key, value in keys.items()}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert compare([str(tmp_path / "one"), str(tmp_path / "two")]) == NumericsError.exit_code
    assert main(["report", str(tmp_path / "one")]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 400


@pytest.mark.parametrize("path", ["x" * 300, "k" * 5000], ids=len)
def test_a_name_that_no_file_system_takes_is_refused_by_every_command(path: str, tmp_path: Path) -> None:
    there = str(tmp_path / "new")
    for command in (
        ["report", path],
        ["verify", "golden", path],
        ["convert", "hf-to-mcore", path, there],
        ["convert", "hf-to-mcore", there, path],
        ["convert", "mcore-to-hf", path, there],
        ["convert", "mcore-to-hf", there, there, "--config", path],
    ):
        assert main(command) == 2, command
