"""A malformed row ends a run; once it is mended, and nothing else is changed, the run goes on."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcore_rl.data import prompts
from mcore_rl.data.cursor import PromptCursor
from mcore_rl.data.prompts import PromptSet, open_prompts
from mcore_rl.errors import ChangedFileError, DataError, MalformedRowError
from mcore_rl.training.bad_rows import noting_bad_rows, read_bad_rows

ROWS = 60


@pytest.fixture(params=["jsonl", "parquet"])
def opened(request, tmp_path, tokenizer, monkeypatch):
    """The file of rows with other values in some of them, of which nothing is examined."""
    monkeypatch.setattr(prompts, "EXAMINED_CHARACTERS", 0)
    monkeypatch.setattr(prompts, "SPREAD", 0)

    versions = count()

    def of(**changed) -> PromptSet:
        rows = [{"id": str(n), "prompt": "1", "label": "1"} for n in range(ROWS)]
        for number, label in changed.items():
            rows[int(number[1:])] |= {"prompt": label}
        path = tmp_path / str(next(versions)) / f"p.{request.param}"  # what is open must not change
        path.parent.mkdir()
        if request.param == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return open_prompts([path], tokenizer, max_prompt_tokens=8)

    return of


def drawn_to_the_end(cursor: PromptCursor, data: PromptSet, run_dir: Path) -> tuple[list[dict], str]:
    """The cursor's states before every step until a row ends the run, and what is said of it."""
    states: list[dict] = []

    def draw() -> None:
        with noting_bad_rows(run_dir, data, is_main=True):
            while True:
                states.append(json.loads(json.dumps(cursor.state())))
                cursor.next(4)

    with pytest.raises(MalformedRowError) as caught:
        draw()
    return states, str(caught.value)


def ids(cursor: PromptCursor, count: int) -> list[str]:
    return [prompt.id for prompt in cursor.next(count)]


def resumed(data: PromptSet, state: dict, run_dir: Path) -> PromptCursor:
    cursor = PromptCursor(data, 0, mended=read_bad_rows(run_dir))
    cursor.restore(state)
    return cursor


def test_a_run_goes_on_once_its_row_is_mended(opened, tmp_path):
    data = opened(n7="z")
    (*_, state), said = drawn_to_the_end(PromptCursor(data, 0), data, tmp_path)
    assert ":8:prompt: the tokenizer refuses it" in said
    cursor = resumed(opened(), state, tmp_path)
    assert cursor.mended == (7,)
    whole = PromptCursor(opened(), 0)
    while whole.place["position"] < state["position"]:
        whole.next(4)
    assert ids(cursor, 8) == ids(whole, 8)
    again = resumed(opened(), cursor.state(), tmp_path)
    assert again.mended == (), "the new state knows the mended file"


def test_what_else_was_changed_is_still_refused(opened, tmp_path):
    data = opened(n7="z")
    (*_, state), _ = drawn_to_the_end(PromptCursor(data, 0), data, tmp_path)
    for changed in ({"n8": "2"}, {"n7": "2", "n59": "2"}, {"n7": "2", "n0": "2"}):
        with pytest.raises(DataError, match="not those of the saved run: as many"):
            resumed(opened(**changed), state, tmp_path)
    (tmp_path / "bad_rows.json").write_text('{"rows": [7]')
    with pytest.raises(DataError, match="not those of the saved run"):
        resumed(opened(), state, tmp_path)


def test_several_rows_may_be_bad_one_after_another(opened, tmp_path):
    """The run goes on from its checkpoints before and between them."""
    left = {"n7": "z", "n20": "z", "n33": "z"}
    states = [PromptCursor(opened(**left), 0).state()]
    while left:
        data = opened(**left)
        more, said = drawn_to_the_end(resumed(data, states[-1], tmp_path), data, tmp_path)
        states += more
        left.pop(f"n{int(said.split(':')[1]) - 1}")
    for state in states:
        assert len(resumed(opened(), state, tmp_path).next(4)) == 4
    with pytest.raises(DataError, match="not those of the saved run"):
        resumed(opened(n8="2"), states[0], tmp_path)


def test_a_file_that_was_written_into_is_no_malformed_row(tmp_path, tokenizer, monkeypatch):
    """Whatever else was changed in it would count as known."""
    monkeypatch.setattr(prompts, "EXAMINED_CHARACTERS", 0)
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "1", "label": ""}\n' * 600)
    data = open_prompts([path], tokenizer, max_prompt_tokens=8)
    path.write_text('{"prompt": "z", "label": ""}\n' * 601)
    with pytest.raises(ChangedFileError), noting_bad_rows(tmp_path, data, is_main=True):
        PromptCursor(data, 0).next(1)
    assert read_bad_rows(tmp_path) is None
