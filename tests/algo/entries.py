"""What the golden file of the entries holds: each algorithm's own formula, dense, padded and in float64.

    python -m tests.algo.entries        # writes tests/golden/entries.npz

An entry's advantages, its loss and the loss's gradient by log-prob, logits, lm_head and hidden states are
written here from its paper, over [N, T] with masks and one log_softmax over the whole vocabulary; nothing of
the library is used. `mcore-rl verify golden tests/golden` computes the same through the library and its head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
EPS = 1e-6


class Batch:
    """The golden batch, with what follows from it by definition."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        given = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
        self.mask, self.rewards = given["mask"].double(), given["rewards"].double()
        self.old, self.rollout, self.values = (
            given[name].double() for name in ("old_logp", "rollout_logp", "values_old")
        )
        self.finite = (self.mask > 0) & self.old.isfinite() & self.rollout.isfinite()
        self.group, self.count = given["group"].tolist(), len(given["rewards"])
        self.lengths = self.mask.sum(1)
        self.hidden, self.weight, self.targets = given["H"].double(), given["W"].double(), given["y"].long()
        self.temperature = float(given["temperature"])
        self.baseline = torch.linspace(-0.5, 0.75, self.count, dtype=torch.float64)
        # a second part of the reward: equal in the group whose first part is, so that nothing differs there
        second = [0.5 if self.group[i] == 1 else (7 * i % 5) / 4 for i in range(self.count)]
        self.parts = torch.stack((self.rewards, torch.tensor(second, dtype=torch.float64)), 1)
        self.part_weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
        # between two turns: what is not trained and has something trained behind it
        self.observed = (self.mask == 0).double() * (self.mask.flip(1).cumsum(1).flip(1) > 0)

    def members(self, i: int) -> list[int]:
        return [j for j in range(self.count) if self.group[j] == self.group[i]]

    def by_group(self, of: Callable[[int, list[int]], float]) -> Tensor:
        """[N] `of(sample, all of its group)`; 0 where all rewards of the group are equal."""
        found = []
        for i in range(self.count):
            its = self.members(i)
            equal = len({self.rewards[j].item() for j in its}) == 1
            found.append(0.0 if equal else of(i, its))
        return torch.tensor(found, dtype=torch.float64)


def mean(b: Batch, its: list[int]) -> float:
    return math.fsum(b.rewards[j].item() for j in its) / len(its)


def deviation(b: Batch, its: list[int]) -> float:
    center = mean(b, its)
    return math.sqrt(math.fsum((b.rewards[j].item() - center) ** 2 for j in its) / max(len(its) - 1, 1))


# --- advantages: [N], or [N, T] ---------------------------------------------------------------------------


def grpo(b: Batch) -> Tensor:
    return b.by_group(lambda i, its: (b.rewards[i].item() - mean(b, its)) / (deviation(b, its) + EPS))


def centered(b: Batch) -> Tensor:
    return b.by_group(lambda i, its: b.rewards[i].item() - mean(b, its))


def leave_one_out(b: Batch) -> Tensor:
    def one(i: int, its: list[int]) -> float:
        rest = [j for j in its if j != i]
        gap, std = b.rewards[i].item() - mean(b, rest), deviation(b, rest)
        return gap / (std + EPS) if len({b.rewards[j].item() for j in rest}) > 1 else gap

    return b.by_group(one)


def gdpo(b: Batch) -> Tensor:
    """Each part is normalised in its group by itself; their weighted sum is, over all samples."""
    found = torch.zeros(b.count, dtype=torch.float64)
    for i in range(b.count):
        for part, weight in zip(b.parts.T.tolist(), b.part_weights.tolist(), strict=True):
            its = [part[j] for j in b.members(i)]
            center = math.fsum(its) / len(its)
            std = math.sqrt(math.fsum((x - center) ** 2 for x in its) / (len(its) - 1))
            found[i] += 0.0 if len(set(its)) == 1 else weight * (part[i] - center) / (std + EPS)
    whole = (found - found.mean()) / (found.std() + EPS)
    differs = [len({tuple(b.parts[j].tolist()) for j in b.members(i)}) > 1 for i in range(b.count)]
    return torch.where(torch.tensor(differs), whole, 0.0)


