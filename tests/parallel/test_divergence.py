"""The divergence of two heads against its dense float64 definition, on one rank and on two."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mcore_rl.algo.distillation import ForwardKL, JensenShannon, ReverseKL, sampled_reverse_kl
from mcore_rl.errors import ConfigError, LayoutError
from mcore_rl.parallel.head import Call
from mcore_rl.parallel.head import passes as head_passes
from mcore_rl.parallel.head.divergence import Teacher, divergence_loss, divergences
from mcore_rl.parallel.head.passes import Tiling
from mcore_rl.parallel.pool import Pool

KINDS = {"forward": ForwardKL(), "reverse": ReverseKL(), "jsd": JensenShannon(0.3)}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


class Problem(NamedTuple):
    hidden: Tensor
    """[R, H]"""
    weight: Tensor
    """[V, H]"""
    teacher: Teacher
    """[R, H'] and [V, H']"""
    coefficient: Tensor
    """[R] of each row's divergence in the loss"""
    cap: float | None = None


def problem(
    rows: int,
    vocab: int,
    scale: float,
    seed: int,
    caps: tuple[float | None, float | None] = (None, None),
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    teacher = Teacher(scale * normal(rows, 6), normal(vocab, 6), caps[1])
    return Problem(scale * normal(rows, 4), normal(vocab, 4), teacher, normal(rows), caps[0])


problems = st.builds(
    problem,
    rows=st.sampled_from([0, 1, 2, 7, 9]),
    vocab=st.integers(1, 23),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 10**6),
    caps=st.sampled_from([(None, None), (2.0, None), (None, 3.0), (2.0, 3.0)]),
)
tilings = st.builds(
    lambda tile, tiles, columns, apart: Tiling(tile, tile * tiles, columns, apart),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 30),
    st.booleans(),
)
TEMPERATURE = 0.7


def defined(kind: str, p: Tensor, q: Tensor) -> Tensor:
    """The definition, from probabilities [R, V]."""
    if kind == "forward":
        return (q * (q / p).log()).sum(-1)
    if kind == "reverse":
        return (p * (p / q).log()).sum(-1)
    mixture = 0.3 * q + 0.7 * p
    return 0.3 * (q * (q / mixture).log()).sum(-1) + 0.7 * (p * (p / mixture).log()).sum(-1)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def dense(case: Problem, kind: str) -> list[Tensor]:
    """Divergences, dL/dhidden and dL/dweight by autograd through the probabilities."""
    hidden, weight = (x.double().clone().requires_grad_() for x in case[:2])
    teacher = case.teacher
    student = (capped(hidden @ weight.T, case.cap) / TEMPERATURE).softmax(-1)
    of_teacher = capped(teacher.hidden.double() @ teacher.weight.double().T, teacher.cap)
    teacher = (of_teacher / TEMPERATURE).softmax(-1)
    value = defined(kind, student, teacher)
    return [value.detach(), *torch.autograd.grad((case.coefficient * value).sum(), (hidden, weight))]


def ours(case: Problem, kind: str, **options) -> list[Tensor]:
    """Compute the same, with a loss that is seen times 3."""
    hidden, weight = (x.clone().requires_grad_() for x in case[:2])
    targets = torch.zeros(len(case.coefficient), dtype=torch.int64)
    call = Call.of(weight, targets, TEMPERATURE, cap=case.cap, **options)
    seen: list[Tensor] = []

    def loss(rows: slice, value: Tensor) -> Tensor:
        assert rows.start == sum(map(len, seen))
        seen.append(value.detach())
        return (case.coefficient[rows] * value).sum()

    total = divergence_loss(hidden, weight, case.teacher, call, KINDS[kind], loss)
    assert (total.item(), seen) == (0, [])
    gradients = [gradient / 3 for gradient in torch.autograd.grad(3 * total, (hidden, weight))]
    alone = divergences(hidden, weight, case.teacher, call, KINDS[kind])
    torch.testing.assert_close(torch.cat(seen), alone, rtol=1e-6, atol=1e-12)
    return [torch.cat(seen), *gradients]


def max_abs(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * (1 + max_abs(other)))


def is_representable(case: Problem) -> bool:
    """No probability underflows, so that the definition itself has no NaN."""
    logits = [case.hidden @ case.weight.T, case.teacher.hidden @ case.teacher.weight.T]
    return all(max_abs(x) < 150 for x in logits)


