"""The algorithms, as data. To add one: write its loss or advantage as a function, add an entry to ALGORITHMS.

A loss of the user's own needs no entry: `configure(..., loss="module:function")` puts it in the place of an
entry's.

Defaults of an entry are the keyword defaults of its two functions, changed by `params`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor

from mcore_rl.algo import advantages, baselines, lambdas, losses, masked_losses, sequence_losses
from mcore_rl.algo.corrections import Rejection, parse_rules
from mcore_rl.algo.losses import CORRECTIONS, Aggregation, Correction, CorrectionName, KLEstimator
from mcore_rl.algo.parameters import Param, checked, parameters, resolve, suggest, types_of
from mcore_rl.algo.presets import PRESETS
from mcore_rl.algo.rows import (
    OF_OLD,
    OF_SEQUENCES,
    Rows,
    TokenLoss,
    ahead_by,
    averaged_by,
    declared,
    finite,
    marked_by,
)
from mcore_rl.errors import ConfigError
from mcore_rl.functions import load_function
from mcore_rl.terminal import quoted


@dataclass(frozen=True)
class Algorithm:
    """One row of ALGORITHMS; `configure` returns it with the user's overrides in place."""

    loss: Callable[..., TokenLoss]
    """(Rows, **loss_params) -> TokenLoss; see rows.py"""
    advantage: Callable[..., Any]
    """(rewards [N], GroupStatistics, **advantage_params) -> [N]; `advantages.gae` where `per_token`; where
    `values_prompts`, (group ids [N], rewards [N], values [N], **advantage_params) -> (advantages, returns)"""
    aggregation: Aggregation
    """weights of the per-token losses"""
    per_token: bool = False
    """advantages come from token rewards by `advantages.gae`; with values 0 where there is no critic"""
    decoupled: bool = False
    """each part of the reward is compared by itself (`advantages.decoupled`); only where `compares`"""
    whiten: bool = False
    """advantages are whitened over all unmasked tokens of the global batch"""
    needs_critic: bool = False
    """values come from a trained critic"""
    values_prompts: bool = False
    """that critic is light: it values prompts alone, each once for all of its samples"""
    kl_in_reward: float = 0.0
    """coefficient of k1 in the token rewards; only where `per_token`"""
    kl_target: float | None = None
    """nats per response to which that coefficient is adapted (losses.adaptive_kl_coefficient); None: fixed"""
    kl_horizon: float = 10_000.0
    """samples over which the adapted coefficient changes by a factor"""
    kl_in_loss: float = 0.0
    """coefficient of the KL term inside the same aggregation"""
    kl_estimator: KLEstimator = "k3"
    """estimator of the KL in the loss"""
    kl_cap: float | None = None
    """its largest value; what lies beyond has no gradient (losses.kl); None: none"""
    entropy_coef: float = 0.0
    """coefficient of the entropy bonus"""
    observation_nll: float = 0.0
    """coefficient of -log_prob of what the policy saw between its turns, mean over those tokens (ECHO)"""
    bootstrap: bool = False
    """the value behind a truncated response is a part of its return; only where `needs_critic` per token"""
    baseline: Literal["none", "greedy", "role"] = "none"
    """what a reward is compared with, from outside of the batch: that of a greedy answer to the prompt, or
    the running mean of the role"""
    by_token: bool = False
    """(rewards ahead [R], energy [R], offsets, GroupStatistics) -> [R]: an advantage of each token, without a
    critic; the policy says the energy in one more forward pass"""
    positive_nll: float = 0.0
    """coefficient of -log_prob, mean over tokens of samples of positive reward (VAPO, arXiv 2504.05118)"""
    correction: CorrectionName = "none"
    """importance correction for the sampling engine against the old policy: a key of CORRECTIONS"""
    correction_low: float | None = None
    """its lower bound; None: that of the entry"""
    correction_high: float | None = None
    """its upper bound; None: that of the entry"""
    correction_normalized: bool = False
    """the correction, rejection included, is divided by its mean over the tokens of the whole rollout"""
    rejection: str = ""
    """rules with commas between, of what has weight 0: see corrections.Rejection"""
    whiten_ddof: Literal[0, 1] = 1
    """the variance that whitening divides by is that over n - whiten_ddof"""
    gae_steps: Literal["token", "turn"] = "token"
    """what is one step of GAE; only where `per_token`"""
    off_policy: bool = False
    """the loss has a ratio to the policy that sampled: it needs no correction"""
    params: Mapping[str, Param] = field(default_factory=dict)
    """keyword arguments of loss and advantage that differ from the functions' own defaults"""

    @property
    def compares(self) -> bool:
        """An advantage is the difference of a sample's reward to those of the same prompt."""
        return self.advantage in (*_BY_PARTS, *_BY_GROUP)

    @property
    def rules(self) -> tuple[Rejection, ...]:
        """What `rejection` says."""
        return parse_rules(self.rejection)

    @property
    def needs_old(self) -> bool:
        """Old log-probs of the whole rollout are needed before its first update."""
        marked = marked_by(self.loss) is not None
        return self.kl_in_reward != 0 or self.correction_normalized or marked or self.by_token

    @property
    def needs_reference(self) -> bool:
        """Reference log-probs are needed: a KL coefficient is not 0, or the loss reads them."""
        return self.kl_in_reward != 0 or self.kl_in_loss != 0 or "reference" in declared(self.loss)

    def rowwise(self, *, on_policy: bool) -> bool:
        """A token's loss follows from its own log-prob and entropy; the head then computes it in chunks.

        Not where the loss declares that it reads a log-ratio of the whole sequence. `on_policy`: old
        log-probs are the current ones, and the mean log-ratio to them is 0.
        """
        known = set(OF_OLD) if on_policy else set()
        by_row = not declared(self.loss) & {*OF_SEQUENCES, *averaged_by(self.loss)} - known
        by_row &= ahead_by(self.loss) is None
        by_row &= all(rule.reads == "token" for rule in self.rules)
        return by_row and (self.corrects is None or self.corrects.reads == "token")

    @property
    def corrects(self) -> Correction | None:
        """The entry of CORRECTIONS with this algorithm's bounds; None for "none"."""
        if self.correction == "none":
            return None
        entry, given = (
            CORRECTIONS[self.correction],
            {"low": self.correction_low, "high": self.correction_high},
        )
        return replace(
            entry,
            params={**entry.params, **{key: value for key, value in given.items() if value is not None}},
        )

    @cached_property
    def loss_params(self) -> Mapping[str, Param]:
        """Every keyword argument of the loss, resolved."""
        return resolve(self.loss, self.params)

    @cached_property
    def advantage_params(self) -> Mapping[str, Param]:
        """Every keyword argument of the advantage, resolved."""
        return resolve(self.advantage, self.params)


