"""What is found at the start in rows beyond the beginning that is examined whole."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcore_rl.data import prompts
from mcore_rl.data.cursor import PromptCursor
from mcore_rl.data.opening import open_table
from mcore_rl.data.prompts import open_prompts
from mcore_rl.data.reader import RowFormat
from mcore_rl.errors import DataError
from mcore_rl.training.data import passed_over
from tests.data.test_formats import saved

ROWS, BAD = 2000, 1499
FORM = RowFormat(label_key="answer.value", id_key="name")


def good(number: int) -> dict:
    return {"name": str(number), "prompt": "1", "answer": {"value": "\u00e9"}}


def line(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


@pytest.fixture
def opened(tmp_path, tokenizer, monkeypatch):
    """Opens a file of ROWS lines, of which the first few are examined whole."""
    monkeypatch.setattr(prompts, "EXAMINED_CHARACTERS", 5)
    monkeypatch.setattr(prompts, "SPREAD", 0)

    def of(bad=None, name="p.jsonl", form=FORM):
        lines = [line(good(number)) for number in range(ROWS)]
        if bad is not None:
            lines[BAD] = bad
        text = b"\r\n".join(lines)
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        return open_prompts([tmp_path / name], tokenizer, form, max_prompt_tokens=4)

    return of


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (line(good(BAD))[:-2], "not JSON"),
        (b"1" + line(good(BAD)), "not JSON"),
        (b"[1]", "a JSON list"),
        (line(good(BAD)).replace(b"\xc3\xa9", b"\xe9"), "is not UTF-8"),
        (line(good(BAD)).replace(b"1", b"\0"), "not JSON"),
        (line(good(BAD)).replace(b"prompt", b"promt"), "prompt: missing"),
        (line(good(BAD)).replace(b"answer", b"anser"), "answer.value: missing"),
        (line(good(BAD)).replace(b"name", b"id"), "name: missing"),
    ],
)
@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_a_line_that_looks_wrong_is_found_at_the_start_wherever_it_is(opened, bad, message, name):
    with pytest.raises(DataError, match=rf"p.jsonl(.gz)?:{BAD + 1}:.*{message}"):
        opened(bad, name)


def test_nothing_looks_wrong_in_a_file_that_is_sound(opened, tmp_path):
    """And a line that only looks wrong is read, and passes."""
    data = opened()
    assert data.examined.rows == 5
    table = open_table(tmp_path / "p.jsonl")
    assert len(table.suspects(range(ROWS), ("prompt", "name", "answer.value"))) == 0
    odd = line(good(BAD)).replace(b'"prompt"', b'"\\u0070rompt"')
    opened(b"\t" + odd)
    assert open_table(tmp_path / "p.jsonl").suspects(range(9, ROWS), ("prompt",)).tolist() == [BAD]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
@pytest.mark.parametrize("bad", [{"prompt": None}, {"answer": {"value": None}}, {"answer": None}])
def test_a_null_in_arrow_is_found_at_the_start_wherever_it_is(opened, tmp_path, tokenizer, kind, bad):
    rows = [good(number) for number in range(ROWS)]
    rows[BAD] |= bad
    (key,) = bad
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    else:
        saved(tmp_path / "p.saved", rows[:700], rows[700:])
    path = tmp_path / f"p.{kind}"
    with pytest.raises(DataError, match=rf"p.{kind}:{BAD + 1}:{key}.*: missing"):
        open_prompts([path], tokenizer, FORM, max_prompt_tokens=4)
    assert open_table(path).suspects(range(3, ROWS), FORM.required_keys).tolist() == [BAD]
    assert open_table(path).suspects(range(3, 5), ("absent", "name.first")).tolist() == [3, 4]


def test_rows_spread_over_the_file_are_read_at_the_start(opened, monkeypatch, tmp_path, tokenizer):
    """A mistake that shows only when a row is read is met by one of them, or when the row is drawn."""
    wrong = line(good(BAD) | {"prompt": 5})
    cursor = PromptCursor(opened(wrong), 0)
    with pytest.raises(DataError, match=rf"p.jsonl:{BAD + 1}:prompt: a number"):
        cursor.next(ROWS)
    monkeypatch.setattr(prompts, "SPREAD", ROWS)
    with pytest.raises(DataError, match=rf"p.jsonl:{BAD + 1}:prompt: a number"):
        opened(wrong)
    again = line(good(3) | {"x": 1})
    with pytest.raises(DataError, match=rf"p.jsonl:{BAD + 1}:name: '3' is already the id at .*:4"):
        opened(again)


def test_rows_are_spread_evenly():
    assert prompts._spread(np.arange(10, 110), 4) == [10, 35, 60, 85]
    assert prompts._spread(np.arange(3), 4) == [0, 1, 2]
    assert prompts._spread(np.arange(0), 4) == []


def test_what_is_passed_over_after_the_start_is_a_metric(opened):
    long = line(good(BAD) | {"prompt": "1" * 9})
    cursor = PromptCursor(opened(long), 0)
    assert passed_over(cursor) == {}
    cursor.next(ROWS - 1)
    cursor.next(1)
    assert passed_over(cursor) == {"data/train/passed_over": float(cursor.passed_over)}
    assert passed_over(SimpleNamespace(passed_over=7)) == {"data/train/passed_over": 7.0}
