"""The order of prompts: each once per epoch, no prompt twice in a batch, and the same after a resume."""

import hashlib
import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.data import prompts
from mcore_rl.data.cursor import PromptCursor, knows_content, share
from mcore_rl.data.prompts import PromptSet, open_prompts
from mcore_rl.data.reader import RowFormat
from mcore_rl.errors import DataError
from tests.any_json import examples


@pytest.fixture(scope="module")
def data_of(tokenizer, tmp_path_factory):
    """The set of some rows, in a file of their own; `prompts` makes them by number."""
    folder = tmp_path_factory.mktemp("cursor")
    written = dict[str, PromptSet]()

    def open_rows(*rows, **rules):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        key = repr((text, rules))
        if key not in written:
            path = folder / f"{len(written)}.jsonl"
            path.write_text(text)
            written[key] = open_prompts([path], tokenizer, max_prompt_tokens=8, **rules)
        return written[key]

    return open_rows


@pytest.fixture(scope="module")
def prompt_set(data_of):
    return lambda size: data_of(*rows_of(size))


def rows_of(size, prefix="p"):
    return [{"id": f"{prefix}{i}", "prompt": "1", "label": "1"} for i in range(size)]


def ids(prompts):
    return [prompt.id for prompt in prompts]


sizes_and_batches = st.integers(1, 12).flatmap(
    lambda size: st.tuples(st.just(size), st.lists(st.integers(0, size), min_size=1, max_size=12))
)


@given(sizes_and_batches, st.integers(0, 2**32 - 1))
def test_every_prompt_once_per_epoch_and_at_most_once_per_batch(prompt_set, size_and_batches, seed):
    size, batches = size_and_batches
    cursor = PromptCursor(prompt_set(size), seed)
    walked = []
    for count in batches:
        batch = ids(cursor.next(count))
        assert len(batch) == len(set(batch)) == count
        walked += batch
    for start in range(0, len(walked), size):
        epoch = Counter(walked[start : start + size])
        assert max(epoch.values()) == 1


@given(sizes_and_batches, st.data())
def test_a_resumed_cursor_continues_the_same_walk(prompt_set, size_and_batches, data):
    size, batches = size_and_batches
    at = data.draw(st.integers(0, len(batches)))
    whole, before = PromptCursor(prompt_set(size), 3), PromptCursor(prompt_set(size), 3)
    expected = [ids(whole.next(count)) for count in batches]
    for count in batches[:at]:
        before.next(count)
    after = PromptCursor(prompt_set(size), 3)
    after.restore(json.loads(json.dumps(before.state())))
    assert [ids(after.next(count)) for count in batches[at:]] == expected[at:]


