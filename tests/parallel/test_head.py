"""The vocab-parallel head against its dense float64 reference, and Megatron's contract for its gradient."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mcore_rl.parallel import head
from mcore_rl.parallel.head import dense_log_prob_entropy, log_prob_entropy, merge_statistics
from mcore_rl.parallel.launch import Pool

Problem = tuple[Tensor, Tensor, Tensor, float | Tensor, Tensor, Tensor]
"""hidden [R, H], weight [V, H], targets [R], temperature, dL/dlog_prob [R], dL/dentropy [R]"""


def problem(rows: int, vocab: int, hidden: int, per_row: bool, scale: float, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    temperature = 0.3 + normal(rows).abs() if per_row else 0.7
    targets = torch.randint(vocab, (rows,), generator=generator)
    return (
        scale * normal(rows, hidden),
        normal(vocab, hidden),
        targets,
        temperature,
        normal(rows),
        normal(rows),
    )


problems = st.builds(
    problem,
    rows=st.integers(0, 9),
    vocab=st.integers(1, 23),
    hidden=st.integers(1, 8),
    per_row=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 10**6),
)


def dense(case: Problem, *, entropy: bool = True) -> list[Tensor]:
    """log-prob, entropy, dL/dhidden, dL/dweight by autograd through [R, V] logits."""
    return differentiated(dense_log_prob_entropy, case, entropy=entropy)


def differentiated(fn, case: Problem, *, entropy: bool = True, **options) -> list[Tensor]:
    hidden, weight = (x.clone().requires_grad_() for x in case[:2])
    out = fn(hidden, weight, case[2], case[3], **options)
    loss = (out.log_prob * case[4]).sum() + ((out.entropy * case[5]).sum() if entropy else 0)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    return [out.log_prob.detach(), out.entropy.detach(), *gradients]


def max_abs(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * (1 + max_abs(other)))


# --- one process ------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(problems, st.integers(1, 10), st.booleans())
def test_one_shard_equals_the_reference(case: Problem, tile_rows: int, entropy: bool) -> None:
    assert_close(
        differentiated(log_prob_entropy, case, entropy=entropy, tile_rows=tile_rows),
        dense(case, entropy=entropy),
    )


@settings(max_examples=50, deadline=None)
@given(problems, st.integers(1, 9))
def test_padded_rows_take_no_part(case: Problem, padding: int) -> None:
    """Garbage in the padding, even infinities, changes nothing and gets no gradient."""
    hidden, weight, *rest = case
    garbage = torch.full((padding, weight.shape[1]), torch.inf, dtype=torch.float64)
    padded = differentiated(
        log_prob_entropy, (hidden, torch.cat([weight, garbage]), *rest), vocab_size=len(weight)
    )
    assert not padded[3][len(weight) :].any()
    padded[3] = padded[3][: len(weight)]
    assert_close(padded, dense(case))


@settings(max_examples=100, deadline=None)
@given(problems, st.lists(st.integers(0, 23), max_size=4))
def test_shards_of_any_size_merge_to_the_whole(case: Problem, cuts: list[int]) -> None:
    """Empty shards too: they send -inf, 0, 0, which must not become NaN."""
    hidden, weight, targets, temperature = case[:4]
    bounds = [0, *sorted(min(cut, len(weight)) for cut in cuts), len(weight)]
    z = hidden @ weight.T / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    stats = [head._shard_statistics(z[:, a:b].clone(), targets - a) for a, b in pairwise(bounds)]
    log_prob, entropy, _ = merge_statistics(torch.stack(stats))
    assert_close([log_prob, entropy], dense(case)[:2])


@pytest.mark.parametrize("offset", [0.0, 100.0, -1e4, 1e4])
def test_float32_entropy_does_not_cancel(offset: float) -> None:
    """Hidden size 1 and hidden 1 make the logits exact: what is left is the error of the formula."""
    logits = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)) + offset
    one, target = torch.ones(1, 1), torch.tensor([3])
    exact = dense_log_prob_entropy(one.double(), logits.double(), target)
    got = log_prob_entropy(one, logits, target)
    assert (got.entropy - exact.entropy).abs().item() < 3e-6
    assert (got.log_prob - exact.log_prob).abs().item() < 3e-6 + 1e-7 * abs(offset)


def test_the_textbook_formula_does_cancel() -> None:
    """Negative control: lse - sum p z is off by far more at the same logits."""
    logits = torch.randn(200, generator=torch.Generator().manual_seed(0)) + 1e4
    exact = torch.distributions.Categorical(logits=logits.double()).entropy()
    textbook = logits.logsumexp(0) - (logits.softmax(0) * logits).sum()
    assert (textbook - exact).abs().item() > 1e-4


@pytest.mark.parametrize("zero_out", [False, True])
def test_a_weight_of_megatrons_ddp_gets_its_gradient_in_main_grad(zero_out: bool) -> None:
    """Added over micro-batches; autograd gets a dummy, never None, zeros where Megatron will add it."""
    case = problem(rows=5, vocab=11, hidden=4, per_row=False, scale=1.0, seed=0)
    hidden, weight = case[0], case[1].clone().requires_grad_()
    weight.main_grad = torch.ones_like(weight)
    weight.zero_out_wgrad = zero_out
    dummies = []
    weight.register_hook(dummies.append)
    for _ in range(3):
        out = log_prob_entropy(hidden, weight, case[2], case[3])
        ((out.log_prob * case[4]).sum() + (out.entropy * case[5]).sum()).backward()
    torch.testing.assert_close(weight.main_grad - 1, 3 * dense(case)[3], rtol=1e-9, atol=1e-9)
    assert weight.grad_added_to_main_grad is True
    assert [dummy.shape for dummy in dummies] == [weight.shape] * 3
    if zero_out:
        assert not any(dummy.any() for dummy in dummies)


def test_nothing_is_computed_for_what_needs_no_gradient() -> None:
    case = problem(rows=5, vocab=11, hidden=4, per_row=False, scale=1.0, seed=0)
    hidden = case[0].clone().requires_grad_()
    log_prob_entropy(hidden, case[1], case[2]).entropy.sum().backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not log_prob_entropy(hidden, case[1], case[2]).log_prob.requires_grad


# --- two processes ----------------------------------------------------------------------------------------

CASES = [(rows, vocab) for rows in (0, 1, 6) for vocab in (1, 3, 8, 13)]
"""Vocabularies of 1 and 3 leave the second shard of 2 rows empty, or half empty."""


def sharded(reduce_hidden_grad: bool) -> list[list[Tensor]]:
    """This rank's log-prob, entropy, dL/dhidden and weight-gradient shard of every case."""
    rank, results = dist.get_rank(), []
    for rows, vocab in CASES:
        hidden, weight, *rest = problem(rows, vocab, 4, rows > 1, 3.0, seed=rows + vocab)
        shard_rows = max(2, -(-vocab // 2))
        padded = torch.full((2 * shard_rows, 4), torch.nan, dtype=torch.float64)
        padded[:vocab] = weight
        mine = padded[rank * shard_rows : (rank + 1) * shard_rows]
        results.append(
            differentiated(
                log_prob_entropy,
                (hidden, mine, *rest),
                group=dist.group.WORLD,
                vocab_size=vocab,
                reduce_hidden_grad=reduce_hidden_grad,
                tile_rows=4,
            )
        )
    return results


@pytest.mark.parametrize("reduce_hidden_grad", [True, False])
def test_two_shards_equal_the_reference(pool2: Pool, reduce_hidden_grad: bool) -> None:
    """Without the reduction the hidden gradients of the ranks are partial sums."""
    answers = pool2.run(sharded, reduce_hidden_grad)
    for (rows, vocab), first, second in zip(CASES, *answers, strict=True):
        expected = dense(problem(rows, vocab, 4, rows > 1, 3.0, seed=rows + vocab))
        weight_gradient = torch.cat([first[3], second[3]])
        assert not weight_gradient[vocab:].any()
        hidden_gradient = first[2] if reduce_hidden_grad else first[2] + second[2]
        assert_close([*first[:2], hidden_gradient, weight_gradient[:vocab]], expected)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        if reduce_hidden_grad:
            assert torch.equal(first[2], second[2])


def collectives(rows: int) -> list[str]:
    """Names of the collectives of one forward and backward pass."""
    called: list[str] = []

    def counted(name: str):
        original = getattr(dist, name)
        return lambda *args, **kwargs: (called.append(name), original(*args, **kwargs))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_into_tensor", "all_reduce", "all_gather"):
            patch.setattr(dist, name, counted(name))
        hidden, weight, *rest = problem(rows, 8, 4, False, 1.0, seed=0)
        mine = weight.chunk(2)[dist.get_rank()]
        differentiated(log_prob_entropy, (hidden, mine, *rest), group=dist.group.WORLD, tile_rows=2)
    return called


def test_one_collective_each_way(pool2: Pool) -> None:
    """However many tiles there are."""
    assert pool2.run(collectives, 6) == [["all_gather_into_tensor", "all_reduce"]] * 2
