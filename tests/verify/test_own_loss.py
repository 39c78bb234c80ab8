"""A loss of the user's own: its gradient, what it declares, and every layout, by one command."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from mcore_rl.__main__ import build_parser
from mcore_rl.algo.algorithms import ALGORITHMS, configure
from mcore_rl.algo.rows import Rows, TokenLoss, marks, reads
from mcore_rl.errors import ConfigError, McoreRLError, NumericsError
from mcore_rl.parallel.head import HeadOutput
from mcore_rl.training.metrics import losses_are_finite, read
from mcore_rl.training.objective import PolicyObjective
from mcore_rl.verify.layouts import command
from mcore_rl.verify.layouts.differences import check_loss
from tests.losses.readings import likeliest, squared
from tests.training.test_objective import rows_of
from tests.verify.conftest import SharedPools

DPPO = "tests.losses.dppo:total_variation"


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_gradient_of_every_loss_is_that_of_its_value(name: str) -> None:
    check_loss(configure(name))


@pytest.mark.parametrize(
    "loss",
    [
        DPPO,
        *(f"tests.losses.{one}" for one in ("wrong:declared", "readings:damped", "readings:unlikely_alone")),
    ],
)
def test_a_loss_of_ones_own_that_keeps_the_contract_passes(loss: str) -> None:
    check_loss(configure("grpo", loss=loss))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("gradient", NumericsError, "by autograd and .* by finite differences"),
        ("mixed", NumericsError, r"the loss of row \d+ changes with the log_prob of row"),
        ("mixed_constant", NumericsError, "depends on which other rows it is asked with"),
        ("undeclared", ConfigError, r"reads rows.sequence_log_ratio without saying so; write @reads"),
        ("scalar", ConfigError, r"returned a tensor of shape \[\] as loss; return one value per row"),
        ("cut_off", ConfigError, "does not follow from rows.log_prob, so that nothing would be learnt"),
        ("without_metrics", ConfigError, "returned NoneType as metrics; return a dict"),
        ("valueless", ConfigError, "logs 'own/mean' with NoneType as values; give one per row"),
        ("nameless", ConfigError, "logs a metric named 3; name it with a string"),
        (
            "weights_for_bools",
            ConfigError,
            "logs 'own/mean' among torch.float64; say with bools which rows count",
        ),
        ("renumbered", ConfigError, "logs 'step', which every run logs; give it another name"),
        ("reward", ConfigError, "logs 'reward/mean', which every run logs; give it another name"),
        ("number", ConfigError, "the loss returned Tensor; return TokenLoss"),
        ("metric", ConfigError, r"logs 'own/mean' with a tensor of shape \[\] as values; give one per row"),
    ],
)
def test_a_loss_that_breaks_the_contract_is_seen(name: str, kind: type[McoreRLError], message: str) -> None:
    with pytest.raises(kind, match=message):
        check_loss(configure("grpo", loss=f"tests.losses.wrong:{name}"))


@pytest.mark.parametrize("fresh", [True, False], ids=["first mini-batch", "later"])
def test_an_undeclared_field_raises_in_training_too_from_the_first_mini_batch_on(fresh: bool) -> None:
    batch, log_prob = rows_of(None if fresh else torch.full((4,), -1.0))
    with pytest.raises(ConfigError, match="without saying so"):
        PolicyObjective(configure("grpo", loss="tests.losses.wrong:undeclared"), None)(
            batch, HeadOutput(log_prob, torch.ones(4))
        )


@pytest.mark.parametrize(("loss", "name"), [("known", "entropy"), ("hidden", "loss/scale")])
def test_a_metric_that_every_run_logs_has_its_name_to_itself(loss: str, name: str) -> None:
    batch, log_prob = rows_of(None)
    objective = PolicyObjective(configure("grpo", loss=f"tests.losses.wrong:{loss}"), None)
    with pytest.raises(ConfigError, match=f"'{name}', which every run logs; give it another name"):
        objective(batch, HeadOutput(log_prob, torch.ones(4)))[1]()


@pytest.mark.parametrize("broken", [False, True], ids=["its metric", "the policy"])
def test_only_the_loss_itself_must_be_finite_not_what_it_measures(broken: bool) -> None:
    batch, log_prob = rows_of(None)
    if broken:  # the control
        log_prob = torch.where(torch.arange(4) == 2, torch.nan, log_prob)
    objective = PolicyObjective(configure("grpo", loss="tests.losses.wrong:broken_total"), None)
    parts = objective(batch, HeadOutput(log_prob, torch.ones(4)))[1]()
    assert math.isnan(read(parts, 1)["own/total"])
    assert losses_are_finite([parts]) == (not broken)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("tests.losses.wrong", "not of the form `module:function`"),
        ("tests.losses.nowhere:f", r"algorithm\.loss: cannot import tests\.losses\.nowhere"),
        ("tests.losses.dppo:total_variatoin", "did you mean total_variation"),
        ("tests.losses.wrong:unset", r"algorithm\.params\.strength: the loss has no default for it; set it"),
        ("tests.losses.wrong:taken", "whiten is a parameter of every algorithm"),
    ],
)
def test_a_loss_that_cannot_be_used_is_a_mistake_of_the_config(loss: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure("grpo", loss=loss)


def test_its_keyword_only_parameters_are_the_algorithms() -> None:
    assert configure("grpo", {"delta": 1}, DPPO).loss_params == {"delta": 1.0}
    assert configure("dapo", {}, DPPO).loss_params == {"delta": 0.15}, "the entry's own are gone"
    assert configure("grpo", {"strength": 2}, "tests.losses.wrong:unset").loss_params == {"strength": 2.0}


@pytest.mark.parametrize("name", ["for_checkers", "called", "instance", "bound"])
def test_hints_that_cannot_be_resolved_and_losses_that_are_no_plain_functions_work(name: str) -> None:
    loss = f"tests.losses.unusual:{name}"
    assert configure("grpo", {"delta": 1}, loss).loss_params == {"delta": 1.0}
    assert configure("grpo", {}, loss).loss_params == {"delta": 0.5}
    with pytest.raises(ConfigError, match=r"algorithm\.params\.delta: 'x' is not a number"):
        configure("grpo", {"delta": "x"}, loss)
    check_loss(configure("grpo", loss=loss))


def test_a_hint_that_can_be_resolved_counts_beside_one_that_cannot() -> None:
    loss = "tests.losses.unusual:optional"
    assert configure("grpo", {"delta": 2}, loss).loss_params == {"delta": 2.0}
    assert configure("grpo", {}, loss).loss_params == {"delta": None}


def test_what_a_mean_or_a_mark_needs_must_be_a_parameter_of_the_loss() -> None:
    def loss(rows: Rows) -> TokenLoss:
        return TokenLoss(-rows.log_prob)

    for declare in (reads(distance=squared), marks(likeliest)):
        with pytest.raises(ConfigError, match="which is no parameter of the loss; add it there"):
            declare(loss)
    with pytest.raises(ConfigError, match="is a field of rows already"):
        reads(reference=squared)


def test_a_partial_reads_what_its_loss_declares() -> None:
    assert not configure("grpo", loss="tests.losses.unusual:partly").rowwise(on_policy=False)


@pytest.mark.parametrize("name", ["listed", "unknown", "nothing"])
def test_a_parameter_of_no_type_that_a_config_has_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.params\.delta: .* does not say that it is a number"):
        configure("grpo", loss=f"tests.losses.unusual:{name}")


def test_what_it_declares_decides_the_mode_of_the_head() -> None:
    whole = configure("grpo", loss="tests.losses.wrong:declared")
    assert not whole.rowwise(on_policy=False)
    assert configure("grpo", loss=DPPO).rowwise(on_policy=False)


@pytest.mark.slow
def test_one_command_proves_it_at_several_layouts(worlds: SharedPools, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "Pools", lambda: worlds)
    given = build_parser().parse_args(["verify", "layouts", "--layouts", "tp2,cp2", "--loss", DPPO, "--json"])
    assert given.command(given, []) == 0
    said = capsys.readouterr()
    assert re.search(r"^finite differences +total_variation +48 rows .* limit 1e-06  ok$", said.err, re.M)
    result = json.loads(said.out.splitlines()[-1])
    assert (result["layouts"], result["failed"]) == (2, 0)
    assert 0 < result["max_grad_error"] < 1e-5
    assert {row["algorithm"] for row in result["rows"]} == {"total_variation"}, "not that of the algorithm"
