"""Golden cases that are numbers per sample or per token: advantages, returns, KL, entropy, mismatch weights.

A case is a pattern on its name; named groups of the pattern are the numbers it is parameterised by.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mcore_rl.algo import advantages, losses, metrics, preference
from mcore_rl.algo.losses import difference
from mcore_rl.algo.rows import Rows
from mcore_rl.rewards.length import overlong_penalty
from mcore_rl.verify.golden.inputs import GoldenInputs, Outputs

Case = Callable[..., Tensor | Outputs]

NUMBER = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"


def match(cases: Mapping[str, Case], name: str) -> Callable[[GoldenInputs], Tensor | Outputs] | None:
    """The case whose pattern is `name`, its numbers bound; None for a name that no pattern knows."""
    for pattern, case in cases.items():
        if found := re.fullmatch(pattern.replace("#", NUMBER), name):
            numbers = [float(text) for text in found.groups()]
            return lambda problem, case=case, numbers=numbers: case(problem, *numbers)
    return None


# --- advantages.npz ---------------------------------------------------------------------------------------


def _normalized(std: advantages.StdSource) -> Case:
    return lambda p, ddof=1, eps=1e-6: advantages.group_normalized(
        p.rewards, p.statistics, std=std, ddof=1 if ddof else 0, eps=eps
    )


def _batch_normalized(p: GoldenInputs, ddof: float, eps: float) -> Tensor:
    """The batch is normalised as a single group is."""
    everyone = advantages.group_statistics([0] * len(p.groups), p.rewards.tolist())
    return advantages.group_normalized(p.rewards, everyone, ddof=1 if ddof else 0, eps=eps)


def _whitened(p: GoldenInputs, rows: Tensor) -> Tensor:
    return p.unpack(advantages.whiten(rows, advantages.Spread.of_rows(rows)))


def _reinforce_pp_baseline(p: GoldenInputs) -> Tensor:
    centered = advantages.group_normalized(p.rewards, p.statistics, std="none")
    return _whitened(p, centered.repeat_interleave(p.lengths))


def _reinforce_pp(p: GoldenInputs) -> Tensor:
    rewards = _token_rewards(p)
    gamma = p.scalar("gamma", "value_gae")
    return _whitened(
        p, advantages.gae(rewards, torch.zeros_like(rewards), p.offsets, gamma=gamma, lam=1.0)[0]
    )


def _prompt_values(p: GoldenInputs) -> Tensor:
    return p.tensor("values_old")[:, 0]


def _adaptive_kl(p: GoldenInputs) -> Tensor:
    trace = [0.2]
    for observed, samples in ((9.0, 256.0), (3.0, 256.0)):
        trace.append(losses.adaptive_kl_coefficient(trace[-1], observed, samples, target=6.0, horizon=1e4))
    return torch.tensor(trace, dtype=torch.float64)


ADVANTAGES: Mapping[str, Case] = {
    r"grpo_ddof([01])_eps#": _normalized("group"),
    r"liteppo_rawstd_ddof([01])_eps#": _normalized("batch"),
    r"liteppo_centeredstd_ddof([01])_eps#": _normalized("batch-centered"),
    r"mean_only": _normalized("none"),
    r"batchnorm_ddof([01])_eps#": _batch_normalized,
    r"rloo": lambda p: advantages.leave_one_out(p.rewards, p.statistics),
    r"rfpp_baseline_tok": _reinforce_pp_baseline,
    r"rfpp_tok": _reinforce_pp,
    r"hybrid_a": lambda p: advantages.hybrid_shared(p.groups, p.rewards, _prompt_values(p))[0],
    r"hybrid_b_alpha#": lambda p, alpha: advantages.hybrid(
        p.groups, p.rewards, _prompt_values(p), alpha=alpha
    )[0],
    r"overlong_penalty_Lmax#_cache#": lambda p, longest, cache: torch.tensor(
        [
            overlong_penalty(length, max_length=int(longest), cache=int(cache))
            for length in p.tensor("lengths").tolist()
        ],
        dtype=torch.float64,
    ),
    r"dynamic_sampling_keep": lambda p: advantages.informative(p.statistics),
    r"adaptive_kl_trace": _adaptive_kl,
}

# --- value_gae.npz ----------------------------------------------------------------------------------------


def _token_rewards(p: GoldenInputs) -> Tensor:
    return advantages.token_rewards(
        p.rewards, p.rows("old_logp"), p.rows("ref_logp"), p.offsets, kl_coef=p.scalar("kl_coef", "value_gae")
    )


def gae_rows(p: GoldenInputs) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [R] float64."""
    numbers = {"gamma": p.scalar("gamma", "value_gae"), "lam": p.scalar("lam", "value_gae")}
    return advantages.gae(_token_rewards(p), p.rows("values_old"), p.offsets, **numbers)


