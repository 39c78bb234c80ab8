"""The mixture of experts that config.json asks for, or a refusal by the name of the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mcore_rl.errors import ConfigError


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: no capacity limit, no auxiliary loss."""

    count: int
    per_token: int
    """experts that each token is sent to"""
    intermediate: int
    normalized: bool
    """the weights of a token's experts sum to 1, before `scale`"""
    sparse_layers: tuple[bool, ...]
    """[layers] True where the MLP is a mixture"""
    sigmoid: bool = False
    """scores are sigmoids, and experts are chosen by score plus a bias of their own; else softmax alone"""
    groups: int = 1
    groups_per_token: int = 1
    """a token's experts are of the best so many groups"""
    judged_by: int = 2
    """a group is judged by the sum of so many of its best scores"""
    scale: float = 1.0
    """of the weights of a token's experts"""
    shared: int = 0
    """hidden size of an MLP beside the experts that reads every token; 0 for none"""
    shared_gate: bool = False
    """what it adds is weighed by a sigmoid of the token"""
    biased: bool = False
    """the router and both matrices of an expert have a bias"""


def read_experts(hf: Mapping[str, Any], where: str, *, sigmoid: bool) -> Experts:
    """The mixture of a config.json whose fields have their types and the names that they are read by.

    Raises:
        ConfigError: two fields contradict each other; KeyError: one is missing.
    """
    if hf.get("num_local_experts", hf.get("num_experts")) != hf.get(
        "num_experts", hf.get("num_local_experts")
    ):
        raise ConfigError(f"{where}: num_experts contradicts num_local_experts; keep one")
    # These have no such field: their weights always sum to 1.
    always = "norm_topk_prob" not in hf and hf["model_type"] in ("mixtral", "gpt_oss")
    # DeepSeek-V2 tells whether it has groups apart from how many.
    method = hf.get("topk_method")
    if not sigmoid and method not in (None, "greedy", "group_limited_greedy"):
        raise ConfigError(
            f"{where}: topk_method = {method!r} is not supported, only greedy and group_limited_greedy"
        )
    groups = 1 if method == "greedy" else hf.get("n_group", 1)
    return Experts(
        count=hf["num_experts" if "num_local_experts" not in hf else "num_local_experts"],
        per_token=hf["num_experts_per_tok"],
        intermediate=hf["moe_intermediate_size"],
        normalized=always or hf.get("norm_topk_prob", False),
        sparse_layers=_sparse_layers(hf),
        sigmoid=sigmoid,
        groups=groups,
        groups_per_token=min(hf.get("topk_group", 1), groups),
        judged_by=2 if sigmoid else 1,
        scale=float(hf.get("routed_scaling_factor", 1.0)),
        shared=_shared(hf),
        shared_gate="shared_expert_intermediate_size" in hf,
        biased=hf["model_type"] == "gpt_oss",
    )


def _sparse_layers(hf: Mapping[str, Any]) -> tuple[bool, ...]:
    dense, step = hf.get("mlp_only_layers", []), hf.get("decoder_sparse_step", 1)
    first = hf.get("first_k_dense_replace", 0)
    return tuple(
        layer >= first and layer not in dense and (layer + 1) % step == 0
        for layer in range(hf["num_hidden_layers"])
    )


def _shared(hf: Mapping[str, Any]) -> int:
    if "shared_expert_intermediate_size" in hf:
        return hf["shared_expert_intermediate_size"]
    return hf.get("n_shared_experts", 0) * hf["moe_intermediate_size"]


def check_experts(experts: Experts, where: str) -> None:
    """Raises ConfigError for numbers that contradict each other, or that no router is built of."""
    if experts.per_token > experts.count:
        raise ConfigError(
            f"{where}: num_experts_per_tok = {experts.per_token} of num_experts = {experts.count}; correct "
            "the one that is wrong"
        )
    if experts.normalized and experts.per_token == 1:
        # The weight of the only expert is 1 whatever the router says; Megatron-Core refuses to build it.
        raise ConfigError(
            f"{where}: num_experts_per_tok = 1 with norm_topk_prob = true gives every token the weight 1, so "
            "that the router would get no gradient, and Megatron-Core has no such router; take a model with "
            "2 or more experts per token, or with norm_topk_prob = false"
        )
    _check_groups(experts, where)


def _check_groups(experts: Experts, where: str) -> None:
    if experts.count % experts.groups or experts.groups_per_token * (experts.count // experts.groups) < (
        experts.per_token
    ):
        raise ConfigError(
            f"{where}: n_group = {experts.groups} and topk_group = {experts.groups_per_token} do not leave "
            f"num_experts_per_tok = {experts.per_token} of {experts.count} experts; correct the wrong one"
        )
    size = experts.count // experts.groups
    if experts.groups > 1 and size < experts.judged_by:
        raise ConfigError(
            f"{where}: n_group = {experts.groups} makes groups of {size} experts, and a group is judged by "
            f"its {experts.judged_by} best; correct n_group or n_routed_experts"
        )