def test_the_order_depends_on_the_seed_and_on_the_epoch_and_is_pinned(prompt_set):
    orders = [ids(PromptCursor(prompt_set(50), seed).next(50)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    cursor = PromptCursor(prompt_set(50), 0)
    assert ids(cursor.next(50)) != ids(cursor.next(50))
    assert cursor.epoch == 1
    assert ids(PromptCursor(prompt_set(6), 0).next(6)) == ["p3", "p2", "p1", "p0", "p4", "p5"]


def test_a_batch_larger_than_the_set_is_refused(prompt_set):
    with pytest.raises(DataError, match=r"7 prompts from a set of 6; lower rollout.prompts_per_step"):
        PromptCursor(prompt_set(6), 0).next(7)


def test_another_seed_is_refused(prompt_set):
    state = PromptCursor(prompt_set(6), 0).state()
    PromptCursor(prompt_set(6), 0).restore(state)
    with pytest.raises(DataError, match="saved with seed 0, this run has 1"):
        PromptCursor(prompt_set(6), 1).restore(state)


def changed(rows, at, **fields):
    """The rows with other fields in one of them."""
    return [row | fields if i == at else row for i, row in enumerate(rows)]


SIX = rows_of(6)
EDITED = "as many, 6, but others or with other values: the file was edited or replaced"
OTHERS = [
    (rows_of(6, "q"), EDITED),
    (SIX[:5], "it had 6, these are 5 others"),
    ([*SIX, *rows_of(2, "q")], "2 were appended to its 6"),
    ([*rows_of(2, "q"), *SIX], "it had 6, these are 8 others"),
    (SIX[::-1], "the same 6 in another order"),
    (changed(SIX, 5, prompt="2"), EDITED),
    (changed(SIX, 5, label="2"), EDITED),
    (changed(SIX, 5, level=2), EDITED),
]


@pytest.mark.parametrize(("other", "says"), OTHERS, ids=range(len(OTHERS)))
def test_prompts_that_are_not_those_of_the_state_are_refused_with_what_changed(data_of, other, says):
    state = json.loads(json.dumps(PromptCursor(data_of(*SIX), 0).state()))
    PromptCursor(data_of(*SIX), 0).restore(state)
    with pytest.raises(DataError, match=re.escape(f"not those of the saved run: {says}. Resume with")):
        PromptCursor(data_of(*other), 0).restore(state)


def test_the_same_rows_in_another_form_are_refused(data_of, tokenizer):
    state = json.loads(json.dumps(PromptCursor(data_of(*SIX), 0).state()))
    with pytest.raises(DataError, match=r"the same 6 in another form: the tokenizer, its chat template or a"):
        PromptCursor(data_of(*SIX, form=RowFormat(last_assistant="drop")), 0).restore(state)
    tokenizer.chat_template = "another"
    try:
        with pytest.raises(DataError, match="the same 6 in another form"):
            PromptCursor(data_of(*SIX, form=RowFormat()), 0).restore(state)
    finally:
        tokenizer.chat_template = None


@settings(max_examples=examples(30))
@given(
    st.lists(st.tuples(st.text("12", max_size=3), st.text(max_size=3), st.integers()), min_size=1, max_size=4)
)
def test_no_two_sets_of_rows_have_one_fingerprint(data_of, rows):
    """Fields that run into each other would: ("ab", "c") is not ("a", "bc")."""
    plain = [{"prompt": f"1{text}", "label": label, "x": x} for text, label, x in rows]
    moved = [
        row | {"prompt": row["prompt"] + row["label"][:1], "label": row["label"][1:]}
        if row["label"][:1] in ("1", "2")
        else row
        for row in plain
    ]
    (a, b, c) = (data_of(*its).fingerprint for its in (plain, moved, [*plain, plain[0]]))
    assert (a == b) == (plain == moved)
    assert c.content != a.content
    assert c.unordered != a.unordered


def test_a_state_of_an_earlier_version_is_compared_by_the_prompts_as_they_were_rendered(data_of):
    """Its digests are pinned: they were taken by the version that wrote such states."""
    old = {"seed": 0, "epoch": 0, "position": 2, "last": [], "data": EARLIER}
    cursor = PromptCursor(data_of(*SIX), 0)
    cursor.restore(json.loads(json.dumps(old)))
    whole = PromptCursor(data_of(*SIX), 0)
    assert ids(cursor.next(4)) == ids(whole.next(6))[2:]
    for other, says in (
        (changed(SIX, 0, label="2"), "the same 6 ids with other texts"),
        (SIX[:5], "these are 5"),
    ):
        with pytest.raises(DataError, match=says):
            PromptCursor(data_of(*other), 0).restore(old)


EARLIER = {
    "count": 6,
    "ids": "23c7873765e4cfd9",
    "content": "7dd72cac87660633",
    "unordered": "5a5abf2eaea50a21",
}


def test_a_state_of_the_first_version_is_compared_by_its_ids(data_of):
    """Its texts and labels it does not know, and whoever continues it says so."""
    state = PromptCursor(data_of(*SIX), 0).state()
    ids_alone = hashlib.sha256(b"p0\0p1\0p2\0p3\0p4\0p5").hexdigest()[:16]
    old = {key: value for key, value in state.items() if key != "data"} | {"fingerprint": ids_alone}
    assert knows_content(state)
    assert not knows_content(old)
    PromptCursor(data_of(*changed(SIX, 0, label="2")), 0).restore(old)
    with pytest.raises(DataError, match="it has other ids, or another order or number"):
        PromptCursor(data_of(*rows_of(5)), 0).restore(old)


def test_prompts_in_flight_are_found_again_by_a_resumed_cursor(prompt_set):
    """What was drawn and not forgotten comes back with the state, without reading the rest of the file."""
    cursor = PromptCursor(prompt_set(12), 0)
    drawn = cursor.next(5)
    cursor.keep({prompt.id for prompt in drawn[1:3]})
    after = PromptCursor(prompt_set(12), 0)
    after.restore(json.loads(json.dumps(cursor.state())))
    assert after.drawn == {prompt.id: prompt for prompt in drawn[1:3]}


def test_two_prompts_in_flight_with_one_id_are_refused(data_of, monkeypatch):
    """Beyond what is examined at the start, ids are compared with those in flight alone."""
    monkeypatch.setattr(prompts, "EXAMINED_CHARACTERS", 2)
    monkeypatch.setattr(prompts, "SPREAD", 0)
    data = data_of(
        *rows_of(3), {"id": "p2", "prompt": "2", "label": "1"}, {"id": "p2", "prompt": "3", "label": "1"}
    )
    assert data.examined.rows == 2
    with pytest.raises(DataError, match=r"jsonl:\d:id: 'p2' is already the id at .*jsonl:\d; ids are unique"):
        PromptCursor(data, 0).next(5)


def test_over_long_prompts_beyond_what_was_examined_are_passed_over_and_counted(data_of, monkeypatch):
    monkeypatch.setattr(prompts, "EXAMINED_CHARACTERS", 12)
    rows = rows_of(20)
    rows = [row | {"prompt": "1" * (9 if i in (2, 11, 15) else 1)} for i, row in enumerate(rows)]
    data = data_of(*rows)
    assert (data.examined.rows, data.too_long, len(data)) == (4, ("p2",), 19)
    whole, parted = PromptCursor(data, 0), PromptCursor(data, 0)
    first, second = ids(whole.next(17)), ids(whole.next(17))
    assert sorted(first) == sorted(second) == sorted(row["id"] for row in rows if len(row["prompt"]) == 1)
    assert whole.passed_over == 3, "both of an epoch, and one of the next before its 17 are found"
    walked = ids(parted.next(5))
    after = PromptCursor(data, 0)
    after.restore(json.loads(json.dumps(parted.state())))
    assert walked + ids(after.next(12)) == first
    assert after.passed_over == 2
    with pytest.raises(DataError, match="fewer usable prompts than a batch takes"):
        PromptCursor(data, 0).next(18)


def test_a_set_of_which_every_prompt_turns_out_to_be_over_long_is_refused(data_of, monkeypatch):
    monkeypatch.setattr(prompts, "EXAMINED_CHARACTERS", 1)
    data = data_of(rows_of(1)[0], *({"id": f"l{i}", "prompt": "1" * 9, "label": "1"} for i in range(5)))
    cursor = PromptCursor(data, 0)
    assert ids(cursor.next(1)) == ids(cursor.next(1)) == ["p0"]
    with pytest.raises(DataError, match="fewer usable prompts than a batch takes"):
        cursor.next(2)


def test_the_first_prompts_are_those_that_are_not_over_long_and_have_ids_of_their_own(data_of, monkeypatch):
    monkeypatch.setattr(prompts, "EXAMINED_CHARACTERS", 2)
    rows = [row | {"prompt": "1" * (9 if i == 3 else 1)} for i, row in enumerate(rows_of(6))]
    data = data_of(*rows, rows[4])
    assert (data.examined.rows, ids(data.first(4)), ids(data.first(0))) == (2, ["p0", "p1", "p2", "p4"], [])
    assert ids(data_of(*rows).first(99)) == ["p0", "p1", "p2", "p4", "p5"]
    with pytest.raises(DataError, match=r"jsonl:7:id: 'p4' is already the id at .*jsonl:5; ids are unique"):
        data.first(99)


@given(st.lists(st.integers()), st.integers(1, 9))
def test_shares_cover_all_once_in_order_and_evenly(items, size):
    parts = [share(items, rank, size) for rank in range(size)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
