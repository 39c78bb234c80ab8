"""Dumps that a run cannot train on, and what it says of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mcore_rl.dumps.directory import read_step
from mcore_rl.dumps.rollouts import RolloutDump
from mcore_rl.errors import ConfigError, DataError
from mcore_rl.training.batch import Batching
from mcore_rl.training.check_dump import Trainable, check_dump
from tests.dumps.support import WORDS, step_of_run, write

PLACE = Path("step_4.npz")
SHAPE = Batching(1, 64, 8, lambda lengths: np.asarray(lengths, float), align=1)
FIT = Trainable(
    vocabulary=300,
    positions=(64, "the model"),
    shape=SHAPE,
    temperature=0.5,
    max_staleness=3,
    experts=None,
    piece=WORDS.piece,
)


@pytest.fixture
def dump(tmp_path: Path) -> RolloutDump:
    """Of step 4; its versions are 2, 3 and 7, of which a step 8 is late enough."""
    return replace(read_step(write(tmp_path, 4, step_of_run()), 4), step=8)


def longest(dump: RolloutDump) -> int:
    alive = (s for group in dump.groups for s in group.samples if not s.void)
    return max(len(x.context) + len(x.token_ids) for s in alive for x in s.segments)


def test_the_limits_themselves_are_trained(dump: RolloutDump) -> None:
    fit = replace(FIT, max_staleness=5, positions=(longest(dump), "critic.path"))
    check_dump(dump, replace(fit, shape=replace(SHAPE, tokens_per_micro_batch=longest(dump))), PLACE)


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"vocabulary": 200}, DataError, "is none of the model's 200"),
        ({"temperature": 1.0}, ConfigError, "was sampled at temperature 0.5"),
        ({"max_staleness": 4}, ConfigError, "5 versions older"),
        ({"piece": str}, DataError, "to the tokenizer that it was sampled with"),
    ],
)
def test_what_would_mean_something_else_here_is_refused(
    dump: RolloutDump, changes: dict, kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        check_dump(dump, replace(FIT, **{"max_staleness": 5, **changes}), PLACE)


@pytest.mark.parametrize("align", [1, 8])
def test_a_segment_longer_than_a_micro_batch_is_refused_by_its_name(dump: RolloutDump, align: int) -> None:
    needed = -(-longest(dump) // align) * align
    fit = replace(FIT, max_staleness=5)
    check_dump(dump, replace(fit, shape=replace(SHAPE, align=align, tokens_per_micro_batch=needed)), PLACE)
    short = replace(SHAPE, align=align, tokens_per_micro_batch=needed - 1)
    with pytest.raises(ConfigError, match=rf"step_4.npz: sample '.*@4/.*per_micro_batch = {needed}, not"):
        check_dump(dump, replace(fit, shape=short), PLACE)


def test_a_segment_beyond_the_positions_of_the_model_is_refused(dump: RolloutDump) -> None:
    with pytest.raises(DataError, match="positions; sample it anew"):
        check_dump(dump, replace(FIT, max_staleness=5, positions=(longest(dump) - 1, "critic.path")), PLACE)
