"""Truncated responses out of the loss: in their group's statistics, in no row and in no count of tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from mcore_rl.algo.algorithms import configure
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.training.advantage import compute_advantages
from mcore_rl.training.batch import Batching, build_batch, pack_mini_batch
from mcore_rl.training.metrics import sample_metrics
from mcore_rl.training.recorder import Recorder
from mcore_rl.types import Group, PackedBatch, Prompt, Sample, VersionSpan

LENGTHS, REWARDS, REASONS = (2, 3, 5, 4), (1.0, 0.0, 0.0, 1.0), ("stop", "stop", "length", "length")
PROMPT = Prompt("p", "", (1, 2), "")


def sample(number: int, reason: str) -> Sample:
    tokens = LENGTHS[number]
    ids, log_probs, span = (10 * number,) * tokens, (-1.0,) * tokens, VersionSpan("0", 0, tokens)
    return Sample.of_response(f"p@1/{number}", PROMPT, ids, log_probs, "", reason, (span,), REWARDS[number])


def packed(name: str, reasons: tuple[str, ...], *, overlong_filter: bool) -> PackedBatch:
    """One micro-batch of the group on one rank."""
    batch = build_batch([Group("p@1", tuple(sample(i, reason) for i, reason in enumerate(reasons)))])
    algorithm = configure(name, {}, None)
    advantage = compute_advantages(batch, algorithm).fields["advantage"]
    shape = Batching(1, 64, 5, lambda n: np.asarray(n, float), 1, overlong_filter=overlong_filter)
    mesh = cast(Mesh, SimpleNamespace(layout=Layout(), dp_rank=0))
    fields = {"advantage": advantage, **Recorder(batch.samples).fields}
    (made,) = pack_mini_batch(batch, np.arange(len(reasons)), algorithm, shape, mesh, fields)
    return made


@pytest.mark.parametrize(
    ("name", "weights"),
    [("dapo", {0: 1 / 5, 1: 1 / 5}), ("grpo", {0: 1 / 8, 1: 1 / 12}), ("drgrpo", {0: 1 / 20, 1: 1 / 20})],
)
def test_they_have_no_row_and_the_others_keep_advantage_and_weight(name: str, weights: dict) -> None:
    """Tokens are counted without them, samples with them: a mean over samples does not weigh up the rest."""
    made, whole = (packed(name, REASONS, overlong_filter=on) for on in (True, False))
    everyone = build_batch([Group("p@1", tuple(sample(i, reason) for i, reason in enumerate(REASONS)))])
    assert sample_metrics(everyone, 4)["truncated"] == 0.5, "they are counted"
    assert sorted(set(made.fields["sample"].tolist())) == [0, 1]
    assert len(made.rows) == sum(LENGTHS[:2])
    assert len(whole.rows) == sum(LENGTHS), "the control"
    for number, weight in weights.items():
        mine, before = (one.fields["sample"] == number for one in (made, whole))
        torch.testing.assert_close(made.fields["weight"][mine], torch.full((LENGTHS[number],), weight))
        assert torch.equal(made.fields["advantage"][mine], whole.fields["advantage"][before])
    if name != "dapo":
        kept = whole.fields["sample"] < 2
        assert torch.equal(made.fields["weight"].sort().values, whole.fields["weight"][kept].sort().values)


def test_a_mini_batch_of_truncated_responses_alone_has_no_row() -> None:
    made = packed("dapo", ("length",) * 4, overlong_filter=True)
    assert len(made.rows) == 0
    assert len(made.fields["weight"]) == 0
    Recorder([sample(0, "length")]).keep(made, torch.zeros(0))  # a step that is dumped has nothing to keep
