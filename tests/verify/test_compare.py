"""The yardstick of `verify layouts`: what counts as an error, and that the recorded problem can show one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mcore_rl.errors import ConfigError, LayoutError, NumericsError
from mcore_rl.parallel.layout import Layout
from mcore_rl.verify.layouts import problem
from mcore_rl.verify.layouts.case import ALL, SMALL, Case
from mcore_rl.verify.layouts.compare import Errors, compare, parameter_error, relative_error, summary
from mcore_rl.verify.layouts.measure import Measured

TENSORS = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([1e-9])}


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 0.0),
        ({"a": torch.tensor([1.0, -4.4])}, 0.1),
        ({"b": torch.tensor([1e-9 + 4e-8])}, 0.01),  # relative to 1e-6 of the largest of all, not to itself
        ({"a": torch.tensor([1.0, math.nan])}, math.inf),
        ({"b": torch.tensor([math.inf])}, math.inf),
    ],
)
def test_relative_error(change: dict, expected: float) -> None:
    assert relative_error(TENSORS | change, TENSORS, floor=1e-6) == pytest.approx(expected, rel=1e-3)


def test_a_missing_tensor_is_an_error() -> None:
    assert relative_error({"a": TENSORS["a"]}, TENSORS, floor=1e-6) == math.inf
    assert relative_error(TENSORS, {"a": TENSORS["a"]}, floor=1e-6) == math.inf


@pytest.mark.parametrize(("got", "expected"), [(0.0, 0.0), (1.0, math.inf)])
def test_a_tensor_of_zeros_must_stay_zero(got: float, expected: float) -> None:
    zeros = {"a": torch.zeros(2), "b": torch.ones(1)}
    assert relative_error({**zeros, "a": torch.tensor([got, 0.0])}, zeros, floor=0.0) == expected


def measured(**changes) -> Measured:
    ones = {"w": torch.ones(3)}
    plain = Measured(
        1.0, 2.0, {"tokens": torch.tensor(7.0)}, {"log_prob": torch.zeros(4)}, ones, ones, ones, ones
    )
    return replace(plain, start={"w": torch.zeros(3)}, **changes)


@pytest.mark.parametrize(
    ("changes", "exceeded"),
    [
        ({}, []),
        ({"loss": 1.0 + 1e-5}, ["loss"]),
        ({"loss": math.nan}, ["loss"]),
        ({"scores": {"log_prob": torch.tensor([0.0, 0.0, 0.0, 2e-5])}}, ["log_prob"]),
        ({"scores": {"log_prob": torch.tensor([0.0, 0.0, 0.0, math.nan])}}, ["log_prob"]),
        ({"gradients": {"w": torch.tensor([1.0, 1.0, 1.0 + 2e-5])}}, ["gradient"]),
        ({"exp_avg": {"w": torch.tensor([1.0, 1.0, 1.0 + 2e-5])}}, ["exp_avg"]),
        ({"parameters": {"w": torch.tensor([1.0, 1.0, 1.0 + 2e-5])}}, ["parameter"]),
        ({"metrics": {"tokens": torch.tensor(8.0)}}, ["metric"]),
    ],
)
def test_compare(changes: dict, exceeded: list[str]) -> None:
    assert compare("tp2", "gspo", measured(**changes), measured()).exceeded == exceeded


def test_parameters_that_hardly_moved_prove_nothing() -> None:
    still = measured(parameters={"w": torch.full((3,), 5e-4)})
    assert parameter_error(still, still) == math.inf


def test_summary_counts_layouts_not_rows() -> None:
    good = {"loss": 1e-7, "log_prob": 1e-6, "gradient": 2e-6}
    bad = good | {"gradient": 1.0}
    rows = [Errors("tp2", "gspo", good), Errors("pp2", "gspo", bad), Errors("pp2", "grpo", bad)]
    result = summary(("tp2", "pp2"), rows)
    assert (result["layouts"], result["failed"], result["max_grad_error"]) == (2, 1, 1.0)


# --- cases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "case"),
    [
        ("tp2", Case(Layout(tensor=2))),
        ("ep2", Case(Layout(expert=2, data=2), "moe")),
        ("dp2:moe+overlap", Case(Layout(data=2), "moe", overlap=True)),
        ("pp2:tied", Case(Layout(pipeline=2), "tied")),
        ("tp2+sp:recompute", Case(Layout(tensor=2, sequence=True), recompute="full")),
        ("tp2:recompute-attention", Case(Layout(tensor=2), recompute="selective")),
        ("dp2:shared", Case(Layout(data=2), share_prompts=True)),
    ],
)
def test_cases(text: str, case: Case) -> None:
    assert Case.parse(text) == case


@pytest.mark.parametrize("text", ["", "tp2:", ":tied", "tp2:tyed", "tp2:tied+", "qp2"])
def test_what_cannot_be_read(text: str) -> None:
    with pytest.raises(LayoutError):
        Case.parse(text)


def test_the_lists_can_be_read_and_fit_four_processes() -> None:
    assert max(Case.parse(text).layout.world_size for text in (*ALL, *SMALL)) == 4
    assert set(SMALL) <= set(ALL)
    assert len(set(ALL)) == len(ALL)


# --- the problem ------------------------------------------------------------------------------------------


def own_log_probs() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    samples = problem.build_batch(problem.recorded_groups()).samples
    return [-3 - rng.random(len(sample.token_ids)).astype(np.float32) for sample in samples]


@pytest.mark.parametrize("name", ["ppo", "grpo", "gspo", "sapo", "liteppo", "passk", "passk-best"])
def test_ratios_leave_one_and_both_clips_act(name: str) -> None:
    own = own_log_probs()
    problem.check(problem.record(name, own), own)


@pytest.mark.parametrize("name", ["grpo", "gspo", "sapo"])
def test_data_without_ratios_are_refused(name: str) -> None:
    own = own_log_probs()
    recorded = problem.record(name, own)
    on_policy = replace(recorded, fields={**recorded.fields, "old_log_prob": own})
    with pytest.raises(NumericsError, match=r"ratios from 1\.000 to 1\.000"):
        problem.check(on_policy, own)


def test_data_clipped_on_one_side_only_are_refused() -> None:
    own = own_log_probs()
    recorded = problem.record("grpo", own)
    positive = replace(recorded, fields={**recorded.fields, "advantage": [1.0] * len(own)})
    with pytest.raises(NumericsError, match="clipped below 1: False, above 1: True"):
        problem.check(positive, own)


def test_an_unknown_algorithm_is_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gspo'"):
        problem.record("gsop", own_log_probs())
