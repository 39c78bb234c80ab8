"""The section of adapters, and what of a run goes without them or is not for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import AfterValidator, Field

from mcore_rl.config.sections import (
    FilePath,
    Kind,
    ModelConfig,
    NonNegative,
    OptimizerConfig,
    Positive,
    PublishConfig,
    Section,
    Seed,
)
from mcore_rl.lora import DENSE_TARGETS, Target


def _each_once(targets: tuple[Target, ...]) -> tuple[Target, ...]:
    if len(set(targets)) < len(targets):
        raise ValueError("names a target twice; name it once")
    return targets


class LoraConfig(Section):
    """Adapters (LoRA) that are trained in the place of the policy's weights, which stay frozen."""

    rank: NonNegative = 0
    """Rank of every adapter; 0 trains the weights themselves."""
    alpha: Positive = 32.0
    """An adapter B A acts as alpha / rank times B A."""
    targets: Annotated[tuple[Target, ...], Field(min_length=1), AfterValidator(_each_once)] = DENSE_TARGETS
    """Matrices with an adapter: `qkv`, `proj` (attention's output), `fc1` (gate, up), `fc2` (down), `experts`
    (all three of every routed expert); each that Hugging Face has apart has one of its own."""
    rslora: bool = False
    """The factor is alpha / sqrt(rank)."""
    seed: Seed = 0
    """Random A follow from it; B start at 0."""
    path: FilePath | None = None
    """Directory of an adapter in PEFT's format to start from; its rank, alpha and targets must be these."""


def wrong_lora(
    lora: LoraConfig,
    kind: Kind,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    publish: PublishConfig,
) -> Iterator[str]:
    """`section.key: what, remedy` for what cannot go with adapters, or without."""
    alone = publish.transport == "adapter"
    if not lora.rank:
        if alone:
            yield 'publish.transport: there is no adapter to publish; set lora.rank, or it to "disk"'
        return
    if alone and "experts" in lora.targets:
        yield (
            "publish.transport: adapters of experts are not published by themselves; set it to "
            '"disk", or leave "experts" out of lora.targets'
        )
    if alone and publish.quantize != "none":
        yield (
            "publish.quantize: servers hold model.path itself; start them on a model in FP8, or set "
            'publish.transport = "disk"'
        )
    if alone and model.random_init:
        yield (
            "publish.transport: servers need the frozen weights, and model.random_init has none in "
            'model.path; set it to "disk"'
        )
    if kind == "reward_model":
        yield "lora.rank: the score of a reward model is trained from 0 and has no adapter; drop [lora]"
    if model.fp8_param_gather:
        yield "model.fp8_param_gather: frozen weights are not gathered; drop it, or [lora]"
    if optimizer.router_bias_rate:
        yield "optimizer.router_bias_rate: routers' biases are frozen too; set it to 0, or drop [lora]"


def unused_of_lora(lora: LoraConfig) -> Mapping[str, str]:
    """Keys that have no effect -> why."""
    if not lora.rank:
        keys = (name for name in LoraConfig.model_fields if name != "rank")
        return dict.fromkeys((f"lora.{name}" for name in keys), "lora.rank is 0")
    unused = {"residency.reference": "lora.rank is set, and the reference is the policy without its adapters"}
    if lora.path is not None:
        unused["lora.seed"] = "lora.path has the numbers to start from"
    return unused
