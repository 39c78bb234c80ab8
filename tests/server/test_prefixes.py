"""Prefixes of sessions: a turn computes what is new in it, never with other weights, in bounded memory."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedModel

from mcore_rl.server.engine import Engine
from mcore_rl.server.kv_cache import build_cache
from mcore_rl.server.prefixes import PrefixCache
from mcore_rl.server.sequence import Limits, Sequence, Wanted
from tests.rollout.support import CONTEXT, VOCAB, largest_error, log_probs_of

TOLERANCE = 2e-5
TURNS = 6


def build_engine(model: PreTrainedModel, kv_tokens: int = 8192) -> Engine:
    return Engine(model, build_cache(model, kv_tokens), max_running=64)


def turn(session: str, prompt: list[int], tokens: int = 9, **more: object) -> Sequence:
    limits = Limits(tokens, 0, 1.0, 1.0, 0.0, 0, frozenset())
    return Sequence(session, session, prompt, limits, random.randrange(1 << 30), session=session, **more)  # type: ignore[arg-type]


def run(engine: Engine, *sequences: Sequence) -> int:
    """Runs them to their ends; how many tokens were prefilled."""
    before = engine.prefilled
    engine.submit(list(sequences))
    while engine.running or engine.waiting:
        engine.step()
    return engine.prefilled - before


def drawn(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(count)]


@pytest.mark.parametrize("session", ["a", ""])
def test_a_turn_of_a_dialogue_prefills_what_is_new_in_it(model_a: PreTrainedModel, session: str) -> None:
    """A response's last token was sampled and not fed; a prompt's last is fed by the decode step."""
    engine, rng, ids = build_engine(model_a), random.Random(0), []
    for k in range(TURNS):
        new = drawn(rng, 5 + k)
        ids += new
        one = turn(session, [*ids])
        count = run(engine, one)
        assert count == (len(new) - (k == 0) if session else len(ids) - 1)
        assert one.num_cached == len(ids) - 1 - count
        assert largest_error(one.log_probs, log_probs_of(model_a, ids, one.output_ids)) < TOLERANCE
        ids += one.output_ids
    kept = len(ids) - 1 if session else 0
    assert (engine.prefixes.used, len(engine.prefixes)) == (kept, int(bool(session)))


def test_sessions_of_all_lengths_go_on_side_by_side_to_the_end_of_their_rows(
    model_a: PreTrainedModel,
) -> None:
    engine, rng = build_engine(model_a, 16 * CONTEXT), random.Random(1)
    ids = {str(k): drawn(rng, 1 + 17 * k) for k in range(12)}
    for _ in range(4):
        turns = {name: turn(name, [*have], rng.randint(1, 12)) for name, have in ids.items()}
        run(engine, *turns.values(), turn("", drawn(rng, 30)))
        for name, one in turns.items():
            want = log_probs_of(model_a, one.prompt, one.output_ids)
            assert largest_error(one.log_probs, want) < TOLERANCE
            ids[name] += [*one.output_ids, *drawn(rng, rng.randint(0, 40))]
    full = [turn(name, have, CONTEXT - len(have)) for name, have in ids.items() if len(have) < CONTEXT]
    assert run(engine, *full) < sum(len(one.prompt) for one in full) / 3
    for one in full:
        want = log_probs_of(model_a, one.prompt, one.output_ids)
        assert len(one.prompt) + len(one.output_ids) == CONTEXT
        assert largest_error(one.log_probs, want) < TOLERANCE


def test_branches_retries_and_scored_prompts_are_what_they_would_be_alone(model_a: PreTrainedModel) -> None:
    engine, rng = build_engine(model_a), random.Random(2)
    base = drawn(rng, 20)
    first = turn("a", base)
    run(engine, first)
    again = turn("a", base)
    assert run(engine, again) == 0
    assert again.num_cached == len(base) - 1
    left, right = [*base, *first.output_ids, *drawn(rng, 4)], [*base, *drawn(rng, 7)]
    one, other = turn("a", left), turn("a", right)
    assert run(engine, one, other) == (1 + 4 - 1) + (7 - 1)
    assert run(engine, turn("b", left)) == len(left) - 1, "another session's is never used"
    scored = turn("a", left, wanted=Wanted(True, 0))
    assert run(engine, scored) == len(left) - 1
    assert largest_error(scored.prompt_log_probs, log_probs_of(model_a, left[:1], left[1:])) < TOLERANCE
    for each in (again, one, other, scored):
        assert largest_error(each.log_probs, log_probs_of(model_a, each.prompt, each.output_ids)) < TOLERANCE


def test_new_weights_leave_nothing_of_the_old_ones(
    model_a: PreTrainedModel, model_b: PreTrainedModel
) -> None:
    """Also where they come while a response is sampled, in place: of it nothing is kept."""
    engine = build_engine(model_a)
    old = {name: value.clone() for name, value in model_a.state_dict().items()}
    ids = drawn(random.Random(3), 40)
    run(engine, turn("a", ids))
    assert engine.prefixes.used
    running = turn("b", ids)
    engine.submit([running])
    engine.step()
    engine.pause("in_place")
    try:
        model_a.load_state_dict(model_b.state_dict())
        engine.set_version("2")
        assert engine.prefixes.used == 0
        engine.resume()
        run(engine)
        assert engine.prefixes.used == 0, "its keys and values are of both"
        for name in "ab":
            one = turn(name, ids)
            assert run(engine, one) == len(ids) - 1
            assert largest_error(one.log_probs, log_probs_of(model_b, ids, one.output_ids)) < TOLERANCE
    finally:
        model_a.load_state_dict(old)


def test_what_is_kept_is_bounded_and_the_oldest_goes_first(model_a: PreTrainedModel) -> None:
    engine, rng = build_engine(model_a, 256), random.Random(4)
    for k in range(40):
        run(engine, turn(str(k), drawn(rng, rng.randint(1, 60)), 5))
        assert engine.prefixes.used <= 256
    assert 2 < len(engine.prefixes) < 40
    cache = PrefixCache(10)
    for name in "abc":
        cache.keep(name, [1, 2, 3], [])
    assert cache.find("a", [1, 2, 4])[1] == 2
    cache.keep("d", [1, 2, 3], [])
    assert [cache.find(name, [1, 2, 3])[1] for name in "abcd"] == [3, 0, 3, 3]
    cache.keep("e", list(range(11)), [])
    cache.keep("a", [1, 2, 3, 4], [])
    assert (cache.used, cache.find("a", [1, 2, 3])[1]) == (10, 3)
    cache.clear()
    assert (cache.used, len(cache)) == (0, 0)