_BY_PARTS = (advantages.group_normalized, advantages.leave_one_out, baselines.leave_one_out_normalized)
"""advantages that compare the samples of a prompt, of any part of the reward"""
_BY_GROUP = (
    *(baselines.length_weighted, baselines.max_likelihood, baselines.best_of_group, baselines.pass_at_k),
    baselines.optimal_token,
)
"""advantages that compare them by the whole reward"""


def _grouped(
    loss: Callable[..., TokenLoss], aggregation: Aggregation = "token-mean", **changes: Any
) -> Algorithm:
    """GRPO's advantages with another loss."""
    return Algorithm(
        loss, **{"advantage": advantages.group_normalized, "aggregation": aggregation, **changes}
    )


ALGORITHMS: Mapping[str, Algorithm] = {
    "ppo": Algorithm(
        losses.ppo,
        advantages.gae,
        "token-mean",
        per_token=True,
        whiten=True,
        needs_critic=True,
        kl_in_reward=0.05,
    ),
    "grpo": Algorithm(losses.ppo, advantages.group_normalized, "seq-mean-token-mean"),
    "gdpo": Algorithm(losses.ppo, advantages.group_normalized, "seq-mean-token-mean", decoupled=True),
    "drgrpo": Algorithm(
        losses.ppo, advantages.group_normalized, "seq-mean-token-sum-norm", params={"std": "none"}
    ),
    "dapo": Algorithm(losses.ppo, advantages.group_normalized, "token-mean", params={"eps_high": 0.28}),
    "gspo": Algorithm(losses.gspo, advantages.group_normalized, "seq-mean-token-mean"),
    "sapo": Algorithm(losses.sapo, advantages.group_normalized, "seq-mean-token-mean"),
    "liteppo": Algorithm(losses.ppo, advantages.group_normalized, "token-mean", params={"std": "batch"}),
    "cispo": Algorithm(losses.cispo, advantages.group_normalized, "token-mean"),
    "rloo": Algorithm(losses.reinforce, advantages.leave_one_out, "token-mean"),
    "reinforce": Algorithm(losses.reinforce, advantages.raw_reward, "seq-mean-token-sum"),
    "reinforce++": Algorithm(
        losses.ppo,
        advantages.gae,
        "token-mean",
        per_token=True,
        whiten=True,
        kl_in_reward=0.01,
        params={"lam": 1.0},
    ),
    "reinforce++-baseline": Algorithm(
        losses.ppo, advantages.group_normalized, "token-mean", whiten=True, params={"std": "none"}
    ),
    "hybrid-grpo": Algorithm(
        losses.ppo, advantages.hybrid, "seq-mean-token-mean", needs_critic=True, values_prompts=True
    ),
    "hybrid-grpo-shared": Algorithm(
        losses.ppo, advantages.hybrid_shared, "seq-mean-token-mean", needs_critic=True, values_prompts=True
    ),
    "dsv32": Algorithm(
        losses.deepseek_masked,
        advantages.group_normalized,
        "seq-mean-token-mean",
        kl_estimator="k3_iw",
        params={"std": "none"},
    ),
    "gspo-kept": _grouped(sequence_losses.gspo_kept, "seq-mean-token-mean"),
    "sapo-sequence": _grouped(sequence_losses.sapo_sequence, "seq-mean-token-mean"),
    "gmpo": _grouped(sequence_losses.gmpo, "seq-mean-token-mean"),
    "vespo": _grouped(sequence_losses.vespo, off_policy=True),
    "topr": _grouped(sequence_losses.topr, "seq-mean-token-sum", off_policy=True, params={"std": "none"}),
    "dppo-tv": _grouped(masked_losses.dppo_tv, off_policy=True),
    "dppo-kl": _grouped(masked_losses.dppo_kl, off_policy=True),
    "m2po": _grouped(masked_losses.m2po, off_policy=True),
    "clip-cov": _grouped(masked_losses.clip_cov),
    "kl-cov": _grouped(masked_losses.kl_cov),
    "dro": _grouped(masked_losses.dro, params={"std": "none"}),
    "grpo-loo": _grouped(losses.ppo, advantage=baselines.leave_one_out_normalized),
    "maxrl": _grouped(losses.ppo, advantage=baselines.max_likelihood),
    "opo": _grouped(losses.reinforce, advantage=baselines.length_weighted),
    "passk": _grouped(losses.ppo, advantage=baselines.pass_at_k),
    "passk-best": _grouped(losses.ppo, advantage=baselines.best_of_group),
    "fipo": _grouped(sequence_losses.fipo),
    "echo": _grouped(losses.ppo, observation_nll=0.1),
    "remax": _grouped(
        losses.reinforce, "seq-mean-token-sum", advantage=baselines.greedy_baseline, baseline="greedy"
    ),
    "rae": _grouped(
        losses.reinforce, "seq-mean-token-sum", advantage=baselines.role_baseline, baseline="role"
    ),
    "otb": _grouped(losses.reinforce, advantage=baselines.optimal_token, by_token=True),
    "vc-ppo": Algorithm(
        losses.ppo, lambdas.gae_two_lambdas, "token-mean", per_token=True, whiten=True, needs_critic=True
    ),
    "vapo": Algorithm(
        losses.ppo,
        lambdas.gae_by_length,
        "token-mean",
        per_token=True,
        whiten=True,
        needs_critic=True,
        positive_nll=0.1,
        params={"eps_high": 0.28},
    ),
}