def opo(b: Batch) -> Tensor:
    def one(i: int, its: list[int]) -> float:
        weighted = math.fsum(b.lengths[j].item() * b.rewards[j].item() for j in its)
        return b.rewards[i].item() - weighted / math.fsum(b.lengths[j].item() for j in its)

    return b.by_group(one)


def maxrl(b: Batch) -> Tensor:
    def one(i: int, its: list[int]) -> float:
        return (b.rewards[i].item() - mean(b, its)) / mean(b, its) if mean(b, its) > 0 else 0.0

    return b.by_group(one)


def passk(b: Batch, k: int = 2) -> Tensor:
    def one(i: int, its: list[int]) -> float:
        n, wrong = len(its), sum(b.rewards[j].item() <= 0 for j in its)
        if n <= k:
            return 0.0
        center = 1 - math.comb(wrong, k) / math.comb(n, k)
        std = math.sqrt(center * (1 - center))
        if std == 0:
            return 0.0
        if b.rewards[i] > 0:
            return (1 - center) / std
        return (1 - center - math.comb(wrong - 1, k - 1) / math.comb(n - 1, k - 1)) / std

    return b.by_group(one)


def best(b: Batch) -> Tensor:
    def one(i: int, its: list[int]) -> float:
        first, second = sorted((b.rewards[j].item() for j in its), reverse=True)[:2]
        chosen = next(j for j in its if b.rewards[j].item() == first)
        return (first - second) / (deviation(b, its) + EPS) if i == chosen else 0.0

    return b.by_group(one)


def beside(b: Batch) -> Tensor:
    return b.rewards - b.baseline


def optimal(b: Batch) -> Tensor:
    """OTB: the t-th trained token of each sample beside those of its group."""
    p = torch.softmax(b.hidden @ b.weight.T / b.temperature, -1)
    own = p.gather(-1, b.targets[..., None])[..., 0]
    energy = 1 - 2 * own + p.square().sum(-1)
    found = torch.zeros_like(b.mask)
    for i in range(b.count):
        for t, place in enumerate(torch.nonzero(b.mask[i])[:, 0].tolist()):
            weights, values = [], []
            for j in b.members(i):
                at = torch.nonzero(b.mask[j])[:, 0]
                if len(at) > t:
                    weights.append(energy[j, at[: t + 1]].sum().item())
                    values.append(b.rewards[j].item())
            total = math.fsum(w * v for w, v in zip(weights, values, strict=True))
            equal = len(set(values)) == 1
            found[i, place] = 0.0 if equal else b.rewards[i].item() - total / math.fsum(weights)
    return found


def critic(b: Batch, lam: Callable[[int], float]) -> Tensor:
    """GAE with gamma 1, one lambda a response, whitened over all tokens by the variance over n - 1."""
    found = torch.zeros_like(b.mask)
    for i in range(b.count):
        at = torch.nonzero(b.mask[i])[:, 0].tolist()
        later, following = 0.0, 0.0
        for number, t in reversed(list(enumerate(at))):
            reward = b.rewards[i].item() if number == len(at) - 1 else 0.0
            later = reward + following - b.values[i, t].item() + lam(len(at)) * later
            following, found[i, t] = b.values[i, t].item(), later
    flat = found[b.mask > 0]
    return torch.where(b.mask > 0, (found - flat.mean()) / (flat.var() + 1e-8).sqrt(), 0.0)


# --- losses: [N, T] of a token, to be aggregated ----------------------------------------------------------


def clipped(a: Tensor, r: Tensor, low: float, high: float) -> Tensor:
    return torch.maximum(-a * r, -a * r.clamp(1 - low, 1 + high))


def ppo(b: Batch, lp: Tensor, a: Tensor, high: float = 0.2) -> Tensor:
    return clipped(a, (lp - b.old).exp(), 0.2, high)


def reinforce(b: Batch, lp: Tensor, a: Tensor) -> Tensor:
    return -a * lp


def over(b: Batch, values: Tensor) -> Tensor:
    """[N, 1] sums over a response."""
    return torch.where(b.finite, values, 0.0).sum(1, keepdim=True)


def average(b: Batch, values: Tensor) -> Tensor:
    return over(b, values) / b.finite.sum(1, keepdim=True).clamp(min=1)


def gmpo(b: Batch, lp: Tensor, a: Tensor) -> Tensor:
    d = lp - b.old
    d = torch.where(a > 0, d.clamp(max=0.4), d.clamp(min=-0.4))
    return -a * average(b, d).exp()


