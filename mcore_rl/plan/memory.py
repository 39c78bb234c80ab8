"""Bytes on one rank of every pipeline stage, by component.

Parameters, gradients and optimizer state are exact. Activations count what autograd keeps of Megatron's
layers with the portable norm and attention (model/portable.py), for full micro-batches of equal lengths;
`tests/plan/test_memory.py` compares them with what a step really keeps. In fp32 the plan is for those
portable parts, whose linear layers keep no inputs (model/again.py); in bf16 and FP8 it is for Transformer
Engine's, which do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from mcore_rl.data.balance import ModelShape
from mcore_rl.lora import Lora
from mcore_rl.model.hf.adapters import AdapterMap
from mcore_rl.model.hf.architecture import Architecture
from mcore_rl.model.hf.experts import Experts
from mcore_rl.model.hf.parameters import ParameterMap
from mcore_rl.model.layouts import DTYPES, padded_vocab
from mcore_rl.model.phases import NEEDED, PHASES
from mcore_rl.parallel.head.passes import Tiling
from mcore_rl.parallel.layout import Layout
from mcore_rl.plan.count import StageCount, count_adapters, count_critic, count_policy, layers_of
from mcore_rl.plan.work import PlannedStep
from mcore_rl.precision import ITEM_BYTES

_STATE = (
    *("weights", "gradients", "optimizer", "reference", "critic", "critic_optimizer", "reward_model"),
    *("teacher", "teacher_said", "server_weights", "kv_cache", "other"),
)
"""components that stay, unless they are offloaded; the others come and go with a phase"""
GIB = 1 << 30
OTHER = 3 * GIB
"""CUDA context, NCCL buffers and fragmentation of one rank: an allowance, not a measurement"""
SERVER_MEMORY_SHARE = 0.5
"""share of the KV cache that all samples of a step would need at once; servers queue the rest"""
_GATE_UP = 2
"""widths that a SwiGLU keeps"""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank."""

    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    reference: float = 0
    critic: float = 0
    """its weights and gradients"""
    critic_optimizer: float = 0
    reward_model: float = 0
    teacher: float = 0
    """weights of the teachers, less their output layers on the last stage"""
    teacher_said: float = 0
    """last stage: those output layers, and the hidden states of a step's tokens"""
    activations: float = 0
    """kept from forward to backward"""
    masks: float = 0
    """of what is kept, who sees whom under context parallelism: read by the portable attention alone"""
    layer_backward: float = 0
    """while one layer is in its backward pass"""
    head: float = 0
    critic_step: float = 0
    """at most during its forward and backward: as `step`, without a vocabulary"""
    publish: float = 0
    """buffers of a gather for the servers"""
    server_weights: float = 0
    kv_cache: float = 0
    other: float = OTHER
    host: float = 0
    """not on the GPU: in pinned host memory, what of the above is offloaded or swapped"""
    offloaded: frozenset[str] = frozenset()
    """components that are on the GPU only in the phases of phases.NEEDED"""

    @property
    def step(self) -> float:
        """At most during forward and backward: the head and the layers take turns."""
        return self.activations + self.masks + max(self.layer_backward, self.head)

    def at(self, phase: str) -> float:
        """At most during one of phases.PHASES."""
        # no more than that: a layer or the head, forward only, and one micro-batch's mask
        scoring = self.masks + max(self.layer_backward, self.head)
        working = {"policy": self.step, "critic": self.critic_step, "publish": self.publish}
        working |= dict.fromkeys(("rewards", "reference", "teacher", "values"), scoring)
        state = sum(
            getattr(self, name)
            for name in _STATE
            if name not in self.offloaded or phase in NEEDED.get(name, ())
        )
        return state + working.get(phase, 0)

    @property
    def total(self) -> float:
        """At the worst moment: the phases take turns."""
        return max(self.at(phase) for phase in PHASES)