def whitened_gae(p: GoldenInputs) -> Tensor:
    """[N, T]"""
    return _whitened(p, gae_rows(p)[0])


def _value_loss(p: GoldenInputs, clip: float | None = None) -> Outputs:
    values = p.tensor("values_new").requires_grad_()
    result = losses.value_loss(values, p.tensor("values_old"), p.unpack(gae_rows(p)[1]), clip=clip)
    loss = torch.where(p.mask, result.loss, 0.0).sum() / p.mask.sum()
    clipped = result.clipped[p.mask].double().mean()
    return {"loss": loss.detach(), "dvalues": torch.autograd.grad(loss, values)[0], "clipfrac": clipped}


VALUES: Mapping[str, Case] = {
    r"token_rewards": lambda p: p.unpack(_token_rewards(p)),
    r"advantages": lambda p: p.unpack(gae_rows(p)[0]),
    r"advantages_whitened": whitened_gae,
    r"returns": lambda p: p.unpack(gae_rows(p)[1]),
    r"clip_None": _value_loss,
    r"clip_#": _value_loss,
}

# --- batch.npz and kl_entropy.npz -------------------------------------------------------------------------


def _kept(p: GoldenInputs) -> tuple[Tensor, Tensor]:
    logits = p.logits.clone().requires_grad_()
    log_prob = preference.kept_log_prob(
        logits, p.tensor("y"), p.tensor("keep_mask"), temperature=p.scalar("temperature")
    )
    return log_prob.detach(), torch.autograd.grad(log_prob.sum(), logits)[0]


def _kl(estimator: losses.KLEstimator, derivative: bool = False) -> Case:
    def case(p: GoldenInputs) -> Tensor:
        log_prob = p.scores()[0].requires_grad_()
        result = losses.kl(estimator, log_prob, p.tensor("ref_logp"), p.tensor("old_logp"))
        return torch.autograd.grad(result.sum(), log_prob)[0] if derivative else result.detach()

    return case


BATCH: Mapping[str, Case] = {
    r"logits": lambda p: p.logits,
    r"logp": lambda p: p.scores()[0],
    r"entropy": lambda p: p.scores()[1],
    r"logp_keep": lambda p: _kept(p)[0],
    r"dlogp_keep_dz": lambda p: _kept(p)[1],
}

KL_ENTROPY: Mapping[str, Case] = {
    r"k1": _kl("k1"),
    r"k2": _kl("k2"),
    r"k3": _kl("k3"),
    r"k3_iw": _kl("k3_iw"),
    r"dk1": _kl("k1", derivative=True),
    r"dk2": _kl("k2", derivative=True),
    r"dk3": _kl("k3", derivative=True),
    r"dk3_iw": _kl("k3_iw", derivative=True),
    r"entropy": lambda p: p.scores()[1],
    r"dentropy_dlogits": lambda p: p.gradients(lambda log_prob, entropy: entropy.sum())["dlogits"],
}

# --- mismatch.npz -----------------------------------------------------------------------------------------


def _mismatch(p: GoldenInputs) -> Tensor:
    return difference(p.tensor("old_logp"), p.tensor("rollout_logp"))


def _token(weight: str, *names: str) -> Case:
    return lambda p, *numbers: _weight(weight, _mismatch(p), names, numbers)


def _sequence(weight: str, *names: str, mean: bool = False) -> Case:
    def case(p: GoldenInputs, *numbers: float) -> Tensor:
        return _weight(weight, (p.sequence_mean if mean else p.sequence_sum)(_mismatch(p)), names, numbers)

    return case


