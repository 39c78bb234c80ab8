"""Every layout computes the numbers of one rank, through the real Megatron-Core, and the command says so."""

from __future__ import annotations

import json

import pytest

from mcore_rl.errors import LayoutError
from mcore_rl.verify.layouts import command
from mcore_rl.verify.layouts.command import ALGORITHMS, verify_layouts
from mcore_rl.verify.layouts.compare import LIMITS, SMALLEST_MOVEMENT
from mcore_rl.verify.layouts.worlds import Pools
from tests.e2e.ranks import Ranks
from tests.verify.conftest import SharedPools

REQUIRED = ("tp1", "tp2", "pp2", "dp2", "tp2pp2")
MODELS = ("ep2", "tp2ep2", "pp2:tied+overlap", "tp2:recompute")
PRODUCTS = ("tp2cp2+sp", "pp2cp2", "tp2dp2", "pp2dp2", "cp2dp2", "tp4", "pp4", "cp4", "tp2ep2dp2", "pp2ep2")


def assert_all_agree(worlds, layouts: tuple[str, ...], algorithms: tuple[str, ...]) -> None:
    results = verify_layouts(layouts, algorithms, worlds)
    rows = len(algorithms) + sum(name.startswith(("ppo", "hybrid")) for name in algorithms)  # critics
    assert len(results) == rows * len(layouts)
    assert [(e.layout, e.algorithm, e.largest) for e in results if e.exceeded] == []


def test_the_limits_are_those_promised() -> None:
    assert dict.fromkeys(LIMITS, 1e-5) | {"loss": 2e-6} == LIMITS
    assert SMALLEST_MOVEMENT == 1e-3


def test_the_main_layouts_agree_with_one_rank(worlds: SharedPools) -> None:
    assert_all_agree(worlds, REQUIRED, ("gspo",))


@pytest.mark.slow
def test_what_rules_leave_of_a_sequence(worlds: SharedPools) -> None:
    """Sums, means and maxima over a sequence of which a rank has a part, and a weight of mean 1."""
    assert_all_agree(worlds, ("cp2",), ("gspo-kept",))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_a_loss_may_read_beside_its_rows(worlds: SharedPools) -> None:
    """Means of its own, sums, and what was chosen of the whole rollout."""
    assert_all_agree(worlds, ("cp2", "dp2:overlap"), ("gmpo", "topr", "kl-cov", "fipo", "echo"))


@pytest.mark.slow
def test_ppo_and_its_critic(worlds: SharedPools) -> None:
    assert_all_agree(worlds, ("ep2",), ("ppo",))