def gspo(b: Batch, lp: Tensor, a: Tensor) -> Tensor:
    return clipped(a, average(b, lp - b.old).exp().expand_as(lp), 3e-4, 4e-4)


def sapo_sequence(b: Batch, lp: Tensor, a: Tensor) -> Tensor:
    tau = torch.where(a > 0, 1.0, 1.05 + 0 * a)
    return -a * torch.sigmoid(tau * (average(b, lp - b.old).exp() - 1)) * 4 / tau


def vespo(b: Batch, lp: Tensor, a: Tensor) -> Tensor:
    w = over(b, lp - b.rollout).detach()
    k, decay = (torch.where(a >= 0, x, y + 0 * a) for x, y in ((2.0, 3.0), (3.0, 2.0)))
    return -(w.exp() ** k) * (decay * (1 - w.exp())).exp() * a * lp


def topr(b: Batch, lp: Tensor, a: Tensor) -> Tensor:
    w = over(b, lp - b.rollout).detach().exp()
    return -torch.where(a < 0, w.clamp(max=1.0), 1.0) * a * lp


def dppo_tv(b: Batch, lp: Tensor, a: Tensor) -> Tensor:
    p, mu = lp.detach().exp(), b.rollout.exp()
    outside = torch.where(a > 0, p - mu > 0.2, mu - p > 0.2)
    return torch.where(outside, 0.0, -(p / mu).clamp(max=20.0) * a * lp)


def dppo_kl(b: Batch, lp: Tensor, a: Tensor) -> Tensor:
    p, mu = lp.detach().exp(), b.rollout.exp()
    kl = mu * (mu / p).log() + (1 - mu) * ((1 - mu) / (1 - p)).log()
    outside = torch.where(a > 0, p > mu, p < mu) & (kl > 0.05)
    return torch.where(outside, 0.0, -(p / mu).clamp(max=20.0) * a * lp)


def m2po(b: Batch, lp: Tensor, a: Tensor) -> Tensor:
    square = torch.where(b.finite, (b.old - b.rollout) ** 2, 0.0)
    kept = sorted(square[b.finite].tolist())
    while kept and math.fsum(kept) / len(kept) > 0.04:
        kept.pop()
    return torch.where(square > kept[-1], 0.0, -a * (lp - b.rollout).exp())


def covariance(b: Batch, a: Tensor) -> tuple[Tensor, Tensor]:
    """(of the tokens in their order, their places)."""
    places = torch.nonzero(b.finite)
    its, old = a.expand_as(b.old)[b.finite], b.old[b.finite]
    return (its - its.mean()) * (old - old.mean()), places


def chosen(b: Batch, places: Tensor) -> Tensor:
    found = torch.zeros_like(b.finite)
    found[places[:, 0], places[:, 1]] = True
    return found


def kl_cov(b: Batch, lp: Tensor, a: Tensor) -> Tensor:
    values, places = covariance(b, a)
    top = sorted(range(len(values)), key=lambda i: -values[i].item())[: max(1, int(0.1 * len(values)))]
    d = lp - b.old
    return -a * d.exp() + torch.where(chosen(b, places[top]), d.abs(), 0.0)


def clip_cov(b: Batch, lp: Tensor, a: Tensor) -> Tensor:
    values, places = covariance(b, a)
    band = [i for i, value in enumerate(values.tolist()) if 0.1 < value < 5.0]
    drawn = torch.randperm(len(band), generator=torch.Generator().manual_seed(len(values))).tolist()
    picked = [band[i] for i in drawn[: max(1, int(0.1 * len(values)))]]
    return torch.where(chosen(b, places[picked]), 0.0, ppo(b, lp, a))


def dro(b: Batch, lp: Tensor, a: Tensor) -> Tensor:
    return -a * lp + (lp - b.old) ** 2 / 2


def fipo(b: Batch, lp: Tensor, a: Tensor) -> Tensor:
    d = torch.where(b.finite, (lp - b.old).detach(), 0.0)
    d = torch.where(d > math.log(10.0), 0.0, d)
    width = d.shape[1]
    ahead = [sum(2.0 ** (-(k - t) / 32) * d[:, k] for k in range(t, width)) for t in range(width)]
    weighted = torch.stack(ahead, 1).exp().clamp(1.0, 1.2) * a  # type: ignore[arg-type]
    r = (lp - b.old).exp()
    loss = clipped(weighted, r, 0.2, 0.28)
    return torch.where(weighted < 0, torch.minimum(loss, -10.0 * weighted), loss)


