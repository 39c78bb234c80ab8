"""The engine in-process: log-probs, seeds, cache rows, stops and pauses against transformers itself."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from mcore_rl.errors import NumericsError
from mcore_rl.server.engine import Engine
from mcore_rl.server.kv_cache import build_cache
from mcore_rl.server.sequence import Limits, Sequence, Wanted, copy_seed
from tests.rollout.support import VOCAB, largest_error, log_probs_of, log_probs_on_old_cache

TOLERANCE = 2e-5
PLAIN = Wanted()
FREE = Limits(12, 0, 1.0, 1.0, 0.0, 0, frozenset())


def build_engine(model: PreTrainedModel, *, kv_tokens: int = 8192, max_running: int = 64) -> Engine:
    return Engine(model, build_cache(model, kv_tokens), max_running=max_running)


@pytest.fixture
def engine(model_a: PreTrainedModel) -> Engine:
    return build_engine(model_a)


def request(
    name: str, prompt: list[int], limits: Limits = FREE, *, seed: int = 0, wanted: Wanted = PLAIN
) -> Sequence:
    return Sequence(name, name, prompt, limits, seed, wanted)


def limits(**changes: object) -> Limits:
    return Limits(**(vars(FREE) | changes))  # type: ignore[arg-type]


def run(engine: Engine, *sequences: Sequence, after_step: Callable[[int], None] = lambda _: None) -> None:
    engine.submit(list(sequences))
    for step in range(2000):
        if not (engine.running or engine.waiting):
            return
        engine.step()
        after_step(step)
    raise AssertionError("the engine does not end")


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Lengths 1 to 40, some equal to each other."""
    rng = random.Random(seed)
    drawn = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 40))] for _ in range(count)]
    return [drawn[i // 3 * 3] if i % 3 == 1 else prompt for i, prompt in enumerate(drawn)]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_log_probs_are_those_of_transformers(
    engine: Engine, model_a: PreTrainedModel, model_b: PreTrainedModel, temperature: float
) -> None:
    batch = [
        request(
            str(i), p, limits(max_new_tokens=4 + i, temperature=temperature), seed=i, wanted=Wanted(True, 0)
        )
        for i, p in enumerate(prompts(12))
    ]
    run(engine, *batch)
    for s in batch:
        want = log_probs_of(model_a, s.prompt, s.output_ids, temperature or 1.0)
        assert len(s.output_ids) == s.limits.max_new_tokens
        assert largest_error(s.log_probs, want) < TOLERANCE
        assert largest_error(s.log_probs, log_probs_of(model_b, s.prompt, s.output_ids)) > 1e-2
        if len(s.prompt) > 1:
            assert (
                largest_error(s.prompt_log_probs, log_probs_of(model_a, s.prompt[:1], s.prompt[1:]))
                < TOLERANCE
            )


def test_greedy_rows_take_the_most_likely_token(engine: Engine, model_a: PreTrainedModel) -> None:
    sequence = request("a", [5, 6, 7], limits(temperature=0.0))
    run(engine, sequence)
    scores = model_a(torch.tensor([sequence.tokens])).logits[0, 2:-1]
    assert sequence.output_ids == scores.argmax(-1).tolist()


def test_seeded_tokens_do_not_depend_on_the_batch(model_a: PreTrainedModel) -> None:
    def make(seed_offset: int = 0) -> list[Sequence]:
        odd = limits(top_p=0.8, temperature=0.7)
        return [
            request(str(i), p, odd if i % 2 else FREE, seed=i + seed_offset)
            for i, p in enumerate(prompts(24))
        ]

    together, alone, other = make(), make(), make(seed_offset=1000)
    run(build_engine(model_a), *together)
    run(build_engine(model_a), *other)
    few = build_engine(model_a, max_running=5)
    run(few, *reversed(alone))
    assert [s.output_ids for s in together] == [s.output_ids for s in alone]
    assert all(a.output_ids != b.output_ids for a, b in zip(together, other, strict=True))


def test_copies_of_a_prompt_share_its_prefill_and_differ_in_their_draws(
    engine: Engine, model_a: PreTrainedModel
) -> None:
    prompt = prompts(1)[0] + [1, 2, 3]
    copies = [request(str(k), prompt, seed=copy_seed(7, k)) for k in range(8)]
    run(engine, *copies)
    assert [s.num_cached for s in copies] == [0] + [len(prompt) - 1] * 7
    assert len({tuple(s.output_ids) for s in copies}) == 8
    for s in copies:
        assert largest_error(s.log_probs, log_probs_of(model_a, prompt, s.output_ids)) < TOLERANCE


def test_rows_survive_admission_departure_and_growth(model_a: PreTrainedModel) -> None:
    """Few rows, many lengths: the cache is reshaped and its rows move while others decode."""
    engine = build_engine(model_a, kv_tokens=640, max_running=6)
    shapes = set()
    batch = [
        request(str(i), p, limits(max_new_tokens=1 + 17 * i % 90), seed=i)
        for i, p in enumerate(prompts(40, seed=3))
    ]
    batch.sort(key=lambda s: s.reserved)
    run(engine, *batch, after_step=lambda _: shapes.add((engine.cache.length, len(engine.running))))
    assert len({length for length, _ in shapes}) > 2, "the cache was never reshaped: the test shows nothing"
    for s in batch:
        assert largest_error(s.log_probs, log_probs_of(model_a, s.prompt, s.output_ids)) < TOLERANCE


def test_stop_tokens_end_a_sequence_and_are_part_of_it(engine: Engine) -> None:
    free = request("free", [1, 2, 3], limits(max_new_tokens=20), seed=5)
    run(engine, free)
    stop = free.output_ids[6]
    first = free.output_ids.index(stop)
    stopped = request("stop", [1, 2, 3], limits(max_new_tokens=20, stop_ids=frozenset({stop, 0})), seed=5)
    late = request(
        "late", [1, 2, 3], limits(max_new_tokens=20, min_new_tokens=20, stop_ids=frozenset({stop})), seed=5
    )
    run(engine, stopped, late)
    assert stopped.output_ids == free.output_ids[: first + 1]
    assert stopped.finish_reason == {"type": "stop", "matched": stop}
    assert free.finish_reason == late.finish_reason == {"type": "length", "length": 20}
    assert stop not in late.output_ids[:19]


def test_truncated_sampling_stays_in_its_support(engine: Engine, model_a: PreTrainedModel) -> None:
    batch = [request(f"k{i}", [9, 9], limits(top_k=3, max_new_tokens=1), seed=i) for i in range(60)]
    batch += [request(f"p{i}", [9, 9], limits(top_p=0.3, max_new_tokens=1), seed=i) for i in range(60)]
    batch += [request(f"m{i}", [9, 9], limits(min_p=0.5, max_new_tokens=1), seed=i) for i in range(60)]
    batch += [request(f"f{i}", [9, 9], limits(max_new_tokens=1), seed=i) for i in range(60)]
    run(engine, *batch)
    probs, order = model_a(torch.tensor([[9, 9]])).logits[0, -1].softmax(-1).sort(descending=True)
    nucleus = int((probs.cumsum(0) - probs <= 0.3).sum())
    supports = (3, nucleus, int((probs >= 0.5 * probs[0]).sum()))
    for part, size in enumerate(supports):
        drawn = {s.output_ids[0] for s in batch[60 * part : 60 * part + 60]}
        assert drawn <= set(order[:size].tolist())
        assert part != 0 or len(drawn) == 3
    assert len({s.output_ids[0] for s in batch[180:]}) > max(supports), "free rows were truncated too"


def switch_mid_way(mode: str, model_a: PreTrainedModel, model_b: PreTrainedModel) -> list[Sequence]:
    """Three sequences: ten steps on model_a, a pause of `mode`, the rest on model_b."""
    model = build_switchable(model_a)
    engine = build_engine(model)
    batch = [request(str(i), p, limits(max_new_tokens=25), seed=i) for i, p in enumerate(prompts(3))]
    engine.submit(batch)
    for _ in range(10):
        engine.step()
    assert engine.pause(mode) == []  # type: ignore[arg-type]
    model.load_state_dict(model_b.state_dict())
    engine.set_version("b")
    engine.resume()
    run(engine)
    return batch


def build_switchable(model: PreTrainedModel) -> PreTrainedModel:
    copy = type(model)(model.config).eval().requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    return copy


def test_pause_in_place_continues_on_the_old_cache(
    model_a: PreTrainedModel, model_b: PreTrainedModel
) -> None:
    for s in switch_mid_way("in_place", model_a, model_b):
        assert s.spans() == [("default", 0, 10), ("b", 10, 25)]
        assert s.num_retractions == 0
        assert largest_error(s.log_probs[:10], log_probs_of(model_a, s.prompt, s.output_ids)[:10]) < TOLERANCE
        tail = log_probs_on_old_cache(model_a, model_b, s.prompt, s.output_ids, 10)
        assert largest_error(s.log_probs[10:], tail) < TOLERANCE
        assert largest_error(s.log_probs[10:], log_probs_of(model_b, s.prompt, s.output_ids)[10:]) > 1e-3


def test_retracted_sequences_start_over_on_the_new_weights(
    model_a: PreTrainedModel, model_b: PreTrainedModel
) -> None:
    for s in switch_mid_way("retract", model_a, model_b):
        assert s.spans() == [("default", 0, 10), ("b", 10, 25)]
        assert s.num_retractions == 1
        assert largest_error(s.log_probs[:10], log_probs_of(model_a, s.prompt, s.output_ids)[:10]) < TOLERANCE
        assert largest_error(s.log_probs[10:], log_probs_of(model_b, s.prompt, s.output_ids)[10:]) < TOLERANCE


def test_retraction_without_new_weights_changes_no_token(model_a: PreTrainedModel) -> None:
    whole = [request(str(i), p, seed=i) for i, p in enumerate(prompts(6))]
    run(build_engine(model_a), *whole)
    engine = build_engine(model_a)
    cut = [request(str(i), p, seed=i) for i, p in enumerate(prompts(6))]

    def retract(step: int) -> None:
        if step in (2, 5, 6):
            engine.pause("retract")
            engine.resume()

    run(engine, *cut, after_step=retract)
    assert [s.output_ids for s in whole] == [s.output_ids for s in cut]
    assert {s.num_retractions for s in cut} == {3}


def test_a_retracted_sequence_may_meet_a_prompt_equal_to_its_tokens(
    engine: Engine, model_a: PreTrainedModel
) -> None:
    """Both are prefilled together and both want prompt log-probs, of prompts that differ in length."""
    scored = Wanted(log_probs=True, prompt_from=0, top=2)
    old = request("old", [1, 2, 3], seed=3, wanted=scored)
    engine.submit([old])
    for _ in range(4):
        engine.step()
    engine.pause("retract")
    engine.resume()
    old.prompt_log_probs = []
    fresh = request("fresh", old.tokens, seed=9, wanted=scored)
    run(engine, fresh)
    assert fresh.num_cached == len(fresh.prompt) - 1, "they were not prefilled together"
    for s in (old, fresh):
        assert len(s.prompt_details.top) == len(s.prompt) - 1
        assert (
            largest_error(s.prompt_log_probs, log_probs_of(model_a, s.prompt[:1], s.prompt[1:])) < TOLERANCE
        )
        assert largest_error(s.log_probs, log_probs_of(model_a, s.prompt, s.output_ids)) < TOLERANCE


def test_abort_keeps_the_partial_output(engine: Engine, model_a: PreTrainedModel) -> None:
    batch = [request(str(i), p, seed=i) for i, p in enumerate(prompts(4))]
    engine.submit(batch)
    for _ in range(5):
        engine.step()
    assert engine.abort(lambda s: s.rid == "2") == [batch[2]]
    run(engine)
    assert [len(s.output_ids) for s in batch] == [12, 12, 5, 12]
    assert batch[2].finish_reason is not None
    assert batch[2].finish_reason["type"] == "abort"
    for s in batch:
        assert largest_error(s.log_probs, log_probs_of(model_a, s.prompt, s.output_ids)) < TOLERANCE


def test_logits_that_are_not_finite_are_an_error(model_a: PreTrainedModel) -> None:
    broken = build_switchable(model_a)
    broken.lm_head.weight[3] = torch.nan
    engine = build_engine(broken)
    engine.submit([request("a", [1, 2])])
    with pytest.raises(NumericsError, match="version default"):
        engine.step()
