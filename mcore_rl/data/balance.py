"""Spread sequences over data-parallel ranks so that every rank has the same real work.

Every function is pure and its arithmetic on loads is in integers, so all ranks compute the same answer.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mcore_rl.errors import ConfigError, DataError, LayoutError

_COST_BITS = 40
"""Costs become integers of at most this many bits: sums of 8 million of them are exact in int64."""
_GOOD_ENOUGH = 1e-3
"""Stop refining once the heaviest rank is within this share of the mean."""
_CANDIDATES = 1 << 13
"""Moves and swaps looked at together in one refinement step."""


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder that its FLOPs depend on."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    ffn: float
    """Mean over the layers of the intermediate size one token passes through (MoE: active experts only)."""
    experts: float = 0.0
    """Mean over the layers of the router's width; 0 for a dense model."""
    routed: float = 0.0
    """Mean over the layers of the experts that a token is sent to."""
    windowed: int = 0
    """Layers in which a token sees the last `window` tokens only."""
    window: int = 0
    """Its own is one of them."""
    latent: LatentShape | None = None
    """Keys and values come from a small vector of the token."""

    @property
    def attention_weights(self) -> int:
        """Parameters of a layer's attention."""
        if self.latent is None:
            return 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        queries, keys_values = (self.heads * width for width in (self.head_dim, self.latent.key_and_value))
        rank = self.latent.query_rank
        asked = self.hidden * queries if rank is None else rank * (self.hidden + queries)
        made = self.hidden * self.cached + self.latent.rank * keys_values
        return asked + made + self.hidden * self.heads * self.latent.value

    @property
    def cached(self) -> int:
        """Numbers of a token in a layer that a server keeps."""
        if self.latent is None:
            return 2 * self.kv_heads * self.head_dim
        return self.latent.rank + self.latent.turned


@dataclass(frozen=True)
class LatentShape:
    """The widths of latent attention (model.hf.latent)."""

    query_rank: int | None
    rank: int
    turned: int
    key_and_value: int
    """channels of a head's key that are not turned, and of its value"""
    value: int


def model_shape(hf_config: Mapping[str, Any]) -> ModelShape:
    """Shape of a model from its Hugging Face `config.json`, dense or MoE, by the names of every family.

    Raises ConfigError for a missing number.
    """
    get = hf_config.get
    try:
        layers, heads = int(hf_config["num_hidden_layers"]), int(hf_config["num_attention_heads"])
        sparse = _sparse_layers(hf_config)
        latent = _latent_shape(hf_config) if get("kv_lora_rank") else None
        head_dim = hf_config["qk_nope_head_dim"] + latent.turned if latent else get("head_dim")
        dense_width = hf_config["intermediate_size"]
        sparse_width = get("shared_expert_intermediate_size") or 0
        if sparse:
            expert_width = get("moe_intermediate_size") or dense_width
            sparse_width += (hf_config["num_experts_per_tok"] + (get("n_shared_experts") or 0)) * expert_width
        return ModelShape(
            layers=layers,
            hidden=int(hf_config["hidden_size"]),
            heads=heads,
            kv_heads=int(get("num_key_value_heads") or heads),
            head_dim=int(head_dim or hf_config["hidden_size"] // heads),
            vocab=int(hf_config["vocab_size"]),
            ffn=((layers - sparse) * dense_width + sparse * sparse_width) / layers,
            experts=_num_experts(hf_config) * sparse / layers,
            routed=hf_config["num_experts_per_tok"] * sparse / layers if sparse else 0.0,
            latent=latent,
        )
    except KeyError as error:
        raise ConfigError(
            f"config.json: {error.args[0]} is missing, and the cost of a sequence depends on it; add it"
        ) from None


def _latent_shape(hf_config: Mapping[str, Any]) -> LatentShape:
    plain, value = hf_config["qk_nope_head_dim"], hf_config["v_head_dim"]
    return LatentShape(
        query_rank=hf_config.get("q_lora_rank"),
        rank=hf_config["kv_lora_rank"],
        turned=hf_config["qk_rope_head_dim"],
        key_and_value=plain + value,
        value=value,
    )


def _num_experts(hf_config: Mapping[str, Any]) -> int:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return int(next((hf_config[name] for name in names if hf_config.get(name)), 0))


def _sparse_layers(hf_config: Mapping[str, Any]) -> int:
    """Layers whose MLP is a mixture of experts, by the rules of Qwen's and DeepSeek's configurations."""
    if not _num_experts(hf_config):
        return 0
    dense, step = hf_config.get("mlp_only_layers") or (), hf_config.get("decoder_sparse_step") or 1
    first = hf_config.get("first_k_dense_replace") or 0
    layers = range(int(first), int(hf_config["num_hidden_layers"]))
    return sum(i not in dense and (i + 1) % step == 0 for i in layers)


def forward_flops(
    lengths: npt.ArrayLike, shape: ModelShape, scored: npt.ArrayLike | None = None
) -> npt.NDArray[np.float64]:
    """Forward floating-point operations of each sequence, two per multiply-add; backward costs twice that.

    The projections of attention, grouped-query or latent, the causal half of the attention matrix, in layers
    with a window its band of that half, the three SwiGLU matrices of the active experts, and the head on the
    scored tokens only.

    Args:
        lengths: [N] tokens per sequence, prompt and response.
        scored: [N] tokens whose log-prob is computed; None means all of them.
    """
    s = np.asarray(lengths, np.float64)
    rows = s if scored is None else np.asarray(scored, np.float64)
    value_dim = shape.head_dim if shape.latent is None else shape.latent.value
    projections = 2 * shape.attention_weights
    mlp = 6 * shape.hidden * shape.ffn + 2 * shape.hidden * shape.experts
    each = shape.heads * (shape.head_dim + value_dim)
    full = each * s * s
    ahead = np.maximum(s - shape.window, 0)  # the triangle of what lies before the windows
    saved = each * ahead * ahead * shape.windowed
    layers = shape.layers * (s * (projections + mlp) + full) - saved
    return layers + 2 * shape.hidden * shape.vocab * rows


def balance(costs: npt.ArrayLike, ranks: int) -> list[list[int]]:
    """Split sequences over `ranks` so that the largest summed cost is close to the mean; counts may differ.

    Longest processing time first (Graham 1969), then moves and swaps away from the heaviest rank until it is
    within 0.1 % of the mean, holds a single sequence, or no exchange helps.

    Args:
        costs: [N] non-negative, any unit (`forward_flops`).
    Returns:
        One ascending list of indices into `costs` per rank; empty lists where N < ranks.
    Raises:
        DataError: a cost is negative or not finite.
        LayoutError: `ranks` < 1.
    """
    if ranks < 1:
        raise LayoutError(f"balance over {ranks} ranks; at least 1 is needed")
    units = _integer_costs(costs)
    owner = _refine(units, _longest_first(units, ranks), ranks)
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=ranks))[:-1]
    return [part.tolist() for part in np.split(order, ends)]


