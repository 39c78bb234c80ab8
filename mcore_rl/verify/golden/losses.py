"""Golden cases that are losses with gradients: policy_losses.npz and preference.npz."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from mcore_rl.algo import advantages, algorithms, losses, preference
from mcore_rl.algo.losses import difference
from mcore_rl.algo.parameters import parameters
from mcore_rl.algo.rows import Rows, TokenLoss
from mcore_rl.errors import DataError
from mcore_rl.verify.golden.inputs import GoldenInputs, Outputs
from mcore_rl.verify.golden.samples import ADVANTAGES, MISMATCH, Case, match, whitened_gae

Config = Mapping[str, Any]


# --- policy_losses.npz ------------------------------------------------------------------------------------


def _likelihood(rows: Rows) -> TokenLoss:
    return TokenLoss(preference.sft(rows.log_prob))


def _nothing(rows: Rows) -> TokenLoss:
    """The policy term of the cases that are a KL or entropy term alone."""
    return TokenLoss(torch.zeros_like(rows.log_prob))


POLICY_LOSSES: Mapping[str, str] = {
    "grpo_token-mean": "ppo",
    "grpo_seq-mean-token-mean": "ppo",
    "grpo_seq-mean-token-mean-valid": "ppo",
    "grpo_seq-mean-token-sum": "ppo",
    "grpo_seq-mean-token-sum-norm": "ppo",
    "grpo_k3_beta0.04": "ppo",
    "grpo_tis_token": "ppo",
    "grpo_icepop": "ppo",
    "grpo_mis_seq": "ppo",
    "drgrpo": "ppo",
    "dapo": "ppo",
    "liteppo": "ppo",
    "ppo_gae": "ppo",
    "ppo_gae_entropy": "ppo",
    "ppo_dualclip3": "ppo",
    "ppo_decoupled_gae": "ppo",
    "gspo": "gspo",
    "gspo_token": "gspo",
    "gspo_token-mean": "gspo",
    "gspo_token_tokenadv": "gspo",
    "sapo": "sapo",
    "sapo_token-mean": "sapo",
    "cispo": "cispo",
    "rloo_reinforce": "reinforce",
    "sft_token-mean": "sft",
    "dsv32_mask": "deepseek_masked",
    "dsv32_mask_unbiasedkl": "deepseek_masked",
    "dsv32_mask_rolloutlogp": "deepseek_masked",
    "kl_k1": "none",
    "kl_k1_iw": "none",
    "kl_k2": "none",
    "kl_k2_iw": "none",
    "kl_k3": "none",
    "kl_k3_iw": "none",
    "entropy_bonus": "none",
}
"""case -> its loss in algo.losses, which gets the numbers of the cfg that it has a parameter for"""
WITHOUT_POLICY: Mapping[str, Callable[[Rows], TokenLoss]] = {"sft": _likelihood, "none": _nothing}
RENAMED = {"dual_clip": "clip_c"}
"""parameter -> its name in a cfg"""


def _loss(name: str, cfg: Config) -> Callable[[Rows], TokenLoss]:
    known = POLICY_LOSSES[name]
    if known in WITHOUT_POLICY:
        return WITHOUT_POLICY[known]
    loss = getattr(losses, known)
    named = {key: RENAMED.get(key, key) for key in parameters(loss)}
    return partial(loss, **{key: cfg[given] for key, given in named.items() if given in cfg})


def rows_of(p: GoldenInputs, log_prob: Tensor, entropy: Tensor, advantage: Tensor, behaviour: str) -> Rows:
    """The batch as a loss sees it; `behaviour` names the log-probs of the policy that sampled."""
    old, sampled = p.tensor("old_logp"), p.tensor(behaviour)
    current = log_prob.detach()
    rows = Rows.of(log_prob, entropy, old=old, rollout=sampled, advantage=advantage)
    ratios = {"sequence_log_ratio": old, "sequence_rollout_log_ratio": sampled}
    means = {name: p.expand(p.sequence_mean(difference(current, to))) for name, to in ratios.items()}
    return replace(rows, extras=means)


def policy_case(p: GoldenInputs, name: str) -> Outputs:
    """All output arrays of `policy_losses.npz/<name>/`, its numbers taken from its cfg."""
    cfg = _config(p, name)
    advantage = _advantage(p, cfg.get("adv"))
    weight = _aggregation_weight(p, cfg["agg"])
    correction = _correction(p, cfg.get("weight"))
    per_token: list[Tensor] = []

    def loss_of(log_prob: Tensor, entropy: Tensor) -> Tensor:
        rows = rows_of(p, log_prob, entropy, advantage, cfg.get("behaviour", "rollout_logp"))
        token = _loss(name, cfg)(rows)
        per_token.append(algorithms.objective(rows, token, correction=correction).detach())
        divergence = 0.0
        if cfg["kl"] is not None:
            estimator = cfg["kl"] + ("_iw" if cfg["iw"] else "")
            divergence = losses.kl(estimator, log_prob, p.tensor("ref_logp"), p.tensor("old_logp"))
        total = algorithms.objective(
            rows,
            token,
            correction=correction,
            kl=divergence,
            kl_coef=cfg["beta"],
            entropy=entropy,
            entropy_coef=cfg["entc"],
        )
        return losses.weighted_sum(total, weight)

    outputs = p.gradients(loss_of)
    return {**outputs, "per_token_loss": per_token[0], "agg_weight": weight, "adv": advantage}


def _config(p: GoldenInputs, name: str) -> Config:
    text = str(p.files["policy_losses"].get(f"{name}/cfg", ""))
    try:
        cfg = {"clip_c": None, **json.loads(text)}
    except json.JSONDecodeError as error:
        raise DataError(f"policy_losses.npz: {name}/cfg is not a JSON object ({error})") from error
    missing = [key for key in ("agg", "kl", "beta", "iw", "entc") if key not in cfg]
    if missing:
        raise DataError(f"policy_losses.npz: {name}/cfg has no {', '.join(missing)}")
    return cfg


def _advantage(p: GoldenInputs, name: str | None) -> Tensor:
    """[N, T]; by its name in advantages.npz, or one of the generator's three other words for it."""
    match name:
        case None | "ones":
            return torch.ones(p.mask.shape, dtype=p.dtype)
        case "gae_whitened":
            return whitened_gae(p)
        case "A_grpo*(1+0.1 sin t)":
            wave = 1 + 0.1 * torch.sin(torch.arange(p.mask.shape[1], dtype=p.dtype))
            return p.expand(advantages.group_normalized(p.rewards, p.statistics)) * wave
    return p.expand(_named(ADVANTAGES, name, p))


