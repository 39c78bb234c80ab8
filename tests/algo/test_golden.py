"""Every golden case passes, on one rank and through the vocab-parallel head on two; a wrong library fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcore_rl.algo import advantages, algorithms, losses, preference
from mcore_rl.algo.rows import TokenLoss
from mcore_rl.errors import ConfigError, DataError
from mcore_rl.parallel.head import head
from mcore_rl.parallel.pool import Pool
from mcore_rl.verify.golden import Report, main, verify_golden
from mcore_rl.verify.golden.command import DIFFERENTIATED, INPUTS, _run_rank, run_cases
from mcore_rl.verify.golden.entries import NAMES
from mcore_rl.verify.golden.inputs import load
from mcore_rl.verify.golden.trajectories import Trajectories
from tests.algo import entries

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
CASES = 143


def failed(report: Report) -> set[str]:
    return {case.name for case in report.failed}


def test_every_case_passes_on_one_rank() -> None:
    report = verify_golden(GOLDEN)
    assert len(report.cases) == CASES
    assert failed(report) == set()
    plain = {"float64", "float32"}
    for case in report.cases:
        fused = {"float64 fused", "float32 fused"} if case.name.split("/")[0] in DIFFERENTIATED else set()
        assert set(case.errors) == plain | fused, case.name
    assert report.max_error < 2e-5


@pytest.mark.slow
def test_every_case_passes_on_two_tensor_parallel_ranks(pool2: Pool) -> None:
    for report in pool2.run(_run_rank, str(GOLDEN)):
        assert len(report.cases) == CASES
        assert failed(report) == set()


@pytest.mark.slow
def test_the_command_starts_its_ranks_and_ends_with_json(
    few: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(few), "--tp", "2", "--json"]) == 0
    out, err = capfd.readouterr()
    (line,) = out.splitlines()
    summary = json.loads(line)
    assert (summary["cases"], summary["failed"]) == (len(FEW), 0)
    assert summary["max_error"] < 2e-5
    assert "ok      policy_losses/gspo: float64 loss" in err


def only(*cases: str) -> dict[str, dict[str, np.ndarray]]:
    """The golden files with all inputs and some cases."""
    prefixes = tuple(f"{case}/" for case in cases)
    return {
        stem: {
            key: array
            for key, array in arrays.items()
            if key in INPUTS.get(stem, ()) or f"{stem}/{key}/".startswith(prefixes)
        }
        for stem, arrays in load(GOLDEN).items()
    }


FEW = (
    *("policy_losses/gspo", "policy_losses/grpo_token-mean", "policy_losses/sapo", "policy_losses/dapo"),
    *("preference/orpo", "preference/rm_bt", "preference/dpo"),
    *("kl_entropy/k3_iw", "layout/sft_estimate", "advantages/grpo_ddof0_eps1e-4"),
)
"""what a wrong directory is made of, and what is sound beside it"""


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A golden directory with few cases, free to be spoilt."""
    directory = tmp_path / "few"
    directory.mkdir()
    for stem, arrays in only(*FEW).items():
        np.savez(directory / f"{stem}.npz", **arrays)
    return directory


# --- a wrong library --------------------------------------------------------------------------------------


def with_(function: Callable, **changes: Any) -> Callable:
    """`function`, some keyword arguments overruled."""
    return lambda *args, **kwargs: function(*args, **{**kwargs, **changes})


def std_over_n(spread, ddof):
    return (spread.sum_squares / spread.size) ** 0.5


def clip_both_sides(log_r, advantage, eps_low, eps_high, dual_clip=None):
    used = log_r.exp().clamp(1 - eps_low, 1 + eps_high)
    return TokenLoss(-advantage * used)


def unmoved_old(rows, *, eps_high):
    """REINFORCE's gradient under another name."""
    return losses.reinforce(rows)


def token_ratio(rows, *, eps_low, eps_high):
    return losses.ppo(rows, eps_low=eps_low, eps_high=eps_high)


def mean_kept(values, tokens, *, whiten=advantages.whiten):
    return whiten(values, tokens) + tokens.mean


def leak_across_sequences(rewards, values, offsets, *, gamma=1.0, lam=0.95):
    following = torch.cat([values[1:], values.new_zeros(1)])
    delta = (rewards + gamma * following - values).double()
    return delta, delta + values


def forget_half(*args, clip, value_loss=losses.value_loss):
    loss = value_loss(*args, clip=clip)
    return loss._replace(loss=2 * loss.loss)