def _integer_costs(costs: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """[N] costs in [1, 2^40]: exact sums in any order, and an item of cost 0 still counts as one."""
    values = np.asarray(costs, np.float64)
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if bad.size:
        raise DataError(f"cost of sequence {bad[0]} is {values[bad[0]]}; give a finite number >= 0")
    top = values.max(initial=0.0) or 1.0
    return np.maximum(np.floor(values / top * 2.0**_COST_BITS), 1).astype(np.int64)


def _longest_first(units: npt.NDArray[np.int64], ranks: int) -> npt.NDArray[np.int64]:
    """[N] owner of each item: in descending order of cost, each goes to the lightest rank so far."""
    order = np.argsort(-units, kind="stable")
    loads = [(0, rank) for rank in range(ranks)]
    owners = []
    for unit in units[order].tolist():
        load, rank = loads[0]
        owners.append(rank)
        heapq.heapreplace(loads, (load + unit, rank))
    owner = np.empty(units.size, np.int64)
    owner[order] = owners
    return owner


def _refine(units: npt.NDArray[np.int64], owner: npt.NDArray[np.int64], ranks: int) -> npt.NDArray[np.int64]:
    """Exchange items between the heaviest rank and lighter ones while the larger of the two loads falls."""
    loads = np.zeros(ranks, np.int64)
    np.add.at(loads, owner, units)
    goal = units.sum() * (1 + _GOOD_ENOUGH) / ranks
    for _ in range(8 * ranks):
        top = int(loads.argmax())
        mine = np.flatnonzero(owner == top)
        if loads[top] <= goal or mine.size <= 1:
            break
        theirs = _lightest_partners(owner, loads, _CANDIDATES // mine.size)
        taker = np.append(owner[theirs], loads.argmin())
        shift = units[mine][:, None] - np.append(units[theirs], 0)[None, :]
        larger = np.maximum(loads[top] - shift, loads[taker][None, :] + shift)
        give, take = np.unravel_index(larger.argmin(), larger.shape)
        if larger[give, take] >= loads[top]:
            break
        moved, rank = shift[give, take], taker[take]
        owner[mine[give]] = rank
        if take < theirs.size:
            owner[theirs[take]] = top
        loads[top] -= moved
        loads[rank] += moved
    return owner


def _lightest_partners(
    owner: npt.NDArray[np.int64], loads: npt.NDArray[np.int64], limit: int
) -> npt.NDArray[np.int64]:
    """Items of the lightest ranks, whole ranks at a time, about `limit` of them; the heaviest's never."""
    by_load = np.argsort(loads, kind="stable")[:-1]
    by_load = by_load[by_load != loads.argmax()]
    sizes = np.cumsum(np.bincount(owner, minlength=loads.size)[by_load])
    chosen = np.zeros(loads.size, bool)
    chosen[by_load[: 1 + np.searchsorted(sizes, limit)]] = True
    return np.flatnonzero(chosen[owner])


def max_over_mean(costs: npt.ArrayLike, parts: Sequence[Sequence[int]]) -> float:
    """Heaviest part's summed cost over the mean of all parts: 1.0 is perfect, and the answer without cost."""
    values = np.asarray(costs, np.float64)
    loads = np.array([values[list(part)].sum() for part in parts])
    return float(loads.max() / loads.mean()) if loads.sum() else 1.0
