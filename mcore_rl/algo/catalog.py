"""What every algorithm is and what others call it, for `mcore-rl algorithms` and docs/algorithms.md.

The versions of the others are those of docs/algorithms.md. An empty name: they have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import NamedTuple

from mcore_rl.algo.algorithms import ALGORITHMS, Algorithm
from mcore_rl.algo.presets import PRESETS
from mcore_rl.errors import ConfigError
from mcore_rl.terminal import quoted

FORMULAS: Mapping[str, tuple[str, str]] = {
    "ppo": ("max(-A r, -A clip(r, 1 - eps_low, 1 + eps_high))", "-A r, 0 where cut"),
    "gspo": ("PPO's with s = exp(mean_t d) for r", "-A s, 0 where cut"),
    "sapo": ("-A (4 / tau) sigmoid(tau (r - 1))", "-A r 4p(1 - p), p the sigmoid"),
    "cispo": ("-sg[clip(r, 1 - eps_low, 1 + eps_high)] A log_prob", "-A clip(r)"),
    "reinforce": ("-A log_prob", "-A"),
    "deepseek_masked": ("PPO's times M(sequence)", "PPO's, 0 where M = 0"),
    "gspo_kept": ("GSPO's, s over what is not rejected", "-A s, 0 where cut"),
    "sapo_sequence": ("-A (4 / tau) sigmoid(tau (s - 1))", "-A s 4p(1 - p)"),
    "gmpo": ("-A exp(mean_t of the clipped d)", "-A exp(mean), 0 where d is clipped"),
    "vespo": ("-sg[W^k e^(lambda (1 - W))] A log_prob", "-A W^k e^(lambda (1 - W))"),
    "topr": ("-A log_prob, times sg[min(W, cap)] where A < 0", "-A, -A min(W, cap)"),
    "dppo_tv": (
        "-sg[min(p / mu, cap)] A log_prob, 0 where abs(p - mu) is too large",
        "-A min(p / mu, cap), or 0",
    ),
    "dppo_kl": ("the same, 0 where the binary KL(mu, p) is too large", "-A min(p / mu, cap), or 0"),
    "fipo": ("PPO's with sg[clip(e^F, 1, 1.2)] A for A, F the discounted sum of d ahead", "PPO's by that A"),
    "m2po": ("-A p / mu, 0 for the farthest tokens", "-A p / mu, or 0"),
    "clip_cov": ("PPO's, 0 for tokens drawn by covariance", "PPO's, or 0"),
    "kl_cov": ("-A r, + penalty abs(d) at the largest covariances", "-A r + penalty sign(d)"),
    "dro": ("-A log_prob + tau d^2 / 2", "-A + tau d"),
}
"""policy loss -> (per token, d loss / d log_prob)"""


class Origin(NamedTuple):
    """Where an algorithm comes from, and what it is called elsewhere."""

    source: str
    verl: str = ""
    slime: str = ""
    nemo_rl: str = ""
    trl: str = ""
    prime_rl: str = ""
    differs: str = ""


_GROUP_OF_TRL = "TRL: eps 1e-4"
_K3 = "NeMo-RL: leave-one-out, k3 0.01; TRL: token-mean, eps 1e-4; verl: dual clip 3, token-mean"
KNOWN: Mapping[str, Origin] = {
    "ppo": Origin(
        "1707.06347 eq. 7", "gae", "ppo", "adv gae", "PPOTrainer", differs="verl: lam 1, dual clip 3, no KL"
    ),
    "grpo": Origin(
        "2402.03300 eq. 3", "grpo", "grpo", "grpo", 'loss_type="grpo"', "grpo", _K3 + "; prime-rl: DPPO"
    ),
    "gdpo": Origin(
        "2601.05242 eqs. 4-7", "gdpo", "", "adv gdpo", "normalize_then_sum", differs="verl: whitens tokens"
    ),
    "drgrpo": Origin(
        "2503.20783", "norm_adv_by_std_in_grpo=False", trl='loss_type="dr_grpo"', differs="TRL: std group"
    ),
    "dapo": Origin("2503.14476", "recipe/dapo", "--eps-clip-high", "ratio_clip_max", 'loss_type="dapo"'),
    "gspo": Origin("2507.18071 eq. 5", "gspo", "gspo", "sequence_level_importance_ratios", "sequence level"),
    "sapo": Origin("2511.20347", "sapo", trl='loss_type="sapo"', differs=_GROUP_OF_TRL),
    "liteppo": Origin("2508.08221 eq. 6", trl='scale_rewards="batch"', differs=_GROUP_OF_TRL),
    "cispo": Origin(
        "2506.13585 eqs. 4-5",
        "cispo",
        "cispo",
        "cispo",
        'loss_type="cispo"',
        differs="verl: eps_low 0.2; TRL: 1 + eps",
    ),
    "rloo": Origin("2402.14740 eq. 8", "rloo", "", "leave_one_out", "RLOOTrainer"),
    "reinforce": Origin("Williams 1992", "gpg", "", "disable_ppo_ratio", "", "rl"),
    "reinforce++": Origin(
        "2501.03262",
        "reinforce_plus_plus",
        "reinforce_plus_plus",
        "reinforce_plus_plus",
        differs="NeMo-RL: over n",
    ),
    "reinforce++-baseline": Origin(
        "2501.03262", "reinforce_plus_plus_baseline", "reinforce_plus_plus_baseline", "minus_baseline"
    ),
    "hybrid-grpo": Origin("2502.01652, changed"),
    "hybrid-grpo-shared": Origin("2502.01652"),
    "dsv32": Origin(
        "2512.02556 eq. 9", slime="--use-opsm", trl="off_policy_mask_threshold", differs="slime: delta 1e-4"
    ),
    "gspo-kept": Origin("2507.18071"),
    "sapo-sequence": Origin("2511.20347, 2507.18071", trl='sapo, importance_sampling_level="sequence"'),
    "gmpo": Origin("2507.20673", "geo_mean", differs="verl: clip 0.2"),
    "vespo": Origin("2602.10693 section 3.4", trl='loss_type="vespo"', differs=_GROUP_OF_TRL),
    "topr": Origin("2503.14286", "topr"),
    "dppo-tv": Origin("2602.04879", "dppo_tv", prime_rl='loss "default"', differs="verl: to the old policy"),
    "dppo-kl": Origin("2602.04879", "dppo_kl", differs="verl: 0.2, to the old policy"),
    "m2po": Origin("2510.01161", differs="AReaL (m2_threshold): per micro-batch"),
    "clip-cov": Origin("2505.22617", "clip_cov", differs="verl: per micro-batch"),
    "kl-cov": Origin("2505.22617", "kl_cov", differs="verl: per micro-batch, 0.0002"),
    "dro": Origin("2405.19107", "dro", differs="verl: dro_beta must be set"),
    "grpo-loo": Origin("2402.14740 eq. 8", nemo_rl="grpo", differs="NeMo-RL: k3 0.01"),
    "maxrl": Origin("2602.02710", prime_rl="max_rl", differs="prime-rl: DPPO"),
    "opo": Origin("2505.23585", "opo"),
    "passk": Origin("2508.10751"),
    "passk-best": Origin("2503.19595", "grpo_passk"),
    "fipo": Origin(
        "2603.19835, authors' trainer", differs="authors: a response of two dual clips is left out"
    ),
    "echo": Origin("prime-rl", prime_rl="echo", differs="prime-rl: its DPPO; bodies of tool answers alone"),
    "remax": Origin("2310.10505", "remax", differs="verl: clips, token-mean"),
    "rae": Origin("2506.24119 eq. 2", prime_rl="rae", differs="prime-rl: its DPPO"),
    "otb": Origin("2602.07078", "optimal_token_baseline", differs="verl: a group of one keeps its return"),
    "vc-ppo": Origin("2503.01491"),
    "vapo": Origin("2504.05118", differs="AReaL: by length too"),
}
OTHERS = ("verl", "slime", "nemo_rl", "trl", "prime_rl")


def rows() -> Iterator[dict[str, str]]:
    """What docs/algorithms.md says of each algorithm, one column after another."""
    for name, algorithm in ALGORITHMS.items():
        formula, coefficient = FORMULAS[algorithm.loss.__name__]
        known = KNOWN[name]
        others = {other.replace("_", "-"): getattr(known, other) for other in OTHERS}
        yield {
            "algorithm": name,
            "from": known.source,
            "loss of a token": formula,
            "d loss / d log_prob": coefficient,
            **others,
            "default that differs": known.differs,
        }


def preset_rows() -> Iterator[dict[str, str]]:
    """What docs/algorithms.md says of each preset."""
    for name, preset in PRESETS.items():
        yield {
            "preset": name,
            "is": preset.algorithm,
            "with": " ".join(f"{key}={value}" for key, value in preset.params.items()),
            "asked for there by": preset.called,
            "what is not the same": preset.differs,
        }


def as_markdown() -> str:
    """Both tables, as docs/algorithms.md has them."""
    return "\n".join([*_markdown(list(rows())), "", *_markdown(list(preset_rows()))])


def _markdown(table: list[dict[str, str]]) -> Iterator[str]:
    yield f"| {' | '.join(table[0])} |"
    yield "|---" * len(table[0]) + "|"
    for row in table:
        yield f"| {' | '.join(row.values())} |".replace("  ", " ")


def describe(name: str | None = None) -> str:
    """All algorithms and presets, a line each; or all there is to say of one.

    Raises:
        ConfigError: there is none of this name.
    """
    if name is None:
        width = max(map(len, (*ALGORITHMS, *PRESETS)))
        lines = [f"{row['algorithm']:{width}}  {row['loss of a token']}  ({row['from']})" for row in rows()]
        lines += ["", "presets, the defaults of other trainers:"]
        return "\n".join([*lines, *(f"{n:{width}}  {p.algorithm}; {p.called}" for n, p in PRESETS.items())])
    if name in PRESETS:
        (row,) = (row for row in preset_rows() if row["preset"] == name)
        return "\n".join([*_pairs(row), "", describe(PRESETS[name].algorithm)])
    if name not in ALGORITHMS:
        near = get_close_matches(name, (*ALGORITHMS, *PRESETS), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`mcore-rl algorithms` lists them"
        raise ConfigError(f"algorithms: there is no {quoted(name)}; {hint}")
    (row,) = (row for row in rows() if row["algorithm"] == name)
    algorithm = ALGORITHMS[name]
    presets = [preset for preset, its in PRESETS.items() if its.algorithm == name]
    return "\n".join([*_pairs(row), *_pairs(_settings(algorithm)), *_pairs({"presets": ", ".join(presets)})])


def _settings(algorithm: Algorithm) -> dict[str, str]:
    params = {**algorithm.loss_params, **algorithm.advantage_params}
    return {
        "advantage": algorithm.advantage.__name__,
        "aggregation": algorithm.aggregation,
        "params": " ".join(f"{key}={value}" for key, value in params.items()),
    }


def _pairs(row: Mapping[str, str]) -> list[str]:
    return [f"{key + ':':22} {value}" for key, value in row.items() if value]
