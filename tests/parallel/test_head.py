"""The vocab-parallel head against its dense float64 reference, and Megatron's contract for its gradient."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mcore_rl.parallel.head import Call, HeadOutput, dense_log_prob_entropy, head_loss, log_prob_entropy
from mcore_rl.parallel.head import passes as head_passes
from mcore_rl.parallel.head.passes import Tiling
from mcore_rl.parallel.head.rows import merge_statistics, shard_statistics
from mcore_rl.parallel.pool import Pool


class Problem(NamedTuple):
    hidden: Tensor
    """[R, H]"""
    weight: Tensor
    """[V, H]"""
    targets: Tensor
    """[R]"""
    temperature: float
    a: Tensor
    """[R] dL/dlog_prob"""
    b: Tensor
    """[R] dL/dentropy"""
    cap: float | None = None


def problem(
    rows: int,
    vocab: int,
    hidden: int,
    scale: float,
    seed: int,
    temperature: float = 0.7,
    cap: float | None = None,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    targets = torch.randint(vocab, (rows,), generator=generator)
    a, b = normal(rows), normal(rows)
    return Problem(scale * normal(rows, hidden), normal(vocab, hidden), targets, temperature, a, b, cap)


problems = st.builds(
    problem,
    rows=st.sampled_from([0, 1, 2, 7, 9]),
    vocab=st.integers(1, 23),
    hidden=st.integers(1, 8),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    cap=st.sampled_from([None, 0.5, 30.0]),
)
tilings = st.builds(
    lambda tile, tiles, columns, apart: Tiling(tile, tile * tiles, columns, apart),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 30),
    st.booleans(),
)


def dense(case: Problem, *, entropy: bool = True) -> list[Tensor]:
    """log-prob, entropy, dL/dhidden, dL/dweight by autograd through [R, V] logits."""
    return differentiated(
        case, lambda h, w: dense_log_prob_entropy(h, w, case.targets, case.temperature, case.cap), entropy
    )


def loss_of(case: Problem, rows: slice, out: HeadOutput, entropy: bool) -> Tensor:
    loss = (out.log_prob * case.a[rows]).sum()
    return loss + (out.entropy * case.b[rows]).sum() if entropy else loss


def recomputed(case: Problem, *, entropy: bool = True, **options) -> list[Tensor]:
    """What `dense` gives, from recompute mode."""
    call = Call.of(case.weight, case.targets, case.temperature, cap=case.cap, **options)
    return differentiated(case, lambda h, w: log_prob_entropy(h, w, call), entropy)


def differentiated(
    case: Problem, score: Callable[[Tensor, Tensor], HeadOutput], entropy: bool
) -> list[Tensor]:
    hidden, weight = (x.clone().requires_grad_() for x in case[:2])
    out = score(hidden, weight)
    gradients = torch.autograd.grad(loss_of(case, slice(None), out, entropy), (hidden, weight))
    return [out.log_prob.detach(), out.entropy.detach(), *gradients]


def fused(case: Problem, *, entropy: bool = True, **options) -> list[Tensor]:
    """What `dense` gives, from fused mode, which sees its loss times 3."""
    hidden, weight = (x.clone().requires_grad_() for x in case[:2])
    seen: list[HeadOutput] = []

    def loss(rows: slice, out: HeadOutput) -> Tensor:
        assert rows.start == sum(len(one.log_prob) for one in seen)
        seen.append(HeadOutput(*(x.detach() for x in out)))
        return loss_of(case, rows, out, entropy)

    call = Call.of(weight, case.targets, case.temperature, cap=case.cap, **options)
    total = head_loss(hidden, weight, call, loss)
    assert total.item() == 0
    assert seen == []
    gradients = [gradient / 3 for gradient in torch.autograd.grad(3 * total, (hidden, weight))]
    return [*(torch.cat(parts) for parts in zip(*seen, strict=True)), *gradients]


MODES = pytest.mark.parametrize("mode", [recomputed, fused])


def max_abs(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * (1 + max_abs(other)))


# --- one process ------------------------------------------------------------------------------------------


@MODES
@settings(max_examples=150, deadline=None)
@given(problems, tilings, st.booleans())
def test_one_shard_equals_the_reference(mode, case: Problem, tiling: Tiling, entropy: bool) -> None:
    assert_close(mode(case, entropy=entropy, tiling=tiling), dense(case, entropy=entropy))


@MODES
@settings(max_examples=50, deadline=None)
@given(problems, st.integers(1, 9))
def test_padded_rows_take_no_part(mode, case: Problem, padding: int) -> None:
    """Garbage in the padding, even infinities, changes nothing and gets no gradient."""
    vocab = len(case.weight)
    garbage = torch.full((padding, case.weight.shape[1]), torch.inf, dtype=torch.float64)
    padded = mode(case._replace(weight=torch.cat([case.weight, garbage])), vocab_size=vocab)
    assert not padded[3][vocab:].any()
    padded[3] = padded[3][:vocab]
    assert_close(padded, dense(case))


@settings(max_examples=100, deadline=None)
@given(problems, st.lists(st.integers(0, 23), max_size=4))
def test_shards_of_any_size_merge_to_the_whole(case: Problem, cuts: list[int]) -> None:
    """Shards without an entry send -inf, 0, 0, which must not become NaN."""
    bounds = [0, *sorted(min(cut, len(case.weight)) for cut in cuts), len(case.weight)]
    scale = 1 / case.temperature
    logits = case.hidden @ case.weight.T
    stats = [shard_statistics(logits[:, a:b], case.targets - a, scale, case.cap) for a, b in pairwise(bounds)]
    log_prob, entropy, _, _ = merge_statistics(torch.stack(stats), scale)
    assert_close([log_prob, entropy], dense(case)[:2])


def exact_logits(offset: float, dtype: torch.dtype = torch.float32) -> Problem:
    """31 rows of 200 logits near `offset`, which a GEMM with the identity computes without rounding."""
    generator = torch.Generator().manual_seed(0)
    logits = (offset + 3 * torch.randn(31, 200, generator=generator)).to(dtype)
    targets = torch.randint(200, (31,), generator=generator)
    a, b = torch.randn(2, 31, generator=generator)
    return Problem(torch.eye(31, dtype=dtype), logits.T.contiguous(), targets, 0.7, a, b)


def in_float64(case: Problem) -> Problem:
    return Problem(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in case))


def relative_errors(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [max_abs(x.double() - y) / max(1.0, max_abs(y)) for x, y in zip(got, expected, strict=True)]


@MODES
@pytest.mark.parametrize("offset", [0.0, 100.0, -1e4, 1e4])
@pytest.mark.parametrize("tiling", [None, Tiling(8, 16, 37)])
def test_float32_does_not_cancel(mode, offset: float, tiling: Tiling | None) -> None:
    """dL/dweight is dL/dlogits here; dL/dhidden = sum of dL/dlogits x weight, whose terms are 1e4 apart."""
    case = exact_logits(offset)
    got, expected = mode(case, tiling=tiling), dense(in_float64(case))
    *errors, _, weight_error = relative_errors(got, expected)
    assert max(*errors, weight_error) < 1e-6
    assert max_abs(got[2].double() - expected[2]) < 1e-6 * max(10.0, abs(offset)) * 10


@MODES
@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_bf16_adds_nothing_to_the_rounding_of_its_logits(mode, offset: float) -> None:
    """Statistics are float32: of logits that bf16 holds exactly (64 apart here), they are exact to 1e-6."""
    case = exact_logits(offset, torch.bfloat16)
    got, expected = mode(case, tiling=Tiling(8, 16, 37)), dense(in_float64(case))
    *errors, _, weight_error = relative_errors(got, expected)
    assert max(errors) < 1e-6
    assert weight_error < 2e-2


def test_the_textbook_formula_does_cancel() -> None:
    """Negative control: lse - sum p z is off by far more at the same logits."""
    logits = exact_logits(1e4).weight.T
    exact = torch.distributions.Categorical(logits=logits.double()).entropy()
    textbook = logits.logsumexp(1) - (logits.softmax(1) * logits).sum(1)
    assert max_abs(textbook - exact) > 1e-4


@MODES
@pytest.mark.parametrize("rows", [0, 1, 127])
def test_bf16_within_two_percent(mode, rows: int) -> None:
    """A CPU's GEMM rounds logits and both gradients to bf16."""
    case = problem(rows, 1000, 64, 0.1, seed=rows)
    case = Problem(*(x.bfloat16() if i < 2 else x for i, x in enumerate(case)))  # type: ignore[union-attr]
    case = case._replace(a=case.a.float(), b=case.b.float())
    got = mode(case, tiling=Tiling(16, 64, 300))
    assert [x.dtype for x in got] == [torch.float32] * 2 + [torch.bfloat16] * 2
    expected = dense(in_float64(case))
    assert max(relative_errors(got[:2], expected[:2])) < 2e-2
    for one, other in zip(got[2:], expected[2:], strict=True):
        assert max_abs(one.double() - other) <= 2e-2 * max_abs(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_are_those_of_scoring_bit_by_bit(dtype: torch.dtype) -> None:
    """A ratio of a policy to itself is 1, whichever pass scored it."""
    case = problem(300, 5000, 64, 0.2, seed=0)
    case = case._replace(hidden=case.hidden.to(dtype), weight=case.weight.to(dtype))
    case = case._replace(a=case.a.float(), b=case.b.float())
    tiling = Tiling(32, 256, 1500)
    with torch.no_grad():
        call = Call.of(case.weight, case.targets, case.temperature, tiling=tiling)
        scored = log_prob_entropy(case.hidden, case.weight, call)
    for mode in (recomputed, fused):
        for one, other in zip(mode(case, tiling=tiling)[:2], scored, strict=True):
            assert torch.equal(one, other)


@MODES
def test_scored_rows_are_picked_from_the_hidden_states(mode) -> None:
    case = problem(5, 11, 4, 1.0, seed=0)
    rows = torch.tensor([6, 1, 2, 0, 4])
    hidden = torch.full((8, 4), torch.nan, dtype=torch.float64).index_copy(0, rows, case.hidden)
    got = mode(case._replace(hidden=hidden), rows=rows)
    got[2], others = got[2][rows], got[2][[3, 5, 7]]
    assert not others.any()
    assert_close(got, dense(case))


@MODES
@pytest.mark.parametrize("zero_out", [False, True])
def test_a_weight_of_megatrons_ddp_gets_its_gradient_in_main_grad(mode, zero_out: bool) -> None:
    """Added over micro-batches; autograd gets a dummy, never None, zeros where Megatron will add it."""
    case = problem(rows=5, vocab=11, hidden=4, scale=1.0, seed=0)
    weight = case.weight.clone().requires_grad_()
    weight.main_grad = torch.ones_like(weight)
    weight.zero_out_wgrad = zero_out
    dummies, call = [], Call.of(weight, case.targets, case.temperature)
    weight.register_hook(dummies.append)
    for _ in range(3):
        if mode is fused:
            total = head_loss(case.hidden, weight, call, lambda rows, out: loss_of(case, rows, out, True))
        else:
            out = log_prob_entropy(case.hidden, weight, call)
            total = loss_of(case, slice(None), out, True)
        total.backward()
    torch.testing.assert_close(weight.main_grad - 1, 3 * dense(case)[3], rtol=1e-9, atol=1e-9)
    assert weight.grad_added_to_main_grad is True
    assert [dummy.shape for dummy in dummies] == [weight.shape] * 3
    if zero_out:
        assert not any(dummy.any() for dummy in dummies)


@MODES
def test_tied_embeddings_get_both_gradients(mode) -> None:
    """The hidden states come from the same weight."""
    case = problem(rows=7, vocab=11, hidden=4, scale=1.0, seed=0)
    tokens = torch.arange(7)

    def gradient(run) -> Tensor:
        _, _, hidden, head = run(case._replace(hidden=case.weight[tokens]))
        return head.index_add(0, tokens, hidden)

    torch.testing.assert_close(gradient(mode), gradient(dense), rtol=1e-9, atol=1e-9)


def test_nothing_is_computed_for_what_needs_no_gradient() -> None:
    case = problem(rows=5, vocab=11, hidden=4, scale=1.0, seed=0)
    hidden = case.hidden.clone().requires_grad_()
    call = Call.of(case.weight, case.targets)
    log_prob_entropy(hidden, case.weight, call).entropy.sum().backward()
    assert hidden.grad is not None
    head_loss(hidden, case.weight, call, lambda rows, out: out.entropy.sum()).backward()
    with torch.no_grad():
        assert not log_prob_entropy(hidden, case.weight, call).log_prob.requires_grad


@pytest.mark.parametrize(
    ("rows", "dtype", "device", "tiling"),
    [
        (16032, torch.bfloat16, "cuda", (1024, 4096, 16032, True)),
        (16032, torch.float32, "cuda", (1024, 1024, 16032, False)),
        (151936, torch.bfloat16, "cuda", (512, 512, 151936, True)),
        (32768, torch.float32, "cpu", (512, 512, 8192, False)),
        (32768, torch.bfloat16, "cpu", (1024, 1024, 8192, False)),
        (50, torch.float32, "cpu", (1024, 1024, 4096, False)),
        (10**7, torch.float64, "cpu", (16, 16, 131072, False)),
    ],
)
def test_tiles_are_bounded(rows: int, dtype: torch.dtype, device: str, tiling: tuple) -> None:
    assert Tiling.of(rows, dtype, torch.device(device)) == tiling


# --- two processes ----------------------------------------------------------------------------------------

CASES = [(rows, vocab) for rows in (0, 1, 7) for vocab in (1, 3, 8, 13)]
"""Vocabularies of 1 and 3 leave the second shard of 2 rows empty, or half empty."""
TOKENS = 8
"""of which `rows` are scored"""


def case_of(rows: int, vocab: int) -> Problem:
    return problem(rows, vocab, 4, 3.0, seed=rows + vocab, cap=2.0 if rows % 2 else None)


def picked(rows: int) -> Tensor:
    return torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))[:rows]


