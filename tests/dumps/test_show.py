"""What people see of a dump: every token with its numbers, and nothing of others' text that acts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mcore_rl.__main__ import main
from mcore_rl.dumps.directory import groups_file
from mcore_rl.dumps.rollouts import Words, dump_bytes
from mcore_rl.dumps.tokens import token_rows
from mcore_rl.dumps.trained import TrainedTokens
from mcore_rl.report import write_report
from mcore_rl.types import Prompt, Sample, Segment, VersionSpan
from tests.dumps.support import CURSOR, HOSTILE, step_of_run, write

PROMPT = Prompt("a", "", (5, 6), "")
SAMPLE = Sample(
    *("a@1/0", PROMPT),
    (
        Segment(
            PROMPT.token_array,
            np.array([7, 8, 9], np.int32),
            np.array([-0.5, -1.0], np.float32),
            (VersionSpan("3", 0, 1), VersionSpan("4", 1, 2)),
            np.array([True, False, True]),
        ),
        Segment((1,), np.array([2], np.int32), np.array([-2.0], np.float32), (VersionSpan("4", 0, 1),)),
    ),
    *("", "stop", 1.0),
)


def test_every_token_has_its_own_numbers() -> None:
    old, now = np.array([-1, -2, -3], np.float32), np.array([-0.5, -2, np.nan], np.float32)
    trained = TrainedTokens(old, now, np.array([0.1, 0.2, 0.3], np.float32))
    rows = token_rows(SAMPLE, {9: "nine"}, trained)
    assert [(row.segment, row.role, row.id) for row in rows] == [
        *((0, "context", 5), (0, "context", 6), (0, "sampled", 7), (0, "observed", 8), (0, "sampled", 9)),
        *((1, "context", 1), (1, "sampled", 2)),
    ]
    sampled = [row for row in rows if row.role == "sampled"]
    assert [(row.version, row.log_prob, row.old_log_prob) for row in sampled] == [
        *(("3", -0.5, -1.0), ("4", -1.0, -2.0), ("4", -2.0, -3.0)),
    ]
    assert [row.ratio for row in sampled] == [pytest.approx(np.exp(0.5)), 1.0, None]
    assert [row.advantage for row in sampled] == pytest.approx([0.1, 0.2, 0.3])
    assert rows[4].text == "nine"
    of_another = TrainedTokens(old[:2], now[:2], now[:2])
    assert token_rows(SAMPLE, {}, of_another) == token_rows(SAMPLE, {})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose prompts, labels, responses and tokens all want to act."""
    groups = step_of_run()
    directory = write(tmp_path, 4, groups)
    words = Words(lambda ids: HOSTILE, lambda id: f"{HOSTILE}{id}")
    content = dump_bytes(4, groups, temperature=0.5, cursor=CURSOR, words=words)
    groups_file(directory, 4).write_bytes(content)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 4, "reward/mean": 0.5}) + "\n")
    return tmp_path


def assert_harmless(text: str) -> None:
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)


def test_the_terminal_shows_dumps_samples_and_tokens(run_dir: Path, capsys) -> None:
    assert main(["samples", str(run_dir)]) == 0
    assert re.fullmatch(
        r"step 4: 11 samples, \d+ tokens, mean reward [\d.]+  trained\n", capsys.readouterr().out
    )
    assert main(["samples", str(run_dir / "rollouts"), "4", "--limit", "10"]) == 0
    listed = capsys.readouterr().out
    assert "p4@4/0  void" in listed
    assert "and 1 more" in listed
    assert len(listed.splitlines()) == 11
    assert main(["samples", str(run_dir), "--sample", "a@4/0"]) == 0
    one = capsys.readouterr().out
    assert len([line for line in one.splitlines() if "sampled" in line]) == 5
    assert "1.284" in one
    for text in (listed, one):
        assert_harmless(text)
    assert "\\x1b[2J" in one


def test_the_page_shows_the_tokens_and_runs_nothing_of_them(run_dir: Path) -> None:
    page = write_report([run_dir]).read_text()
    assert "Token by token" in page
    assert "p4@4/0" in page, "the void one"
    assert page.count('class="tok observed"') > 0
    assert "&lt;script&gt;alert(1)" in page
    assert len(re.findall(r"<script", page)) == 1, "its own"
    assert_harmless(page[page.index("<h2>Token by token") :])
    before = page.count('class="tok ')
    one = write_report([run_dir], samples=["a@4/0"]).read_text()
    assert one.count('class="tok ') == 7 < before
    assert "<td>1.284</td>" in one


def test_what_is_not_there_is_said(run_dir: Path, tmp_path: Path, capsys) -> None:
    wrong = {
        ("samples", str(run_dir), "5"): "no dump of step 5; there are those of ['4']",
        ("samples", str(run_dir), "--sample", "\x1b[2J"): "no sample '\\x1b[2J'",
        ("samples", str(run_dir / "none")): "no dumps of rollouts",
        ("report", str(run_dir), "--sample", "x"): "no sample 'x'",
        ("report", str(run_dir), str(tmp_path), "--sample", "x"): "samples of one run",
    }
    for command, why in wrong.items():
        assert main(list(command)) == 2
        said = capsys.readouterr().err
        assert why.replace("'4'", "4") in said or why in said
        assert_harmless(said)


def test_a_damaged_dump_is_said_on_the_page_and_stops_the_command(run_dir: Path, capsys) -> None:
    path = groups_file(run_dir / "rollouts", 4)
    path.write_bytes(path.read_bytes()[:100])
    assert "or damaged" in write_report([run_dir]).read_text()
    assert main(["samples", str(run_dir)]) == 2
    assert f"{path}: " in capsys.readouterr().err
