"""Samples of several segments on their way to the loss, against the oracle and token by token."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from mcore_rl.algo.algorithms import Algorithm, configure
from mcore_rl.parallel.head import HeadOutput
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rollout.columns import pack_groups, unpack_groups
from mcore_rl.training import batch as batches
from mcore_rl.training.advantage import Scores, compute_advantages
from mcore_rl.training.batch import Batching, RolloutBatch, build_batch, by_segment, pack_mini_batch
from mcore_rl.training.objective import PolicyObjective
from mcore_rl.types import Group, PackedBatch, Prompt, Sample, Segment, VersionSpan
from tests.sources import ROOT

GOLDEN = np.load(ROOT / "tests" / "golden" / "trajectories.npz")
OWNER, VOID, MASK = GOLDEN["segment_rollout"], GOLDEN["rollout_void"], GOLDEN["mask"] > 0
ALIVE = np.flatnonzero(~VOID)
"""rollouts, in the order of their samples in the batch"""


def prompt(group: int) -> Prompt:
    return Prompt(f"p{group}", "", (1, 2, 3), "")


def segment(s: int, of: Prompt) -> Segment:
    """A segment of the oracle: all of its positions follow the prompt."""
    length, trained = int(GOLDEN["lengths"][s]), MASK[s]
    spans = (VersionSpan("0", 0, int(trained.sum())),)
    tokens, log_probs = GOLDEN["y"][s, :length].astype(np.int32), GOLDEN["old_logp"][s][trained]
    return Segment(of.token_array, tokens, log_probs.astype(np.float32), spans, trained[:length])


def oracle() -> list[Group]:
    """The rollouts of trajectories.npz; their ids keep their order."""
    groups: dict[int, list[Sample]] = {}
    for r, g in enumerate(GOLDEN["rollout_group"].tolist()):
        of = prompt(g)
        segments = tuple(segment(s, of) for s in np.flatnonzero(r == OWNER))
        reward, void = float(GOLDEN["rollout_reward"][r]), bool(VOID[r])
        groups.setdefault(g, []).append(Sample(f"r{r:02}", of, segments, "", "stop", reward, void))
    return [Group(f"g{g}", tuple(samples)) for g, samples in groups.items()]


def by_rollout(name: str) -> list[np.ndarray]:
    """[N] of [m_i]: an array [S, T] of the oracle at the trained tokens of the rollouts that are alive."""
    return [np.concatenate([GOLDEN[name][s][MASK[s]] for s in np.flatnonzero(r == OWNER)]) for r in ALIVE]


def packed(batch: RolloutBatch, algorithm: Algorithm, replicas: int = 1, **fields: Any) -> list[PackedBatch]:
    """The micro-batches of all replicas, the whole batch in one mini-batch."""
    shape = Batching(1, 32, int(GOLDEN["L_max"]), lambda lengths: np.asarray(lengths, float), align=1)
    everyone = np.arange(len(batch.samples))
    return [
        micro_batch
        for rank in range(replicas)
        for micro_batch in pack_mini_batch(
            batch,
            everyone,
            algorithm,
            shape,
            cast(Mesh, SimpleNamespace(layout=Layout(data=replicas), dp_rank=rank)),
            fields,
        )
    ]


@pytest.mark.parametrize(
    ("name", "case", "params"),
    [
        ("grpo", "grpo", {}),
        ("drgrpo", "mean_only", {}),
        ("rloo", "rloo", {}),
        ("liteppo", "liteppo", {}),
    ],
)
def test_advantages_are_the_oracles(name: str, case: str, params: dict) -> None:
    found = compute_advantages(build_batch(oracle()), configure(name, params)).fields["advantage"]
    wanted = GOLDEN[f"adv/{case}"]
    assert np.abs(np.array(found) - wanted[ALIVE]).max() <= 1e-12 * np.abs(wanted).max()
    assert not wanted[VOID].any()


def test_gae_runs_over_trained_tokens_segment_after_segment() -> None:
    given = Scores(dict(enumerate(by_rollout("old_logp"))), by_rollout("ref_logp"), by_rollout("values"))
    algorithm = configure("ppo", {"gamma": float(GOLDEN["gamma"]), "lam": float(GOLDEN["lam"])})
    algorithm = replace(algorithm, kl_in_reward=float(GOLDEN["kl_coef"]), whiten=True)
    fields = compute_advantages(build_batch(oracle()), algorithm, given).fields
    for field, name in (("advantage", "gae/whitened"), ("return", "gae/returns")):
        wanted = np.concatenate(by_rollout(name))
        assert np.abs(np.concatenate(list(fields[field])) - wanted).max() <= 1e-12 * np.abs(wanted).max()


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize(
    "aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
)
def test_a_token_is_trained_once_with_the_oracles_weight(aggregation: str, replicas: int) -> None:
    batch = build_batch(oracle())
    ends = np.cumsum([sample.trained_tokens for sample in batch.samples])
    marks = np.split(np.arange(float(ends[-1])), ends[:-1])
    algorithm = configure("grpo", {"aggregation": aggregation})
    micro_batches = packed(batch, algorithm, replicas, mark=marks)
    weight = {
        int(mark): float(value)
        for one in micro_batches
        for mark, value in zip(one.fields["mark"], one.fields["weight"], strict=True)
    }
    rows = sum(one.rows.numel() for one in micro_batches)
    assert rows == len(weight) == sum(map(len, marks)) == int(GOLDEN["n_tokens"])
    wanted = np.concatenate(by_rollout(f"weight/{aggregation}"))
    found = np.array([weight[mark] for mark in range(rows)])
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    if replicas > 1:
        segments = {(int(s), i) for i, one in enumerate(micro_batches) for s in one.fields["sample"]}
        assert len(segments) > len({sample for sample, _ in segments}), "one sample in several micro-batches"


def test_a_void_sample_is_as_one_that_was_never_sampled() -> None:
    groups = oracle()
    without = [replace(g, samples=tuple(s for s in g.samples if not s.void)) for g in groups]
    with_void, never = build_batch(groups), build_batch(without)
    assert (with_void.samples, with_void.group_ids) == (never.samples, never.group_ids)
    assert (with_void.void, never.void) == (int(VOID.sum()), 0)


def random_trajectory(rng: np.random.Generator, number: int) -> tuple[Sample, list[int]]:
    """Turns of sampled tokens and observations; now and then the context is cut. And what was sampled."""
    of = Prompt(f"p{number}", "", tuple(rng.integers(100, size=rng.integers(1, 5)).tolist()), "")
    segments, sent, context, seen = [], [], of.token_array, []
    for turn in range(int(rng.integers(1, 5))):
        sampled = rng.integers(100, 200, size=rng.integers(0, 6))
        observed = rng.integers(200, 300, size=rng.integers(0, 4))
        seen.append((sampled, observed))
        sent += sampled.tolist()
        if turn and rng.random() < 0.4:
            segments.append(_closed(context, seen))
            context, seen = rng.integers(100, size=3).astype(np.int32), []
    segments.append(_closed(context, seen))
    return Sample(f"s{number:04}", of, tuple(segments), "", "stop", float(rng.random())), sent


def _closed(context: np.ndarray, turns: list[tuple[np.ndarray, np.ndarray]]) -> Segment:
    pieces = [(part, kind == 0) for turn in turns for kind, part in enumerate(turn)]
    tokens = np.concatenate([np.zeros(0, np.int32), *(part for part, _ in pieces)]).astype(np.int32)
    trained = np.concatenate([np.zeros(0, bool), *(np.full(len(part), its) for part, its in pieces)])
    count = int(trained.sum())
    spans = (VersionSpan("7", 0, count),)
    return Segment(context, tokens, -np.arange(count, dtype=np.float32), spans, trained)


def test_of_1000_random_trajectories_what_was_sampled_is_what_is_trained() -> None:
    rng = np.random.default_rng(0)
    made = [random_trajectory(rng, number) for number in range(1000)]
    groups = [Group(f"g{number}", (sample,)) for number, (sample, _) in enumerate(made)]
    got = unpack_groups(pack_groups(groups), {sample.prompt.id: sample.prompt for sample, _ in made})
    batch = build_batch(got)
    places = [np.arange(sample.trained_tokens) for sample in batch.samples]
    trained: dict[int, list[tuple[int, int]]] = {}
    for one in packed(batch, configure("grpo"), position=places):
        assert not ((one.targets >= 200) | (one.targets < 100)).any(), "an observation, or a context"
        rows = zip(one.fields["sample"], one.fields["position"], one.targets, strict=True)
        for sample, place, token in rows:
            trained.setdefault(int(sample), []).append((int(place), int(token)))
    for number, (_, sent) in enumerate(made):
        assert [token for _, token in sorted(trained.get(number, []))] == sent


def test_the_loss_has_no_gradient_where_an_observation_is_predicted() -> None:
    rng = np.random.default_rng(5)
    samples = [random_trajectory(rng, number)[0] for number in range(30)]
    batch = build_batch([Group(f"g{number}", (sample,)) for number, sample in enumerate(samples)])
    old = [np.full(sample.trained_tokens, -6.0) for sample in batch.samples]
    ones = [np.ones(sample.trained_tokens) for sample in batch.samples]
    objective = PolicyObjective(configure("grpo", {"entropy_coef": 0.1}), None)
    for one in packed(batch, objective.algorithm, advantage=ones, old_log_prob=old):
        logits = torch.randn(
            len(one.tokens), 300, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()
        scored = logits.log_softmax(-1)[one.rows]
        entropy = -(scored.exp() * scored).sum(-1)
        loss, _ = objective(one, HeadOutput(scored[torch.arange(len(one.rows)), one.targets], entropy))
        (gradient,) = torch.autograd.grad(loss, logits)
        following = torch.cat([one.tokens[1:], torch.zeros(1, dtype=torch.int64)])
        starts = torch.zeros(len(one.tokens), dtype=torch.bool)
        starts[one.cu_seqlens[1:].long() - 1] = True  # what follows there is another sequence
        trained = (following >= 100) & (following < 200) & ~starts
        moved = gradient.abs().sum(-1)
        assert (moved[trained] > 0).all()
        assert (moved[~trained] == 0).all()


def routed(ids: np.ndarray) -> np.ndarray:
    """[n, 1, 2] two experts of each token, which its id gives."""
    return (np.asarray(ids)[:, None, None] % 100 + np.arange(2)).astype(np.uint8)


def with_experts(one: Sample) -> Sample:
    of = [replace(s, experts=routed(np.concatenate([s.context, s.token_ids])[:-1])) for s in one.segments]
    return replace(one, segments=tuple(of))


def test_every_token_of_a_trajectory_has_its_own_experts() -> None:
    """Observations and contexts too, in every segment, whatever else is packed beside it."""
    rng = np.random.default_rng(4)
    made = [random_trajectory(rng, number)[0] for number in range(50)]
    samples = [with_experts(one) if number % 3 else one for number, one in enumerate(made)]
    groups = [Group(one.prompt.id, (one,)) for one in samples]
    got = unpack_groups(pack_groups(groups), {one.prompt.id: one.prompt for one in samples})
    replayed = 0
    for micro_batch in packed(build_batch(got), configure("grpo"), replicas=2):
        assert micro_batch.experts is not None
        known = micro_batch.experts[:, 0, 0] >= 0
        wanted = torch.from_numpy(routed(micro_batch.tokens.numpy()).astype(np.int16))
        assert torch.equal(micro_batch.experts[known], wanted[known])
        replayed += int(known.sum())
    segments = [segment for one in samples for segment in one.segments]
    assert replayed == sum(len(segment.experts) for segment in segments if segment.experts is not None)


def test_trajectories_come_back_from_other_ranks() -> None:
    rng = np.random.default_rng(1)
    samples = [random_trajectory(rng, number)[0] for number in range(20)]
    samples[3] = replace(samples[3], void=True, reward=None)
    samples[4] = replace(samples[4], segments=(), void=True, reward=None)
    groups = [Group(f"g{i}", (sample,)) for i, sample in enumerate(samples)]
    got = unpack_groups(pack_groups(groups), {sample.prompt.id: sample.prompt for sample in samples})
    for group, one in zip(got, samples, strict=True):
        (back,) = group.samples
        assert (back.id, back.reward, back.void) == (one.id, one.reward, one.void)
        assert len(back.segments) == len(one.segments)
        for a, b in zip(back.segments, one.segments, strict=True):
            assert a.versions == b.versions
            assert np.array_equal(a.context, b.context)
            assert np.array_equal(a.token_ids, b.token_ids)
            assert np.array_equal(a.log_probs, b.log_probs)
            mask = np.ones(len(b.token_ids), bool) if b.trained is None else b.trained
            assert np.array_equal(mask if a.trained is None else a.trained, mask)


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_sample_joins_of_its_segments_is_read_only(count: int) -> None:
    rng = np.random.default_rng(3)
    made = (random_trajectory(rng, number)[0] for number in range(100))
    sample = next(one for one in made if len(one.segments) == count and one.trained_tokens)
    for array in (sample.token_ids, sample.log_probs):
        assert len(array) == sample.trained_tokens
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


# --- a wrong trainer --------------------------------------------------------------------------------------


def test_a_rollout_that_counted_once_per_segment_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = batches.aggregation_weight
    more = lambda *args, **numbers: real(*args, **{**numbers, "sequences": len(OWNER)})  # noqa: E731
    monkeypatch.setattr(batches, "aggregation_weight", more)
    with pytest.raises(AssertionError):
        test_a_token_is_trained_once_with_the_oracles_weight("seq-mean-token-mean", 1)


def test_observations_that_were_trained_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        batches,
        "token_sequences",
        lambda samples: [
            batches.TokenSequence(s.context, s.token_ids) for sample in samples for s in sample.segments
        ],
    )
    with pytest.raises(Exception, match="scored tokens"):
        test_of_1000_random_trajectories_what_was_sampled_is_what_is_trained()


def test_a_void_sample_that_counted_would_be_seen() -> None:
    groups = [replace(g, samples=tuple(replace(s, void=False) for s in g.samples)) for g in oracle()]
    found = compute_advantages(build_batch(groups), configure("grpo")).fields["advantage"]
    assert np.abs(np.array(found)[ALIVE] - GOLDEN["adv/grpo"][ALIVE]).max() > 1e-3


def test_a_number_per_sample_and_numbers_per_token_reach_their_segments() -> None:
    rng = np.random.default_rng(2)
    samples = [random_trajectory(rng, number)[0] for number in range(5)]
    lengths = [[len(s.log_probs) for s in sample.segments] for sample in samples]
    assert by_segment([3.0] * 5, samples) == [3.0] * sum(map(len, lengths))
    parts = by_segment([np.arange(sum(its)) for its in lengths], samples)
    assert [len(part) for part in parts] == [length for its in lengths for length in its]