def _weight(weight: str, log_weight: Tensor, names: Sequence[str], numbers: Sequence[float]) -> Tensor:
    return getattr(losses, weight)(log_weight, **dict(zip(names, numbers, strict=True)))


def _sequence_mask(behaviour: str) -> Case:
    def case(p: GoldenInputs) -> Tensor:
        """1 where DeepSeek-V3.2's mask keeps the sequence, read off the loss of an unmoved policy."""
        log_prob = p.scores()[0]
        mean = p.sequence_mean(difference(log_prob, p.tensor(behaviour)))
        advantage = advantages.group_normalized(p.rewards, p.statistics, std="none").to(p.dtype)
        delta = p.scalar("opsm_delta", "mismatch")
        unmoved = torch.zeros_like(mean)
        rows = Rows.of(unmoved, unmoved, advantage=advantage)
        rows = replace(rows, extras={"sequence_rollout_log_ratio": mean})
        token = losses.deepseek_masked(rows, delta=delta)
        clipped = token.metrics["clip/fraction"].values
        assert clipped is not None
        return ~clipped

    return case


MISMATCH: Mapping[str, Case] = {
    r"tis_token_C#": _token("truncate", "high"),
    r"tis_seq_C#": _sequence("truncate", "high"),
    r"mis_token_#_#": _token("mask_outside", "low", "high"),
    r"mis_seq_#_#": _sequence("mask_outside", "low", "high"),
    r"icepop_#_#": _token("mask_outside", "low", "high"),
    r"geo_seq_keep_#_#": _sequence("keep_within", "low", "high", mean=True),
    r"seq_is_weight": lambda p: _sequence("truncate", "high")(p, torch.inf),
    r"geo_mean": lambda p: _sequence("truncate", "high", mean=True)(p, torch.inf),
    r"opsm_old": _sequence_mask("old_logp"),
    r"opsm_rollout": _sequence_mask("rollout_logp"),
}

# --- layout.npz -------------------------------------------------------------------------------------------


def _per_group(p: GoldenInputs, numbers: Tensor) -> Tensor:
    """[N] -> one number per group, in the order of the ids."""
    return torch.stack([numbers[p.groups.index(group)] for group in sorted(set(p.groups))])


def _scale(p: GoldenInputs, coefficient: float = 1.0) -> metrics.GradientScale:
    log_prob, entropy = (x[p.mask] for x in p.scores())
    ones = torch.ones_like(log_prob)
    return metrics.gradient_scale(metrics.gradient_scale_sums(log_prob, entropy, ones, coefficient * ones))


def _number(read: Callable[[GoldenInputs], float]) -> Case:
    return lambda p: torch.tensor(read(p), dtype=torch.float64)


def _expected_surprise(p: GoldenInputs) -> float:
    """E over y ~ p of 1 - p_y: the diagnostic on every possible token, weighted by its probability."""
    log_p = torch.log_softmax(p.logits / p.scalar("temperature"), dim=-1)[p.mask].double()
    return (log_p.exp() * -torch.expm1(log_p)).sum(-1).mean().item()


def _entropy_bound(p: GoldenInputs) -> float:
    """1 - e^(-mean H): the surprise bound with the mean entropy in the place of the cross-entropy."""
    return metrics.GradientScale(0, 0, 0, p.scores()[1][p.mask].double().mean().item()).surprise_bound


LAYOUT: Mapping[str, Case] = {
    r"group_mean": lambda p: _per_group(p, p.statistics.mean),
    r"group_std1": lambda p: _per_group(p, p.statistics.std("group", ddof=1)),
    r"mean_1_minus_p": _number(lambda p: _scale(p).surprise),
    r"bound_from_ce": _number(lambda p: _scale(p).surprise_bound),
    r"onpolicy_expected": _number(_expected_surprise),
    r"bound_from_entropy": _number(_entropy_bound),
    r"rl_estimate": _number(
        lambda p: (2 / torch.pi) ** 0.5 * metrics.GradientScale(0, 0, 0, 0.2).surprise_bound
    ),
    r"sft_estimate": _number(lambda p: metrics.GradientScale(0, 0, 0, 0.8).surprise_bound),
}