def stage_memory(arch: Architecture, layout: Layout, work: PlannedStep) -> list[RankMemory]:
    """The memory of a rank of each pipeline stage, first to last."""
    policy = count_critic(arch, layout) if work.value_head else count_policy(arch, layout)
    teachers = [count_policy(teacher, layout) for teacher in work.teachers]
    nothing = [StageCount()] * layout.pipeline
    adapters = nothing if work.lora is None else count_adapters(arch, work.lora, layout)
    critic = nothing if work.critic is None else count_critic(work.critic, layout)
    judge = nothing if work.reward_model is None else count_critic(work.reward_model, layout)
    size = weight_bytes(work.precision)
    stages = []
    for stage, count in enumerate(policy):
        trained = count if work.lora is None else adapters[stage]
        waiting: dict[str, float] = {
            "optimizer": (1 - work.cpu_fraction) * optimizer_bytes(trained, layout, work),
            # Of frozen weights, the reference is these themselves.
            "reference": size * count.total * (work.reference and work.lora is None),
            "reward_model": _judge_bytes(judge[stage], layout, work, stage),
            "teacher": sum(size * its[stage].total for its in teachers) - _heads(layout, work, stage),
            "critic": critic_bytes(critic[stage], layout, work, stage),
            "critic_optimizer": (1 - work.cpu_fraction)
            * critic_optimizer_bytes(critic[stage], layout, work, stage),
        }
        stages.append(
            RankMemory(
                weights=_weights(count, work) + size * adapters[stage].total,
                gradients=4 * trained.total,
                **(waiting | {"reference": waiting["reference"] * (not work.swapped)}),
                teacher_said=_heads(layout, work, stage) + _states(layout, work, stage),
                activations=kept_bytes(arch, layout, work, stage),
                masks=mask_bytes(layout, work, stage),
                layer_backward=backward_bytes(arch, layout, work, stage),
                head=head_bytes(arch, layout, work) * (stage == layout.pipeline - 1 and not work.value_head),
                critic_step=_critic_step(layout, work, stage),
                publish=publish_bytes(arch, layout, work),
                server_weights=_server_weights(policy, layout) * work.colocated,
                kv_cache=_kv_cache(arch, layout, work) * work.colocated,
                host=_host(waiting, 4 * critic[stage].total, work)
                + _updated_on_cpu(optimizer_bytes(count, layout, work), work)
                + _updated_on_cpu(critic_optimizer_bytes(critic[stage], layout, work, stage), work),
                offloaded=work.offloaded,
            )
        )
    return stages


def weight_bytes(precision: str) -> int:
    """Bytes of one parameter or activation."""
    return ITEM_BYTES[precision]


def _weights(count: StageCount, work: PlannedStep) -> float:
    """fp8 keeps row- and column-wise fp8 copies of the layers' matrices, beside the bf16 ones or instead."""
    size, matrices = weight_bytes(work.precision), count.matrices + count.experts
    if work.precision != "fp8":
        return size * count.total
    return size * (count.total - matrices * work.fp8.param_gather) + 2 * matrices


def optimizer_bytes(count: StageCount, layout: Layout, work: PlannedStep) -> float:
    """Adam's two moments in fp32, and fp32 weights where the model's are not; sharded where distributed."""
    per_parameter = 8 if work.precision == "fp32" else 12
    if not work.distributed_optimizer:
        return per_parameter * count.total
    replicas = layout.data * layout.context
    expert_replicas = layout.data * layout.context * layout.tensor / layout.expert
    return per_parameter * (count.dense / replicas + count.experts / expert_replicas)


def critic_bytes(count: StageCount, layout: Layout, work: PlannedStep, stage: int) -> float:
    """Weights and gradients; the value head's weights are in fp32 at least."""
    wider = (4 - weight_bytes(work.precision)) * _value_head(layout, work, stage)
    return _weights(count, work) + 4 * count.total + wider


