"""The counter-based draw and the inverse CDF, without a model."""

from __future__ import annotations

import pytest
import torch

from mcore_rl.server import sampling
from mcore_rl.server.sampling import Knobs, block_sums, counter_uniform, sample

DRAWS = 40_000


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    peak = logits.amax(-1, keepdim=True)
    return sampling.draw(logits, peak, block_sums(logits, peak), uniform)


def knobs(rows: int, uniform: torch.Tensor, **changes: float) -> Knobs:
    values = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0} | changes
    full = {name: torch.full((rows,), value) for name, value in values.items() if name != "top_k"}
    return Knobs(**full, top_k=torch.full((rows,), int(changes.get("top_k", 0))), uniform=uniform)


def largest_gap(values: torch.Tensor) -> float:
    """Kolmogorov-Smirnov distance from the uniform distribution."""
    ordered = values.sort().values
    return float((ordered - (torch.arange(len(values)) + 0.5) / len(values)).abs().max())


def test_draws_are_uniform_over_seeds_and_over_counters() -> None:
    count = torch.arange(DRAWS)
    bound = 1.95 / DRAWS**0.5  # Kolmogorov-Smirnov at about 0.001
    assert largest_gap(counter_uniform(count, torch.zeros_like(count))) < bound
    assert largest_gap(counter_uniform(torch.full_like(count, 42), count)) < bound
    assert largest_gap(counter_uniform(count, torch.zeros_like(count)) ** 1.1) > bound


def test_neighbouring_seeds_are_unrelated() -> None:
    count = torch.arange(DRAWS)
    one, next_seed = (
        counter_uniform(torch.full_like(count, 1), count),
        counter_uniform(torch.full_like(count, 2), count),
    )
    assert abs(float(torch.corrcoef(torch.stack([one, next_seed]))[0, 1])) < 4 / DRAWS**0.5
    assert float(torch.corrcoef(torch.stack([one, one]))[0, 1]) > 0.99


def test_a_draw_is_a_function_of_its_own_seed_and_counter() -> None:
    seeds, counters = torch.tensor([5, -(2**63), 2**63 - 1]), torch.tensor([0, 7, 100])
    together = counter_uniform(seeds, counters)
    assert all(together[i] == counter_uniform(seeds[i : i + 1], counters[i : i + 1])[0] for i in range(3))
    assert bool(((together > 0) & (together < 1)).all())


def test_frequencies_are_the_probabilities() -> None:
    logits = torch.tensor([2.0, 0.5, -1.0, 0.0, 1.0])
    uniform = counter_uniform(torch.arange(DRAWS), torch.zeros(DRAWS, dtype=torch.long))
    for temperature in (1.0, 0.5):
        tokens, log_probs, _ = sample(
            logits.expand(DRAWS, -1), knobs(DRAWS, uniform, temperature=temperature)
        )
        want = (logits / temperature).softmax(-1)
        found = tokens.bincount(minlength=5) / DRAWS
        assert float((found - want).abs().max()) < 5 / DRAWS**0.5 / 2
        assert float((found - logits.mul(1.3).softmax(-1)).abs().max()) > 5 / DRAWS**0.5 / 2
        assert torch.allclose(log_probs, want.log()[tokens], atol=1e-6)


def test_log_probs_are_those_before_truncation() -> None:
    logits = torch.tensor([2.0, 1.9, -1.0]).expand(100, -1)
    uniform = counter_uniform(torch.arange(100), torch.zeros(100, dtype=torch.long))
    tokens, log_probs, _ = sample(logits, knobs(100, uniform, top_k=2))
    assert set(tokens.tolist()) == {0, 1}
    assert torch.allclose(log_probs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    greedy, untempered, _ = sample(logits, knobs(100, uniform, top_k=1, temperature=0.1))
    assert set(greedy.tolist()) == {0}
    assert torch.allclose(untempered, logits[0].log_softmax(-1)[0].expand(100))


def test_an_impossible_token_is_never_drawn_at_the_edges() -> None:
    logits = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf]).expand(2, -1)
    edges = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert sample(logits, knobs(2, edges))[0].tolist() == [1, 2]


def test_a_draw_of_blocks_is_that_of_a_running_sum_over_the_whole_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    edges = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    for vocab in (7, 255, 256, 257, 5000):
        logits = torch.randn(64, vocab, generator=generator).mul(4)
        few = logits.masked_fill(torch.rand(64, vocab, generator=generator) >= 0.05, -torch.inf)
        few[:, 3] = -70  # of some rows the only one
        for drawn_from in (logits, few):
            weights = (drawn_from - drawn_from.amax(-1, keepdim=True)).exp()
            uniform = torch.rand(64, generator=generator, dtype=torch.float64)
            running = weights.cumsum(-1, dtype=torch.float64)
            wanted = torch.searchsorted(running, (uniform * running[:, -1])[:, None], right=True)[:, 0]
            drawn = draw(drawn_from, uniform)
            assert torch.equal(drawn, wanted)
            assert bool((weights.gather(1, drawn[:, None]) > 0).all())
            at_edges = draw(drawn_from, edges.repeat(32))  # where the rounding of the sums decides
            assert bool((weights.gather(1, at_edges[:, None]) > 0).all())
            assert drawn_from is few or not torch.equal(draw(drawn_from, 1 - uniform), wanted)


def test_a_row_that_is_not_finite_has_a_token_of_the_vocabulary() -> None:
    """The engine says that such a row is wrong; it must not fail before that."""
    token = draw(torch.full((1, 300), torch.nan), torch.tensor([0.5], dtype=torch.float64))
    assert 0 <= int(token) < 300


def test_rows_are_drawn_alike_however_many_are_summed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, 1000, generator=generator)
    uniform = torch.rand(7, generator=generator, dtype=torch.float64)
    together = draw(logits, uniform)
    monkeypatch.setattr(sampling, "_CACHED", 2500)
    assert torch.equal(draw(logits, uniform), together)
    assert torch.equal(
        torch.cat([draw(p[None], u[None]) for p, u in zip(logits, uniform, strict=True)]), together
    )
    assert not torch.equal(draw(logits, 1 - uniform), together)