def one_tau(rows, *, tau_pos, tau_neg, sapo=losses.sapo):
    return sapo(rows, tau_pos=tau_pos, tau_neg=1.0)


def other_delta(rows, *, delta, masked=losses.deepseek_masked, **params):
    return masked(rows, delta=0.5, **params)


def penalise_entropy(rows, token, *, correction=1.0, kl=0.0, kl_coef=0.0, entropy=0.0, entropy_coef=0.0):
    return correction * token.loss + kl_coef * kl + entropy_coef * entropy


def no_temperature(hidden, weight, call, *, score=head.log_prob_entropy):
    return score(hidden, weight, call._replace(scale=1.0))


def constant_entropy(*args, score=head.log_prob_entropy, **kwargs):
    scored = score(*args, **kwargs)
    return scored._replace(entropy=scored.entropy.detach())


def shifted_targets(hidden, weight, call, *, score=head.log_prob_entropy):
    return score(hidden, weight, call._replace(targets=call.targets.roll(1)))


def reversed_difference(log_prob, other, *, difference=losses.difference):
    return difference(other, log_prob)


no_std = with_(advantages.group_normalized, std="none")
fewer_sequences = with_(losses.aggregation_weight, sequences=15.0)
counted_by_segment = with_(losses.aggregation_weight, sequences=24)
kept_at_one = with_(preference.kept_log_prob, temperature=1.0)
NEVER_CONSTANT = classmethod(lambda cls, v: cls(sum(v) / len(v), 1e-20, len(v), False))

PLANTED: list[tuple[str, Any, str, Any, str]] = [
    ("std over n", advantages.Spread, "std", std_over_n, "advantages/grpo_ddof1_eps1e-6"),
    ("constant unseen", advantages.Spread, "of", NEVER_CONSTANT, "advantages/dynamic_sampling_keep"),
    ("no leave-one-out", advantages, "leave_one_out", no_std, "advantages/rloo"),
    ("clip on both sides", losses, "clipped_surrogate", clip_both_sides, "policy_losses/dapo"),
    ("no ratio", losses, "cispo", unmoved_old, "policy_losses/cispo"),
    ("GSPO per token", losses, "gspo", token_ratio, "policy_losses/gspo"),
    ("one tau", losses, "sapo", one_tau, "policy_losses/sapo"),
    ("delta", losses, "deepseek_masked", other_delta, "mismatch/opsm_old"),
    ("empty uncounted", losses, "aggregation_weight", fewer_sequences, "policy_losses/gspo"),
    ("KL reversed", losses, "difference", reversed_difference, "kl_entropy/dk3"),
    ("mean kept", advantages, "whiten", mean_kept, "policy_losses/ppo_gae"),
    ("values leak", advantages, "gae", leak_across_sequences, "value_gae/advantages"),
    ("value loss not halved", losses, "value_loss", forget_half, "value_gae/clip_None"),
    ("cap", losses, "truncate", with_(losses.truncate, high=3.0), "policy_losses/grpo_tis_token"),
    ("IPO tau", preference, "ipo", with_(preference.ipo, tau=0.2), "preference/ipo_sum"),
    ("cDPO for rDPO", preference, "robust_dpo", preference.dpo, "preference/rdpo"),
    ("entropy penalised", algorithms, "objective", penalise_entropy, "policy_losses/entropy_bonus"),
    (
        "a rollout per segment",
        losses,
        "aggregation_weight",
        counted_by_segment,
        "trajectories/weight/seq-mean-token-mean",
    ),
    (
        "an observation trained",
        Trajectories,
        "trained",
        property(lambda t: ~t.void[t.rollout, None].expand(t.segments.mask.shape)),
        "trajectories/loss/grpo",
    ),
    (
        "void trained",
        Trajectories,
        "trained",
        property(lambda t: t.segments.mask),
        "trajectories/weight/token-mean",
    ),
    ("kept set at T = 1", preference, "kept_log_prob", kept_at_one, "batch/logp_keep"),
    ("head at T = 1", head, "log_prob_entropy", no_temperature, "batch/logp"),
    ("labels shifted", head, "log_prob_entropy", shifted_targets, "policy_losses/sft_token-mean"),
    ("entropy constant", head, "log_prob_entropy", constant_entropy, "policy_losses/ppo_gae_entropy"),
]


