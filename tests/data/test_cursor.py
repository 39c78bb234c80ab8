"""The order of prompts: each once per epoch, no prompt twice in a batch, and the same after a resume."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.data.cursor import PromptCursor, knows_content, share
from mcore_rl.data.prompts import PromptSet, fingerprint
from mcore_rl.errors import DataError
from mcore_rl.types import Prompt


def prompt_set(size, prefix="p"):
    return PromptSet(tuple(Prompt(f"{prefix}{i}", "1", (1,), "1") for i in range(size)), ())


def ids(prompts):
    return [prompt.id for prompt in prompts]


sizes_and_batches = st.integers(1, 12).flatmap(
    lambda size: st.tuples(st.just(size), st.lists(st.integers(0, size), min_size=1, max_size=12))
)


@given(sizes_and_batches, st.integers(0, 2**32 - 1))
def test_every_prompt_once_per_epoch_and_at_most_once_per_batch(size_and_batches, seed):
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
def test_a_resumed_cursor_continues_the_same_walk(size_and_batches, data):
    size, batches = size_and_batches
    at = data.draw(st.integers(0, len(batches)))
    whole, before = PromptCursor(prompt_set(size), 3), PromptCursor(prompt_set(size), 3)
    expected = [ids(whole.next(count)) for count in batches]
    for count in batches[:at]:
        before.next(count)
    after = PromptCursor(prompt_set(size), 3)
    after.restore(json.loads(json.dumps(before.state())))
    assert [ids(after.next(count)) for count in batches[at:]] == expected[at:]


def test_the_order_depends_on_the_seed_and_on_the_epoch_and_is_pinned():
    orders = [ids(PromptCursor(prompt_set(50), seed).next(50)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    cursor = PromptCursor(prompt_set(50), 0)
    assert ids(cursor.next(50)) != ids(cursor.next(50))
    assert cursor.epoch == 1
    assert ids(PromptCursor(prompt_set(6), 0).next(6)) == ["p3", "p2", "p1", "p0", "p4", "p5"]


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(DataError, match=r"7 prompts from a set of 6; lower rollout.prompts_per_step"):
        PromptCursor(prompt_set(6), 0).next(7)


def test_another_seed_is_refused():
    state = PromptCursor(prompt_set(6), 0).state()
    PromptCursor(prompt_set(6), 0).restore(state)
    with pytest.raises(DataError, match="saved with seed 0, this run has 1"):
        PromptCursor(prompt_set(6), 1).restore(state)


def changed(prompts, at, **fields):
    """The set with other fields in one of its prompts."""
    return [replace(prompt, **fields) if i == at else prompt for i, prompt in enumerate(prompts)]


SIX = list(prompt_set(6).prompts)
EDITED = "the same 6 ids with other texts, tokens, labels or metadata: the file was edited"


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (list(prompt_set(6, "q").prompts), "it had 6, these are 6 others"),
        (SIX[:5], "it had 6, these are 5 others"),
        ([*SIX, *prompt_set(2, "q").prompts], "2 were appended to its 6"),
        ([*prompt_set(2, "q").prompts, *SIX], "it had 6, these are 8 others"),
        (SIX[::-1], "the same 6 in another order"),
        (changed(SIX, 5, text="2"), EDITED),
        (changed(SIX, 5, token_ids=(2,)), EDITED),
        (changed(SIX, 5, label="2"), EDITED),
        (changed(SIX, 5, metadata={"level": 2}), EDITED),
    ],
)
def test_prompts_that_are_not_those_of_the_state_are_refused_with_what_changed(other, says):
    state = json.loads(json.dumps(PromptCursor(PromptSet(tuple(SIX), ()), 0).state()))
    PromptCursor(PromptSet(tuple(SIX), ()), 0).restore(state)
    with pytest.raises(DataError, match=re.escape(f"not those of the saved run: {says}. Resume with")):
        PromptCursor(PromptSet(tuple(other), ()), 0).restore(state)


@given(st.lists(st.tuples(st.text(), st.text(), st.lists(st.integers(0, 2**31))), min_size=1, max_size=4))
def test_no_two_sets_of_prompts_have_one_fingerprint(rows):
    """Fields that run into each other would: ("ab", "c") is not ("a", "bc")."""
    prompts = [Prompt(str(i), text, tuple(ids), label) for i, (text, label, ids) in enumerate(rows)]
    moved = [replace(p, text=p.text + p.label[:1], label=p.label[1:]) for p in prompts]
    assert (fingerprint(moved) == fingerprint(prompts)) == (moved == prompts)
    assert fingerprint([replace(p, metadata={"a": {"b": 1}}) for p in prompts]) != fingerprint(prompts)


def test_an_id_that_is_no_text_can_be_saved():
    """JSON allows half of a surrogate pair."""
    cursor = PromptCursor(PromptSet((Prompt("\ud800", "\ud800", (1,), "1"),), ()), 0)
    cursor.restore(json.loads(json.dumps(cursor.state())))


def test_a_state_of_an_earlier_version_is_compared_by_its_ids():
    """Its texts and labels it does not know, and whoever continues it says so."""
    state = PromptCursor(prompt_set(6), 0).state()
    ids_alone = hashlib.sha256(b"p0\0p1\0p2\0p3\0p4\0p5").hexdigest()[:16]
    old = {key: value for key, value in state.items() if key != "data"} | {"fingerprint": ids_alone}
    assert knows_content(state)
    assert not knows_content(old)
    PromptCursor(PromptSet(tuple(changed(SIX, 0, label="2")), ()), 0).restore(old)
    with pytest.raises(DataError, match="it has other ids, or another order or number"):
        PromptCursor(prompt_set(5), 0).restore(old)


@given(st.lists(st.integers()), st.integers(1, 9))
def test_shares_cover_all_once_in_order_and_evenly(items, size):
    parts = [share(items, rank, size) for rank in range(size)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