@pytest.mark.slow
def test_ppo_whole_and_a_critic_of_prompts(worlds: SharedPools) -> None:
    """Four models that score one rollout, and what follows from it; over replicas, where all is spread."""
    assert_all_agree(worlds, ("dp2",), ("ppo-whole", "hybrid-grpo"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ppo_whole_where_sequences_and_layers_are_cut(worlds: SharedPools) -> None:
    assert_all_agree(worlds, ("tp2+sp", "cp2", "pp2+vpp2", "ep2"), ("ppo-whole",))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_with_all_algorithms(worlds: SharedPools) -> None:
    """Over replicas and the parts of a sequence: what an algorithm weights, sums and logs is spread there.

    Along the other axes a loss meets the rows of a micro-batch as on one rank, and only how it is asked can
    matter: GSPO's with whole sequences, PPO's row by row. The critic comes with PPO.
    `mcore-rl verify layouts --layouts all` has them all.
    """
    assert_all_agree(worlds, ("cp2", "dp2:overlap"), ALGORITHMS)
    assert_all_agree(worlds, ("tp2+sp", "pp2+vpp2"), ("gspo", "ppo"))
    assert_all_agree(worlds, ("tp2",), ("remax",))  # the steepest, whose errors of rounding grow


@pytest.mark.slow
def test_what_a_model_can_have_besides(worlds: SharedPools) -> None:
    assert_all_agree(worlds, MODELS, ("gspo",))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_products_on_four_ranks(worlds: SharedPools) -> None:
    assert_all_agree(worlds, PRODUCTS[::3], ("gspo", "ppo"))
    assert_all_agree(worlds, tuple(layout for layout in PRODUCTS if layout not in PRODUCTS[::3]), ("gspo",))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.xdist_group("ranks")
def test_eight_ranks() -> None:
    with Pools() as worlds:
        assert_all_agree(worlds, ("tp2pp2cp2",), ("gspo",))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_prompts_that_samples_share(worlds: SharedPools) -> None:
    """Against one rank that computes every prompt for every sample; rows by the head's both ways."""
    assert_all_agree(worlds, ("tp1:shared",), ("gspo", "ppo", "dpo", "jsd"))
    assert_all_agree(worlds, ("tp2+sp:shared", "pp2+vpp2:shared", "dp2:shared"), ("gspo", "ppo"))


@pytest.mark.slow
def test_pairs_of_answers(worlds: SharedPools) -> None:
    assert_all_agree(worlds, ("tp2+sp", "cp2", "dp2"), ("dpo",))


@pytest.mark.slow
def test_distillation_from_two_teachers(worlds: SharedPools) -> None:
    assert_all_agree(worlds, ("tp2+sp", "cp2", "dp2"), ("jsd",))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kind_of_distillation(worlds: SharedPools) -> None:
    """Where stages, experts or tied embeddings meet a teacher's states; `--layouts all` has the others."""
    assert_all_agree(worlds, ("dp2",), ("forward_kl", "sampled_kl"))
    assert_all_agree(worlds, ("pp2+vpp2", "ep2", "pp2:tied", "tp2cp2+sp"), ("reverse_kl",))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kind_without_rollouts(worlds: SharedPools) -> None:
    """Where sequences are spread, or micro-batches interleaved; `--layouts all` has the others."""
    assert_all_agree(worlds, ("cp2", "dp2"), ("sft", "ipo", "orpo", "kto", "reward_model"))
    assert_all_agree(worlds, ("pp2+vpp2", "ep2", "tp2cp2+sp", "pp2dp2"), ("dpo", "reward_model"))


# --- the command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "code"), [(1e-5, 0), (-1.0, 1)], ids=["agrees", "fails"])
@pytest.mark.slow
def test_the_last_line_is_one_object(
    worlds: SharedPools, monkeypatch, capsys, limit: float, code: int
) -> None:
    monkeypatch.setattr(command, "Pools", lambda: worlds)
    monkeypatch.setitem(LIMITS, "log_prob", limit)
    assert command.main(["tp2"], ["grpo"], as_json=True) == code
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    result = json.loads(line)
    assert (result["layouts"], result["failed"]) == (1, code)
    assert 0 < result["max_log_prob_error"] < 1e-5
    assert 0 < result["max_grad_error"] < 1e-5
    assert 0 <= result["max_loss_error"] < 2e-6
    assert [(row["layout"], row["algorithm"]) for row in result["rows"]] == [("tp2", "grpo")]
    assert ("FAILED: log_prob" in captured.err) == bool(code)


def test_too_few_ranks_are_said_before_anything_runs(worlds: SharedPools, monkeypatch) -> None:
    monkeypatch.setattr(worlds, "largest", 2, raising=False)
    monkeypatch.setattr(worlds, "run", None, raising=False)
    with pytest.raises(LayoutError, match="layout 'tp4' needs 4 ranks, torchrun started 2"):
        verify_layouts(("tp2", "tp4"), ("gspo",), worlds)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.xdist_group("e2e")  # whose worker has `ranks`
def test_under_torchrun_the_running_ranks_are_used(ranks: Ranks) -> None:
    start = "torchrun --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0 -m mcore_rl"
    verify = "verify layouts --layouts tp1,tp2 --algorithms gspo --json"
    done = ranks.launch(*start.split(), *verify.split(), GLOO_SOCKET_IFNAME="lo")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("{")]
    result = json.loads(line)
    assert (result["layouts"], result["failed"]) == (2, 0)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.xdist_group("e2e")  # whose worker has `ranks`
def test_a_layout_that_is_too_large_ends_all_ranks(ranks: Ranks) -> None:
    done = ranks.run("verify", "layouts", "--layouts", "tp4", "--algorithms", "gspo", world=2)
    assert done.returncode != 0
    assert "layout 'tp4' needs 4 ranks, torchrun started 2" in done.stderr