_SETTINGS = (
    *("aggregation", "decoupled", "whiten", "kl_in_reward", "kl_in_loss", "kl_estimator", "entropy_coef"),
    *("kl_target", "kl_horizon", "correction", "correction_low", "correction_high"),
    *("kl_cap", "positive_nll", "correction_normalized", "rejection", "whiten_ddof", "gae_steps"),
    *("observation_nll", "bootstrap"),
)


def configure(name: str, overrides: Mapping[str, object] | None = None, loss: str | None = None) -> Algorithm:
    """The entry `name` with `overrides` of its settings and of keyword arguments of its loss and advantage.

    Args:
        loss: `module:function` of the user's own policy loss, in the place of the entry's.

    Raises:
        ConfigError: unknown algorithm or name (with the nearest known one), a value of the wrong type or
            range, or a loss that cannot be loaded.
    """
    entry, preset = PRESETS[name].settings if name in PRESETS else (name, {})
    if entry not in ALGORITHMS:
        raise ConfigError(
            f"algorithm.name: {quoted(name)} is unknown{suggest(name, {**ALGORITHMS, **PRESETS})}"
        )
    algorithm, overrides = ALGORITHMS[entry], {**preset, **(overrides or {})}
    if loss is not None:
        algorithm = _with_loss(algorithm, loss)
    accepted = _accepted(algorithm)
    given: dict[str, Any] = {}
    for key, value in overrides.items():
        if key not in accepted:
            raise ConfigError(f"algorithm.params.{key}: {name} has no such parameter{suggest(key, accepted)}")
        given[key] = checked(f"algorithm.params.{key}", accepted[key], value)
    settings = {key: value for key, value in given.items() if key in _SETTINGS}
    params = {key: value for key, value in given.items() if key not in _SETTINGS}
    algorithm = replace(algorithm, params={**algorithm.params, **params}, **settings)
    _check_complete(algorithm)
    if algorithm.kl_in_reward and not algorithm.per_token:
        raise ConfigError(
            f"algorithm.params.kl_in_reward: {name} has one advantage per sample; use kl_in_loss instead"
        )
    if algorithm.kl_target is not None and not algorithm.kl_in_reward:
        raise ConfigError(
            "algorithm.params.kl_target: adapts the coefficient of the KL in the reward, which is 0; set "
            "kl_in_reward to what it begins with, or drop kl_target"
        )
    if algorithm.bootstrap and not (algorithm.per_token and algorithm.needs_critic):
        raise ConfigError(
            f"algorithm.params.bootstrap: {name} has no critic that values every token; drop it, or use ppo"
        )
    if algorithm.decoupled and algorithm.advantage not in _BY_PARTS:
        raise ConfigError(
            f"algorithm.params.decoupled: {name} does not compare the samples of a prompt, part by part or "
            "as a whole; drop it, or use gdpo"
        )
    _check_correction(algorithm)
    _check_marks(algorithm)
    _check_dual_clip(algorithm)
    return algorithm