@EVERY_KIND
@settings(max_examples=80, deadline=None)
@given(problems.filter(is_representable), tilings)
@pytest.mark.slow
def test_one_shard_equals_the_definition(kind: str, case: Problem, tiling: Tiling) -> None:
    expected = dense(case, kind)
    assume(
        all(one.isfinite().all() for one in expected)
    )  # its gradients overflow where the two are far apart
    assert_close(ours(case, kind, tiling=tiling), expected)


@EVERY_KIND
def test_far_apart_models_give_finite_numbers(kind: str) -> None:
    """Probabilities underflow, log-probs do not."""
    case = problem(9, 23, 1e3, seed=0)
    case = Problem(case.hidden.float(), case.weight.float(), Teacher(*(x.float() for x in case.teacher[:2])),
                   case.coefficient.float())  # fmt: skip
    assert all(bool(x.isfinite().all()) for x in ours(case, kind))


@EVERY_KIND
def test_a_student_that_is_its_teacher_has_divergence_and_gradient_zero(kind: str) -> None:
    case = problem(7, 11, 1.0, seed=0)
    same = case._replace(teacher=Teacher(case.hidden, case.weight))
    for found in ours(same, kind):
        assert max_abs(found) < 1e-14
    assert min(max_abs(found) for found in ours(case, kind)) > 1e-3


@EVERY_KIND
@pytest.mark.parametrize("rows", [1, 127])
def test_bf16_within_two_percent(kind: str, rows: int) -> None:
    """A CPU's GEMM rounds logits and gradients to bf16."""
    case = problem(rows, 1000, 0.3, seed=rows)
    case = Problem(*(x.bfloat16() for x in case[:2]), Teacher(*(x.bfloat16() for x in case.teacher[:2])),  # type: ignore[arg-type]
                   case.coefficient.float())  # fmt: skip
    got, expected = ours(case, kind, tiling=Tiling(16, 64, 300)), dense(case, kind)
    for one, other in zip(got, expected, strict=True):
        assert max_abs(one.double() - other) <= 2e-2 * max_abs(other)


def test_padding_takes_no_part() -> None:
    case = problem(5, 11, 1.0, seed=0)

    def padded(x: Tensor) -> Tensor:
        return torch.cat([x, torch.full((3, x.shape[1]), torch.inf, dtype=x.dtype)])

    teacher = Teacher(case.teacher.hidden, padded(case.teacher.weight))
    got = ours(case._replace(weight=padded(case.weight), teacher=teacher), "forward", vocab_size=11)
    assert not got[2][11:].any()
    assert_close([*got[:2], got[2][:11]], dense(case, "forward"))


def test_other_vocabularies_are_refused() -> None:
    case = problem(5, 11, 1.0, seed=0)
    with pytest.raises(LayoutError, match="lm_head has 10 rows on this rank and the student's 11"):
        ours(case._replace(teacher=Teacher(case.teacher.hidden, case.teacher.weight[:10])), "forward")


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, float("nan")])
def test_a_mixture_of_one_alone_is_refused(beta: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        JensenShannon(beta)


# --- cost -------------------------------------------------------------------------------------------------


def test_four_gemms_of_each_row_and_nothing_for_the_teachers_gradient(monkeypatch) -> None:
    """Multiplications: R V (3 H + H'), which a form that computes logits twice exceeds."""
    done: list[int] = []
    original = torch.mm

    def counted(a: Tensor, b: Tensor, *args, **kwargs) -> Tensor:
        done.append(a.shape[0] * a.shape[1] * b.shape[1])
        return original(a, b, *args, **kwargs)

    def added(accumulator: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
        done.append(dlogits.numel() * hidden.shape[1])
        accumulator.addmm_(dlogits.T, hidden)

    case = problem(9, 23, 1.0, seed=0)
    monkeypatch.setattr(torch, "mm", counted)
    monkeypatch.setattr(head_passes, "_add_product", added)
    weight = case.weight.clone().requires_grad_()
    call = Call.of(weight, torch.zeros(9, dtype=torch.int64), tiling=Tiling(2, 8, 5))
    hidden = case.hidden.clone().requires_grad_()
    divergence_loss(hidden, weight, case.teacher, call, ForwardKL(), lambda rows, x: x.sum()).backward()
    assert sum(done) == 9 * 23 * (3 * 4 + 6)


# --- two processes ----------------------------------------------------------------------------------------

CASES = [(rows, vocab) for rows in (0, 1, 7) for vocab in (1, 3, 8, 13)]
"""vocabularies of 1 and 3 leave the second shard of 2 rows empty, or half empty"""
TOKENS = 8
CAPS = (2.0, 3.0)


def picked(rows: int) -> Tensor:
    return torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))[:rows]


