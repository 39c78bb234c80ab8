"""Golden cases that are whole entries of ALGORITHMS: advantages, loss and gradients; entries.npz."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mcore_rl.algo import advantages, losses
from mcore_rl.algo.algorithms import Algorithm, configure, objective
from mcore_rl.algo.baselines import gradient_energy
from mcore_rl.algo.readings import mark, readings
from mcore_rl.algo.rows import Rows
from mcore_rl.parallel.head import head
from mcore_rl.verify.golden.inputs import GoldenInputs, Outputs

INPUTS = frozenset({"baseline", "parts", "part_weights", "observed"})
OVERRIDES: Mapping[str, Mapping[str, object]] = {
    "kl-cov": {"fraction": 0.1},
    "clip-cov": {"fraction": 0.1, "cov_low": 0.1},
}
"""what makes an entry act on so few tokens"""
NAMES = (
    *("gspo-kept", "sapo-sequence", "gmpo", "vespo", "topr", "dppo-tv", "dppo-kl", "m2po", "clip-cov"),
    *("kl-cov", "dro", "fipo", "grpo-loo", "maxrl", "opo", "passk", "passk-best", "remax", "rae", "otb"),
    *("vc-ppo", "vapo", "gdpo", "echo"),
)
"""entries whose numbers the file has; what the others are made of has cases in the other files"""


def entry_case(p: GoldenInputs, name: str) -> Outputs:
    """All output arrays of `entries.npz/<name>/`."""
    algorithm = configure(name, OVERRIDES.get(name))
    found = _advantage(p, algorithm)
    advantage = found if found.dim() == 2 else p.expand(found)
    weight = p.mask * losses.aggregation_weight(
        algorithm.aggregation,
        p.expand(p.lengths),
        tokens=float(p.lengths.sum()),
        sequences=float(len(p.lengths)),
        max_length=p.scalar("L_max"),
    )
    positive = (p.mask & (p.expand(p.rewards) > 0)).double()
    likelihood = algorithm.positive_nll * positive / positive.sum() / torch.where(p.mask, weight, 1.0)

    def loss_of(log_prob: Tensor, entropy: Tensor) -> Tensor:
        rows = Rows.of(
            log_prob,
            entropy,
            old=p.tensor("old_logp"),
            rollout=p.tensor("rollout_logp"),
            advantage=advantage.to(p.dtype),
        )
        rows = replace(rows, usable=rows.usable & p.mask)
        token = algorithm.loss(replace(rows, extras=_extras(p, algorithm, rows)), **algorithm.loss_params)
        total = objective(rows, token, likelihood=likelihood.to(p.dtype) if algorithm.positive_nll else 0.0)
        loss = losses.weighted_sum(total, weight)
        if algorithm.observation_nll:
            observed = p.tensor("observed", "entries")
            loss = loss - algorithm.observation_nll * (observed / observed.sum() * log_prob).sum()
        return loss

    return {**p.gradients(loss_of), "adv": found}


def _advantage(p: GoldenInputs, algorithm: Algorithm) -> Tensor:
    """[N], or [N, T] where each token has its own."""
    params = algorithm.advantage_params
    statistics = p.statistics._replace(lengths=p.lengths.double(), baseline=_baseline(p))
    if algorithm.decoupled:
        parts, weights = (p.tensor(name, "entries").double() for name in ("parts", "part_weights"))
        return advantages.decoupled(p.groups, parts, weights, partial(algorithm.advantage, **params))
    if not algorithm.per_token and not algorithm.by_token:
        return algorithm.advantage(p.rewards, statistics, **params)
    nothing = torch.zeros(int(p.offsets[-1]), dtype=torch.float64)
    placed = advantages.token_rewards(p.rewards, nothing, nothing, p.offsets, kl_coef=0.0)
    if algorithm.by_token:
        ahead, _ = advantages.gae(placed, nothing, p.offsets, gamma=1.0, lam=1.0)
        return p.unpack(algorithm.advantage(ahead, _energy(p), p.offsets, statistics))
    found, _ = algorithm.advantage(placed, p.rows("values_old").double(), p.offsets, **params)
    return p.unpack(advantages.whiten(found, advantages.Spread.of_rows(found)))


def _baseline(p: GoldenInputs) -> Tensor:
    return p.tensor("baseline", "entries").double()


def _energy(p: GoldenInputs) -> Tensor:
    """[R], from two passes of the head."""
    states, shard, call = p.call(p.tensor("H"), p.tensor("W"))
    hidden = states.flatten(0, 1)
    one, half = (
        head.log_prob_entropy(hidden, shard, call._replace(scale=scale)).log_prob.detach().double()
        for scale in (call.scale, 2 * call.scale)
    )
    return gradient_energy(one, half)[p.mask.flatten()]


def _extras(p: GoldenInputs, algorithm: Algorithm, rows: Rows) -> dict[str, Tensor]:
    """Everything that the loss declares, over the rows of [N, T]."""

    def sums(values: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.where(among, values, 0.0).sum(1, keepdim=True)
        return total.expand_as(values), (total / among.sum(1, keepdim=True).clamp(min=1)).expand_as(values)

    flat = [x.double()[rows.usable] for x in (rows.advantage, rows.old, rows.rollout)]
    chosen = torch.zeros_like(rows.usable)
    chosen[rows.usable] = mark(algorithm.loss, algorithm.loss_params, *flat)
    found = readings(
        algorithm.loss, rows, algorithm.loss_params, sums, marked=chosen, ahead=advantages.sums_ahead
    )
    return {**rows.extras, **found}