def has_critic(name: str) -> bool:
    """Whether the algorithm or preset `name` trains a critic; False for a name that is neither."""
    entry = PRESETS[name].algorithm if name in PRESETS else name
    return entry in ALGORITHMS and ALGORITHMS[entry].needs_critic


def _with_loss(algorithm: Algorithm, name: str) -> Algorithm:
    """The algorithm with the user's own loss; its parameters must not have the name of something else."""
    own = load_function("algorithm.loss", name, "the rows", keywords=True)
    taken = [key for key in parameters(own) if key in _SETTINGS or key in parameters(algorithm.advantage)]
    if taken:
        raise ConfigError(
            f"algorithm.loss: {name}: {taken[0]} is a parameter of every algorithm; give yours another name"
        )
    kept = {key: value for key, value in algorithm.params.items() if key in parameters(algorithm.advantage)}
    return replace(algorithm, loss=own, params=kept, off_policy=False)


def _check_complete(algorithm: Algorithm) -> None:
    """Raises ConfigError for a parameter of the loss that has neither a default nor a value."""
    for key, parameter in parameters(algorithm.loss).items():
        if parameter.default is parameter.empty and key not in algorithm.params:
            raise ConfigError(f"algorithm.params.{key}: the loss has no default for it; set it")


def _check_marks(algorithm: Algorithm) -> None:
    """Raises ConfigError for a range of covariances that no token can be in: nothing would be marked."""
    low, high = (algorithm.loss_params.get(f"cov_{bound}") for bound in ("low", "high"))
    if isinstance(low, float | int) and isinstance(high, float | int) and low >= high:
        raise ConfigError(
            f"algorithm.params.cov_low: {low} leaves no covariance below cov_high = {high}, and nothing "
            "would be marked; lower it"
        )