def shard_of(case: Problem) -> Problem:
    """What this rank of two holds, NaN in the padding; hidden states of all tokens."""
    rank, vocab = dist.get_rank(), len(case.weight)
    each = max(2, -(-vocab // 2))
    mine = slice(rank * each, (rank + 1) * each)
    padded = torch.full((2 * each, 4), torch.nan, dtype=torch.float64)
    padded[:vocab] = case.weight
    hidden = torch.zeros(TOKENS, 4, dtype=torch.float64)
    hidden[picked(len(case.hidden))] = case.hidden
    return case._replace(hidden=hidden, weight=padded[mine])


def sharded(mode, sequence_parallel: bool) -> list[list[Tensor]]:
    """This rank's log-prob, entropy, dL/dhidden and weight-gradient shard of every case."""
    results = []
    for rows, vocab in CASES:
        mine = shard_of(case_of(rows, vocab))
        if sequence_parallel:
            mine = mine._replace(hidden=mine.hidden.chunk(2)[dist.get_rank()])
        settings = {"group": dist.group.WORLD, "vocab_size": vocab, "rows": picked(rows)}
        tiling = Tiling(2, 4, 3, apart=rows % 2 == 1)
        results.append(mode(mine, tiling=tiling, sequence_parallel=sequence_parallel, **settings))
    return results


@MODES
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_shards_equal_the_reference(pool2: Pool, mode, sequence_parallel: bool) -> None:
    """Under sequence parallelism each rank has the hidden states, and the gradients, of half the tokens."""
    answers = pool2.run(sharded, mode, sequence_parallel)
    for (rows, vocab), first, second in zip(CASES, *answers, strict=True):
        expected = dense(case_of(rows, vocab))
        weight_gradient = torch.cat([first[3], second[3]])
        assert not weight_gradient[vocab:].any()
        hidden_gradient = torch.cat([first[2], second[2]]) if sequence_parallel else first[2]
        assert_close([*first[:2], hidden_gradient[picked(rows)], weight_gradient[:vocab]], expected)
        assert torch.count_nonzero(hidden_gradient.any(1)) <= rows
        for one, other in zip(first[:2], second[:2], strict=True):
            assert torch.equal(one, other)
        if not sequence_parallel:
            assert torch.equal(first[2], second[2])


COLLECTIVES = dict.fromkeys(("all_reduce", "broadcast"), 0) | dict.fromkeys(
    ("all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "reduce_scatter"),
    1,
)
"""name -> position of what this rank sends"""


def collectives(mode, rows: int, sequence_parallel: bool, apart: bool = False) -> list[tuple[str, int]]:
    """(name, bytes this rank sends) of every collective, and "dW" of every product, in order."""
    done: list[tuple[str, int]] = []

    def recorded(name: str, of, sent: int):
        def record(*args, **kwargs):
            done.append((name, args[sent].nbytes))
            return of(*args, **kwargs)

        return record

    mine = shard_of(problem(rows, 8, 4, 1.0, seed=0))
    mine = Problem(*(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in mine))
    if sequence_parallel:
        mine = mine._replace(hidden=mine.hidden.chunk(2)[dist.get_rank()])
    with pytest.MonkeyPatch.context() as patch:
        for name, sent in COLLECTIVES.items():
            patch.setattr(dist, name, recorded(name, getattr(dist, name), sent))
        patch.setattr(head_passes, "_add_product", recorded("dW", head_passes._add_product, 1))
        mode(
            mine,
            group=dist.group.WORLD,
            rows=picked(rows),
            sequence_parallel=sequence_parallel,
            tiling=Tiling(2, 4, 3, apart),
        )
    return done


HALF_OF_TOKENS, ALL_TOKENS = (4 * TOKENS * 4) // 2, 4 * TOKENS * 4
"""bytes of hidden states or their gradient, 4 wide, in float32"""


def test_recompute_mode_has_one_collective_each_way(pool2: Pool) -> None:
    """16 bytes per row and rank, however many tiles; the hidden gradient's, before the last dW."""
    expected = [
        ("all_gather_into_tensor", 16 * 7),
        ("dW", 4 * 4 * 4),
        ("all_reduce", 7 * 4 * 4),
        ("dW", 3 * 4 * 4),
    ]
    assert pool2.run(collectives, recomputed, 7, False) == [expected] * 2


def test_fused_mode_has_one_per_wave_and_one_for_the_hidden_gradient(pool2: Pool) -> None:
    expected = [
        ("all_gather_into_tensor", 16 * 4),
        ("dW", 4 * 4 * 4),
        ("all_gather_into_tensor", 16 * 3),
        ("all_reduce", 7 * 4 * 4),
        ("dW", 3 * 4 * 4),
    ]
    assert pool2.run(collectives, fused, 7, False) == [expected] * 2


def test_where_gradients_lie_apart_a_wave_is_exchanged_beside_the_products_of_the_one_before(
    pool2: Pool,
) -> None:
    expected = [
        ("all_gather_into_tensor", 16 * 4),
        ("all_gather_into_tensor", 16 * 3),
        ("dW", 4 * 4 * 4),
        ("all_reduce", 7 * 4 * 4),
        ("dW", 3 * 4 * 4),
    ]
    assert pool2.run(collectives, fused, 7, False, True) == [expected] * 2


@MODES
def test_sequence_parallelism_gathers_hidden_states_and_scatters_their_gradient(pool2: Pool, mode) -> None:
    alone, *_ = pool2.run(collectives, mode, 7, False)
    done, *_ = pool2.run(collectives, mode, 7, True)
    gather, scatter = ("all_gather_into_tensor", HALF_OF_TOKENS), ("reduce_scatter_tensor", ALL_TOKENS)
    assert done == [gather, *(scatter if name == "all_reduce" else (name, size) for name, size in alone)]


@MODES
def test_no_row_no_exchange(pool2: Pool, mode) -> None:
    assert pool2.run(collectives, mode, 0, False) == [[], []]