@pytest.mark.parametrize(
    ("owner", "name", "replacement", "case"), [p[1:] for p in PLANTED], ids=[p[0] for p in PLANTED]
)
def test_a_planted_error_fails_its_case(
    owner: Any, name: str, replacement: Any, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = only(case)
    assert failed(run_cases(files, None)) == set()
    monkeypatch.setattr(owner, name, replacement)
    assert failed(run_cases(files, None)) == {case}


# --- a wrong directory ------------------------------------------------------------------------------------


def rewrite(file: Path, **changes: Any) -> None:
    arrays = dict(np.load(file))
    np.savez(file, **{**arrays, **changes})


@pytest.mark.parametrize("factor", [1 + 1e-10, np.nan])
def test_a_changed_number_fails_its_case(few: Path, factor: float) -> None:
    changed = {
        "policy_losses": ["gspo/dlogits", "grpo_token-mean/agg_weight", "sapo/loss", "dapo/adv"],
        "preference": ["orpo/dW", "rm_bt/dscore"],
        "kl_entropy": ["k3_iw"],
        "layout": ["sft_estimate"],
    }
    for file, arrays in changed.items():
        path = few / f"{file}.npz"
        rewrite(path, **{array: factor * np.load(path)[array] for array in arrays})
    expected = {f"{file}/{array.split('/')[0]}" for file, arrays in changed.items() for array in arrays}
    assert failed(verify_golden(few)) == expected


def test_what_the_library_does_not_know_fails(few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(few / "policy_losses.npz", **{"grpo_unheard_of/loss": np.array(1.0), "gspo/d2W": np.ones(3)})
    rewrite(few / "advantages.npz", grpo_ddof2_eps0=np.ones(16))
    np.savez(few / "novel.npz", anything=np.ones(2))
    assert main([str(few)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {"cases": len(FEW) + 3, "failed": 4, "max_error": None}
    assert sum(line.startswith("FAILED") for line in lines) == 4


def test_numbers_of_a_case_are_read_not_assumed(few: Path) -> None:
    """Another clip range in a cfg, another eps in a name: the library is asked for those."""
    cfg = json.loads(str(np.load(few / "policy_losses.npz")["gspo/cfg"]))
    rewrite(
        few / "policy_losses.npz",
        **{"gspo/cfg": np.array(json.dumps({**cfg, "eps_low": 0.3, "eps_high": 0.3}))},
    )
    arrays = dict(np.load(few / "advantages.npz"))
    batch = np.load(few / "batch.npz")
    rewards = torch.from_numpy(batch["rewards"])
    statistics = advantages.group_statistics(batch["group"].tolist(), rewards.tolist())
    expected = advantages.group_normalized(rewards, statistics, ddof=0, eps=1e-3).numpy()
    np.savez(few / "advantages.npz", **arrays, **{"grpo_ddof0_eps1e-3": expected})
    report = verify_golden(few)
    assert failed(report) == {"policy_losses/gspo"}
    assert len(report.cases) == len(FEW) + 1


def test_unusable_directories_say_why(few: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such directory"):
        verify_golden(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"batch\.npz: no H, L_max"):
        verify_golden(tmp_path)
    with pytest.raises(ConfigError, match="--tp 0"):
        verify_golden(few, tp=0)
    (few / "layout.npz").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DataError, match=r"layout\.npz: not a readable"):
        verify_golden(few)


def test_a_file_that_holds_code_is_refused(few: Path) -> None:
    np.savez(few / "layout.npz", group_mean=np.array([print], dtype=object))
    with pytest.raises(DataError, match="allow_pickle"):
        verify_golden(few)


def test_a_case_without_its_inputs_says_which(few: Path) -> None:
    arrays = dict(np.load(few / "preference.npz"))
    np.savez(few / "preference.npz", **{k: v for k, v in arrays.items() if k != "pairs"})
    with pytest.raises(DataError, match=r"preference\.npz: no input array 'pairs'"):
        verify_golden(few)


def test_the_entries_expect_what_their_papers_formulas_give() -> None:
    """The committed numbers are those of tests/algo/entries.py, and each entry has a row somewhere."""
    found, given = load(GOLDEN)["entries"], entries.expected()
    assert found.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-12, atol=1e-14, err_msg=name)
    elsewhere = {
        *("ppo", "grpo", "drgrpo", "dapo", "gspo", "sapo", "liteppo", "cispo", "rloo", "reinforce"),
        *("reinforce++", "reinforce++-baseline", "hybrid-grpo", "hybrid-grpo-shared", "dsv32"),
    }
    assert {*NAMES} | elsewhere == {*algorithms.ALGORITHMS}
