"""The order of prompts: each once per epoch, no prompt twice in a batch, and the same after a resume."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcore_rl.data.cursor import PromptCursor, share
from mcore_rl.data.prompts import PromptSet
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


@pytest.mark.parametrize("other", [(prompt_set(6, "q"), 0), (prompt_set(5), 0), (prompt_set(6), 1)])
def test_a_state_of_other_data_or_another_seed_is_refused(other):
    state = PromptCursor(prompt_set(6), 0).state()
    PromptCursor(prompt_set(6), 0).restore(state)
    with pytest.raises(DataError, match="the prompt cursor was saved with"):
        PromptCursor(*other).restore(state)


@given(st.lists(st.integers()), st.integers(1, 9))
def test_shares_cover_all_once_in_order_and_evenly(items, size):
    parts = [share(items, rank, size) for rank in range(size)]
    assert [item for part in parts for item in part] == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