def shard_of(case: Problem, sequence_parallel: bool) -> Problem:
    """What this rank of two holds, NaN in the padding; hidden states of all tokens, or of its half."""
    rank, vocab = dist.get_rank(), len(case.weight)
    each = max(2, -(-vocab // 2))

    def rows_of(weight: Tensor) -> Tensor:
        padded = torch.full((2 * each, weight.shape[1]), torch.nan, dtype=weight.dtype)
        padded[:vocab] = weight
        return padded[rank * each : (rank + 1) * each]

    def placed(hidden: Tensor) -> Tensor:
        whole = torch.zeros(TOKENS, hidden.shape[1], dtype=hidden.dtype)
        whole[picked(len(hidden))] = hidden
        return whole.chunk(2)[rank] if sequence_parallel else whole

    teacher = Teacher(placed(case.teacher.hidden), rows_of(case.teacher.weight), case.teacher.cap)
    return Problem(placed(case.hidden), rows_of(case.weight), teacher, case.coefficient, case.cap)


def sharded(sequence_parallel: bool) -> list[list[Tensor]]:
    return [
        ours(
            shard_of(problem(rows, vocab, 3.0, rows + vocab, CAPS), sequence_parallel),
            kind,
            group=dist.group.WORLD,
            vocab_size=vocab,
            rows=picked(rows),
            tiling=Tiling(2, 4, 3),
            sequence_parallel=sequence_parallel,
        )
        for rows, vocab in CASES
        for kind in KINDS
    ]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_shards_equal_the_definition(pool2: Pool, sequence_parallel: bool) -> None:
    answers = iter(zip(*pool2.run(sharded, sequence_parallel), strict=True))
    for rows, vocab in CASES:
        for kind in KINDS:
            first, second = next(answers)
            case = problem(rows, vocab, 3.0, rows + vocab, CAPS)
            weight_gradient = torch.cat([first[2], second[2]])
            assert not weight_gradient[vocab:].any()
            whole = torch.cat([first[1], second[1]]) if sequence_parallel else first[1]
            got = [first[0], whole[picked(rows)], weight_gradient[:vocab]]
            assert_close(got, dense(case, kind))
            assert torch.equal(first[0], second[0])


def collectives(rows: int) -> list[str]:
    done: list[str] = []

    def recorded(name: str, of: Callable):
        return lambda *args, **kwargs: (done.append(name), of(*args, **kwargs))[1]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor"):
            patch.setattr(dist, name, recorded(name, getattr(dist, name)))
        mine = shard_of(problem(rows, 8, 1.0, seed=0), sequence_parallel=False)
        hidden, weight = (x.clone().requires_grad_() for x in mine[:2])
        call = Call.of(
            weight, torch.zeros(rows, dtype=torch.int64), group=dist.group.WORLD, rows=picked(rows),
            tiling=Tiling(4, 8, 8),
        )  # fmt: skip
        divergence_loss(hidden, weight, mine.teacher, call, ReverseKL(), lambda _, x: x.sum()).backward()
    return done


def test_two_collectives_a_wave_and_one_for_the_hidden_gradient(pool2: Pool) -> None:
    """Two models' logits are alive, so that a wave has half of the tiling's rows: 7 rows are 2 waves of 4."""
    expected = ["all_gather_into_tensor"] * 4 + ["all_reduce"]
    assert pool2.run(collectives, 7) == [expected] * 2
    assert pool2.run(collectives, 0) == [[]] * 2


def test_the_sampled_reverse_kl_is_the_exact_one_in_expectation() -> None:
    """Value and gradient, by enumeration of the tokens that a position can draw."""
    generator = torch.Generator().manual_seed(4)
    logits, other = (torch.randn(3, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(other, -1)
    exact = (log_p.exp() * (log_p - log_q)).sum(-1)
    drawn = sampled_reverse_kl(log_p, log_q)
    torch.testing.assert_close((log_p.exp().detach() * drawn).sum(-1), exact)
    wanted, got = (
        torch.autograd.grad(x.sum(), logits, retain_graph=True)[0]
        for x in (exact, log_p.exp().detach() * drawn)
    )
    torch.testing.assert_close(got, wanted)
    biased = torch.autograd.grad((log_p.exp().detach() * (log_p - log_q)).sum(), logits)[0]
    assert not torch.allclose(biased, wanted, atol=1e-3), "the control: k1 as a loss has no gradient"