def _judge_bytes(count: StageCount, layout: Layout, work: PlannedStep, stage: int) -> float:
    """Weights of the reward model; its value head's are in fp32 at least."""
    size = weight_bytes(work.precision)
    head = work.reward_model.hidden if work.reward_model and stage == layout.pipeline - 1 else 0
    return size * count.total + (4 - size) * head


def _heads(layout: Layout, work: PlannedStep, stage: int) -> float:
    """Output layers of the teachers on a rank of a stage."""
    if stage < layout.pipeline - 1:
        return 0.0
    rows = (padded_vocab(teacher, layout.tensor) * teacher.hidden for teacher in work.teachers)
    return weight_bytes(work.precision) * sum(rows) / layout.tensor


def _states(layout: Layout, work: PlannedStep, stage: int) -> float:
    """Hidden states of the widest teacher at the tokens of a step, on a rank of a stage."""
    if stage < layout.pipeline - 1 or not work.teachers:
        return 0.0
    widest = max(teacher.hidden for teacher in work.teachers)
    tokens = work.tokens / work.mini_batches / layout.data / layout.context / _sequence(layout)
    return weight_bytes(work.precision) * widest * tokens


def critic_optimizer_bytes(count: StageCount, layout: Layout, work: PlannedStep, stage: int) -> float:
    """Bytes of the critic's optimizer: its value head needs no fp32 weights beside its own."""
    replicas = layout.data * layout.context if work.distributed_optimizer else 1
    saved = 4 * (work.precision != "fp32") * _value_head(layout, work, stage) / replicas
    return optimizer_bytes(count, layout, work) - saved


def _critic_step(layout: Layout, work: PlannedStep, stage: int) -> float:
    """What the critic keeps from forward to backward, and one of its layers in the backward pass."""
    if work.critic is None:
        return 0.0
    kept = kept_bytes(work.critic, layout, work, stage) + mask_bytes(layout, work, stage)
    return kept + backward_bytes(work.critic, layout, work, stage)


def _value_head(layout: Layout, work: PlannedStep, stage: int) -> int:
    """Parameters of the critic's on a stage."""
    return work.critic.hidden if work.critic is not None and stage == layout.pipeline - 1 else 0


def _host(waiting: dict[str, float], gradients: float, work: PlannedStep) -> float:
    """A copy of what waits; the critic's gradients are not copied, and a swap takes the weights twice."""
    copies = sum(waiting[name] for name in work.offloaded & waiting.keys())  # servers keep no copy
    return copies - gradients * ("critic" in work.offloaded) + 2 * waiting["reference"] * work.swapped


def _updated_on_cpu(state: float, work: PlannedStep) -> float:
    """What the CPU updates of Adam's `state`; a gradient in fp32 beside its three tensors (in fp32: two)."""
    parts = 2 if work.precision == "fp32" else 3
    return work.cpu_fraction * state * (parts + 1) / parts


# --- activations ----------------------------------------------------------------------------------------


def kept_bytes(arch: Architecture, layout: Layout, work: PlannedStep, stage: int) -> float:
    """Kept from forward to backward on a stage: all of a layer, or its input if it is computed again."""
    layers, tokens = layers_of(stage, arch.layers, layout), _tokens(layout, work)
    if work.recompute == "full":
        kept = len(layers) * weight_bytes(work.precision) * arch.hidden / _sequence(layout)
    else:
        kept = sum(_kept_of_layer(arch, layout, work, layer) for layer in layers)
    return kept * tokens * _in_flight(layout, work, stage)


def backward_bytes(arch: Architecture, layout: Layout, work: PlannedStep, stage: int) -> float:
    """The largest layer of a stage in its backward pass, with all it keeps if that is computed again."""
    again = work.recompute == "full"
    return _tokens(layout, work) * max(
        _working_set(arch, layout, work, layer) + again * _kept_of_layer(arch, layout, work, layer)
        for layer in layers_of(stage, arch.layers, layout)
    )


def _tokens(layout: Layout, work: PlannedStep) -> float:
    """Tokens of a micro-batch on one rank, before sequence parallelism."""
    return min(work.tokens_per_micro_batch, work.tokens / work.mini_batches / layout.data) / layout.context