TOKEN, SEQUENCE, SUM = "token-mean", "seq-mean-token-mean", "seq-mean-token-sum"
Entry = tuple[Callable[[Batch], Tensor], Callable[..., Tensor], str]
ENTRIES: Mapping[str, Entry] = {
    "gspo-kept": (grpo, gspo, SEQUENCE),
    "sapo-sequence": (grpo, sapo_sequence, SEQUENCE),
    "gmpo": (grpo, gmpo, SEQUENCE),
    "vespo": (grpo, vespo, TOKEN),
    "topr": (centered, topr, SUM),
    "dppo-tv": (grpo, dppo_tv, TOKEN),
    "dppo-kl": (grpo, dppo_kl, TOKEN),
    "m2po": (grpo, m2po, TOKEN),
    "clip-cov": (grpo, clip_cov, TOKEN),
    "kl-cov": (grpo, kl_cov, TOKEN),
    "dro": (centered, dro, TOKEN),
    "fipo": (grpo, fipo, TOKEN),
    "grpo-loo": (leave_one_out, ppo, TOKEN),
    "maxrl": (maxrl, ppo, TOKEN),
    "opo": (opo, reinforce, TOKEN),
    "passk": (passk, ppo, TOKEN),
    "passk-best": (best, ppo, TOKEN),
    "remax": (beside, reinforce, SUM),
    "rae": (beside, reinforce, SUM),
    "otb": (optimal, reinforce, TOKEN),
    "vc-ppo": (lambda b: critic(b, lambda n: 0.95), ppo, TOKEN),
    "vapo": (
        lambda b: critic(b, lambda n: max(0.0, 1 - 1 / (0.05 * n))),
        lambda b, lp, a: ppo(b, lp, a, high=0.28),
        TOKEN,
    ),
    "gdpo": (gdpo, ppo, SEQUENCE),
    "echo": (grpo, ppo, TOKEN),
}
"""name -> advantages, loss of a token, aggregation; the numbers are the entries' defaults, but for OVERRIDES
of verify/golden/entries.py"""


def weights(b: Batch, aggregation: str) -> Tensor:
    if aggregation == TOKEN:
        return b.mask / b.mask.sum()
    each = b.mask / b.count
    return each / b.lengths.clamp(min=1)[:, None] if aggregation == SEQUENCE else each


def differentiated(b: Batch, name: str) -> dict[str, np.ndarray]:
    """All arrays of `entries.npz/<name>/`."""
    advantage, token, aggregation = ENTRIES[name]
    adv = advantage(b)
    a = adv if adv.dim() == 2 else adv[:, None]
    hidden, weight = b.hidden.clone().requires_grad_(), b.weight.clone().requires_grad_()
    logits = hidden @ weight.T
    lp = torch.log_softmax(logits / b.temperature, -1).gather(-1, b.targets[..., None])[..., 0]
    each = torch.where(b.finite, token(b, torch.where(b.finite, lp, 0.0), a), 0.0)
    total = (weights(b, aggregation) * each).sum()
    if name == "vapo":
        positive = b.mask * (b.rewards > 0)[:, None]
        total = total - 0.1 * (torch.where(b.finite, lp, 0.0) * positive).sum() / positive.sum()
    if name == "echo":
        total = total - 0.1 * (lp * b.observed).sum() / b.observed.sum()
    gradients = torch.autograd.grad(total, (lp, logits, weight, hidden))
    found = dict(zip(("coef", "dlogits", "dW", "dH"), (x.numpy() for x in gradients), strict=True))
    return {"adv": adv.numpy(), "loss": total.detach().numpy(), **found}


def expected() -> dict[str, np.ndarray]:
    """Everything that the file holds."""
    with np.load(GOLDEN / "batch.npz") as arrays:
        batch = Batch(arrays)
    found = {key: getattr(batch, key).numpy() for key in ("baseline", "parts", "part_weights", "observed")}
    for name in ENTRIES:
        found |= {f"{name}/{key}": array for key, array in differentiated(batch, name).items()}
    return found


if __name__ == "__main__":
    np.savez_compressed(GOLDEN / "entries.npz", **expected())  # type: ignore[arg-type]