def _check_dual_clip(algorithm: Algorithm) -> None:
    """Raises ConfigError for a bound of ratios that lies among those which the clip leaves alone."""
    bound, high = (algorithm.loss_params.get(key) for key in ("dual_clip", "eps_high"))
    ours = getattr(algorithm.loss, "__module__", "").startswith("mcore_rl.")
    if ours and isinstance(bound, float | int) and isinstance(high, float | int) and bound < 1 + high:
        raise ConfigError(
            f"algorithm.params.dual_clip: {bound:g} would cut ratios below {1 + high:g}, which eps_high = "
            f"{high:g} leaves alone; raise it (3 is usual), or lower eps_high"
        )


def _check_correction(algorithm: Algorithm) -> None:
    """Raises ConfigError for a bound that the correction does not have, or bounds that leave nothing."""
    place, entry = "algorithm.params.correction", algorithm.corrects
    known = {} if entry is None else resolve(entry.weight, entry.params)
    for bound in ("low", "high"):
        if getattr(algorithm, f"correction_{bound}") is not None and bound not in known:
            raise ConfigError(
                f"{place}_{bound}: has no effect on correction {algorithm.correction!r}; remove it"
            )
    corrected = entry is not None or algorithm.rules
    if corrected and algorithm.off_policy:
        key = place if entry is not None else "algorithm.params.rejection"
        raise ConfigError(
            f"{key}: the ratio of this loss is one to the policy that sampled, and would be corrected twice; "
            "drop it"
        )
    if algorithm.correction_normalized and not corrected:
        raise ConfigError(f"{place}_normalized: there is no correction; set one, or drop it")
    low, high = known.get("low", 0.0), known.get("high", 1.0)
    if not (isinstance(low, float) and isinstance(high, float) and low < high):
        raise ConfigError(f"{place}_low: {low} leaves nothing below correction_high = {high}; lower it")


def objective(
    rows: Rows,
    policy: TokenLoss,
    *,
    correction: Float[Tensor, "*shape"] | float = 1.0,
    kl: Float[Tensor, "*shape"] | float = 0.0,
    kl_coef: float = 0.0,
    entropy: Float[Tensor, "*shape"] | float = 0.0,
    entropy_coef: float = 0.0,
    likelihood: Float[Tensor, "*shape"] | float = 0.0,
) -> Float[Tensor, "*shape"]:
    """correction * policy loss + kl_coef * kl - entropy_coef * entropy - likelihood * log_prob, per token.

    Exactly 0 if not usable. Multiply by the aggregation weight and sum. The correction (losses.CORRECTIONS)
    acts on the policy term only.
    """
    # each term is a kernel or two on a GPU, and is left out where it changes nothing
    loss = policy.loss if _is(correction, 1.0) else correction * policy.loss
    if not _is(kl, 0.0):
        loss = loss + kl_coef * kl
    if not _is(entropy, 0.0):
        loss = loss - entropy_coef * entropy
    if not _is(likelihood, 0.0):
        loss = loss - likelihood * rows.log_prob
    loss = torch.where(rows.usable, loss, 0.0)
    # a policy that is not finite itself is broken, and must be seen as such
    return torch.where(finite(rows.log_prob.detach()), loss, rows.log_prob)


def _is(value: Tensor | float, neutral: float) -> bool:
    return not isinstance(value, Tensor) and value == neutral


def _accepted(algorithm: Algorithm) -> dict[str, Any]:
    """name -> type of everything a user may override."""
    hints = get_type_hints(Algorithm)
    accepted = {f.name: hints[f.name] for f in fields(Algorithm) if f.name in _SETTINGS}
    for function in (algorithm.advantage, algorithm.loss):
        accepted |= types_of(function)
    return accepted