def _in_flight(layout: Layout, work: PlannedStep, stage: int) -> float:
    """Micro-batches whose activations a stage holds at most, in units of all its layers (1F1B)."""
    virtual = layout.virtual_pipeline or 1
    available = work.micro_batches(layout)
    if virtual == 1:
        return min(available, layout.pipeline - stage)
    # Megatron's interleaved schedule: warm-up chunks of this stage, and the one at work.
    chunks = 2 * (layout.pipeline - stage - 1) + (virtual - 1) * layout.pipeline + 1
    return min(available * virtual, chunks) / virtual


def mask_bytes(layout: Layout, work: PlannedStep, stage: int) -> float:
    """Masks of the micro-batches in flight: fp32 runs the portable attention, which takes one under CP.

    [B, L / cp, L] in fp32, for every micro-batch, of all its layers the same one. In bf16 and FP8 the plan
    is for Transformer Engine, whose attention reads the boundaries alone.
    """
    if layout.context == 1 or _inputs_kept(work.precision):
        return 0.0
    length = work.prompt_tokens + work.response_tokens
    chunks = _in_flight(layout, work, stage) * (layout.virtual_pipeline or 1)
    return 4 * _tokens(layout, work) * length * min(work.micro_batches(layout), chunks)


def _sequence(layout: Layout) -> int:
    return layout.tensor if layout.sequence else 1


def _inputs_kept(precision: str) -> int:
    """1 where linear layers keep their inputs (Transformer Engine's), 0 where these are made again."""
    return int(precision != "fp32")


def _norm(width: float, precision: str) -> float:
    """Bytes per token that an RMSNorm over `width` keeps: its input, and maybe the linear's behind it."""
    return width * (1 + _inputs_kept(precision)) * weight_bytes(precision)


def _kept_of_layer(arch: Architecture, layout: Layout, work: PlannedStep, layer: int) -> float:
    """Bytes per token of this rank that autograd keeps of one layer without recompute."""
    size = weight_bytes(work.precision)
    hidden = arch.hidden / _sequence(layout)
    attention = _attention_of_layer(arch, layout, work.precision)
    norms = (2 * arch.input_norms + 2 * arch.output_norms) * _norm(hidden, work.precision)
    width = arch.intermediate
    mlp = 0.0
    if arch.experts is not None and arch.is_sparse(layer):
        width = arch.experts.shared
        mlp = _experts_of_layer(arch.experts, arch.hidden, 1 / layout.tensor, work.precision)
    mlp += size * (_GATE_UP + _inputs_kept(work.precision)) * width / layout.tensor
    return norms + attention + mlp


def _attention_of_layer(arch: Architecture, layout: Layout, precision: str) -> float:
    size = weight_bytes(precision)
    query, key = (heads * arch.head_dim / layout.tensor for heads in (arch.heads, arch.kv_heads))
    kept = size * (query + 2 * key)  # padded copies, a narrower value's as wide as a key's
    # What attention answers with, padded, and packed for the linear behind it.
    kept += size * (query + _inputs_kept(precision) * arch.heads * arch.value_dim / layout.tensor)
    if arch.qk_norm or arch.whole_qk_norm:
        kept += (query + key) * size  # the input
    if arch.latent is None:
        return kept
    latents = (arch.latent.rank + (arch.latent.query_rank or 0)) / _sequence(layout)
    return kept + _norm(latents, precision)


def _experts_of_layer(experts: Experts, hidden: int, hidden_tokens: float, precision: str) -> float:
    """A rank's experts get as many tokens as it sends, on average: each `per_token` times."""
    widths = 3 * hidden + (_GATE_UP + _inputs_kept(precision)) * experts.intermediate
    routed = experts.per_token * widths * weight_bytes(precision)
    return hidden_tokens * (routed + 8 * experts.count)