def _correction(p: GoldenInputs, name: str | None) -> Tensor | float:
    match name:
        case None:
            return 1.0
        case "exp(old-rollout), uncapped":
            mismatch = difference(p.tensor("old_logp"), p.tensor("rollout_logp"))
            return losses.truncate(mismatch, high=math.inf)
    weight = _named(MISMATCH, name, p)
    return p.expand(weight) if weight.ndim == 1 else weight


def _named(cases: Mapping[str, Case], name: str, p: GoldenInputs) -> Tensor:
    case = match(cases, name)
    if case is None:
        raise DataError(f"policy_losses.npz: a cfg names {name!r}, which is not a known advantage or weight")
    result = case(p)
    assert isinstance(result, Tensor)
    return result


def _aggregation_weight(p: GoldenInputs, name: str) -> Tensor:
    valid = name.endswith("-valid")
    weight = losses.aggregation_weight(
        cast(losses.Aggregation, name.removesuffix("-valid")),
        p.expand(p.lengths),
        tokens=float(p.lengths.sum()),
        sequences=float((p.lengths > 0).sum() if valid else len(p.lengths)),
        max_length=p.scalar("L_max"),
    )
    return weight * p.mask


# --- preference.npz ---------------------------------------------------------------------------------------

PairLoss = Callable[[GoldenInputs, Tensor], Tensor]
"""(problem, log_prob [N, T]) -> scalar loss"""


def _pairs(p: GoldenInputs, numbers: Tensor) -> tuple[Tensor, Tensor]:
    chosen, rejected = p.tensor("pairs", "preference").unbind(1)
    return numbers[chosen], numbers[rejected]


def _margins(p: GoldenInputs, log_prob: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    return preference.margin(*_pairs(p, reduce(log_prob)), *_pairs(p, reduce(p.tensor("ref_logp"))))


def _numbers(p: GoldenInputs, *names: str) -> dict[str, float]:
    return {name: p.scalar(name, "preference") for name in names}


def _dpo(p: GoldenInputs, log_prob: Tensor) -> Tensor:
    return preference.dpo(_margins(p, log_prob, p.sequence_sum), **_numbers(p, "beta")).mean()


def _cdpo(p: GoldenInputs, log_prob: Tensor) -> Tensor:
    numbers = _numbers(p, "beta", "label_smoothing")
    return preference.dpo(_margins(p, log_prob, p.sequence_sum), **numbers).mean()


def _rdpo(p: GoldenInputs, log_prob: Tensor) -> Tensor:
    numbers = _numbers(p, "beta", "label_smoothing")
    return preference.robust_dpo(_margins(p, log_prob, p.sequence_sum), **numbers).mean()


def _ipo_sum(p: GoldenInputs, log_prob: Tensor) -> Tensor:
    return preference.ipo(_margins(p, log_prob, p.sequence_sum), tau=p.scalar("beta", "preference")).mean()


def _ipo_average(p: GoldenInputs, log_prob: Tensor) -> Tensor:
    return preference.ipo(_margins(p, log_prob, p.sequence_mean), tau=p.scalar("beta", "preference")).mean()


def _orpo(p: GoldenInputs, log_prob: Tensor) -> Tensor:
    chosen, _ = _pairs(p, p.mask)
    likelihood = preference.sft(_pairs(p, log_prob)[0])[chosen].mean()
    means = _pairs(p, p.sequence_mean(log_prob))
    return likelihood + preference.orpo_odds(*means, weight=p.scalar("beta", "preference")).mean()


PREFERENCES: Mapping[str, PairLoss] = {
    "dpo": _dpo,
    "cdpo": _cdpo,
    "rdpo": _rdpo,
    "ipo_sum": _ipo_sum,
    "ipo_avg": _ipo_average,
    "orpo": _orpo,
}


def preference_case(p: GoldenInputs, name: str) -> Outputs:
    """All output arrays of `preference.npz/<name>/` of a loss on log-probs."""
    return p.gradients(lambda log_prob, entropy: PREFERENCES[name](p, log_prob))


def _reward_model(p: GoldenInputs, *, plain: bool) -> Outputs:
    score = p.tensor("rm_score", "preference").requires_grad_()
    margin = 0.0 if plain else p.tensor("rm_margin", "preference")
    center = 0.0 if plain else p.scalar("rm_center_coef", "preference")
    loss = preference.bradley_terry(*_pairs(p, score), margin, center_coef=center).mean()
    return {"loss": loss.detach(), "dscore": torch.autograd.grad(loss, score)[0]}


REWARD_MODELS: Mapping[str, Case] = {
    "rm_bt": lambda p: _reward_model(p, plain=True),
    "rm_bt_margin_center": lambda p: _reward_model(p, plain=False),
}