def _working_set(arch: Architecture, layout: Layout, work: PlannedStep, layer: int) -> float:
    """Gradients alive at once in a layer's backward pass: three of the MLP's width, two of its input."""
    size = weight_bytes(work.precision)
    width = 3 * arch.intermediate / layout.tensor
    if arch.experts is not None and arch.is_sparse(layer):
        width = arch.experts.intermediate * arch.experts.per_token + arch.experts.shared
        width = 3 * width / layout.tensor
    gathered = arch.hidden  # sequence parallelism gathers the input of a column-parallel layer again
    return size * (width + 2 * gathered)


def head_bytes(arch: Architecture, layout: Layout, work: PlannedStep) -> float:
    """Last stage: hidden states gathered and picked, their gradients, logits and theirs, dW of a chunk."""
    size, local = weight_bytes(work.precision), padded_vocab(arch, layout.tensor) // layout.tensor
    tokens = _tokens(layout, work)
    scored = tokens * work.response_tokens / max(1.0, work.prompt_tokens + work.response_tokens)
    tiling = Tiling.of(local, DTYPES["fp32" if size == 4 else "bf16"], torch.device("cuda"))
    hidden = arch.hidden * size * (2 * tokens * (_sequence(layout) > 1) + 2 * scored)
    # logits in fp32; in bf16 their gradient lies apart
    tiles = local * (4 * min(tiling.wave, scored) + (0 if size == 4 else size) * min(tiling.wave, scored))
    product = local * arch.hidden * (0 if size == 4 else 4)  # fp32 main_grad takes an fp32 product directly
    # The last norm's input and its answer, which the head keeps.
    return hidden + tiles + product + 2 * size * arch.hidden / _sequence(layout) * tokens


# --- servers --------------------------------------------------------------------------------------------


def publish_bytes(arch: Architecture, layout: Layout, work: PlannedStep) -> float:
    """By disk, the largest parameter, gathered and arranged as Hugging Face stores it; else two buckets."""
    largest = weight_bytes(work.precision) * _largest_parameter(arch)
    # A shard and its adapter's product are added in fp32, one parameter at a time.
    merging = 0 if work.lora is None else 8 * _largest_adapted(arch, work.lora) / layout.tensor
    if not work.bucket_bytes:
        return largest * (2 if layout.tensor > 1 else 1) + merging
    shard = largest / layout.tensor if layout.tensor > 1 else 0
    return max(2 * work.bucket_bytes, 2 * largest + shard) + merging


@lru_cache
def _largest_parameter(arch: Architecture) -> int:
    mapping = ParameterMap(arch, arch.vocab)
    shapes = mapping.hf_shapes()
    return max(sum(prod(shapes[name]) for name in entry.hf) for entry in mapping.entries())


@lru_cache
def _largest_adapted(arch: Architecture, lora: Lora) -> int:
    mapping, adapters = ParameterMap(arch, arch.vocab), AdapterMap(arch, lora)
    shapes = mapping.hf_shapes()
    adapted = (entry for entry in mapping.entries() if adapters.base_of(entry.megatron))
    return max(sum(prod(shapes[name]) for name in entry.hf) for entry in adapted)


def _server_weights(policy: Sequence[StageCount], layout: Layout) -> float:
    """bf16 weights of a server that is cut over as many GPUs as the policy is tensor-parallel."""
    whole = sum(stage.dense + stage.experts * layout.expert / layout.tensor for stage in policy)
    return 2 * whole


def kv_bytes_per_token(arch: Architecture | ModelShape) -> float:
    """bf16 keys and values of one token in all layers, or the latents that they are made of."""
    return 2 * arch.layers * arch.cached


def _kv_cache(arch: Architecture, layout: Layout, work: PlannedStep) -> float:
    length = work.prompt_tokens + work.response_tokens
    copies = 1 if arch.latent is None else layout.tensor  # every GPU of a server needs the whole latents
    kept = work.samples * length * kv_bytes_per_token(arch) * copies
    return SERVER_MEMORY_SHARE * kept / layout.world_size
