"""Every layout of so many GPUs: legal with its memory and time, or the reason why it is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from mcore_rl.data.balance import ModelShape
from mcore_rl.errors import LayoutError
from mcore_rl.model.hf.architecture import Architecture
from mcore_rl.model.layouts import check_adapters, check_layout, check_layout_of
from mcore_rl.parallel.layout import Layout
from mcore_rl.plan.clock import SamplingServers, Seconds, step_seconds
from mcore_rl.plan.count import count_policy, distinct
from mcore_rl.plan.memory import RankMemory, stage_memory
from mcore_rl.plan.work import PlannedStep
from mcore_rl.precision import packed_multiple, token_multiple

ENOUGH_SPARE = 0.1
"""share of a GPU's memory that a plan must leave to be recommended"""
NODE = 8
"""GPUs with NVLink between them: tensor parallelism stays inside"""


@dataclass(frozen=True)
class LayoutPlan:
    """A legal layout, and what it costs."""

    layout: Layout
    stages: Sequence[RankMemory]
    """per pipeline stage, first to last"""
    spare: float
    """share of a GPU's memory that the fullest stage leaves; negative where it does not fit"""
    micro_batches: int
    """micro-batches of one optimizer step, per replica"""
    bubble: float
    seconds: Seconds

    @property
    def fits(self) -> bool:
        """With ENOUGH_SPARE left."""
        return self.spare >= ENOUGH_SPARE


@dataclass(frozen=True)
class PlanInputs:
    """What is planned, whatever the layout."""

    arch: Architecture
    shape: ModelShape
    work: PlannedStep
    fleet: SamplingServers
    gpu_memory: float
    """bytes"""

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return distinct(count_policy(self.arch, Layout()), Layout())


def evaluate(problem: PlanInputs, layout: Layout) -> LayoutPlan:
    """Memory and time of one layout.

    Raises:
        LayoutError: the model cannot be cut that way, or a micro-batch cannot hold the longest sequence.
    """
    check_layout(problem.arch, layout)
    if problem.work.lora is not None:
        check_adapters(problem.arch, layout, problem.work.lora)
    for key, model in (("reward.model", problem.work.reward_model), ("critic.path", problem.work.critic)):
        if model is not None:
            check_layout_of(model, layout, key)
    for teacher in problem.work.teachers:
        check_layout(teacher, layout)
    _check_micro_batch(problem.work, layout)
    stages = stage_memory(problem.arch, layout, problem.work)
    fullest = max(memory.total for memory in stages)
    return LayoutPlan(
        layout=layout,
        stages=stages,
        spare=1 - fullest / problem.gpu_memory,
        micro_batches=problem.work.micro_batches(layout),
        bubble=problem.work.bubble(layout),
        seconds=step_seconds(problem.shape, problem.parameters, layout, problem.work, problem.fleet),
    )


def search(problem: PlanInputs, gpus: int) -> tuple[list[LayoutPlan], dict[Layout, str]]:
    """(legal layouts, best first; illegal ones with their reason).

    Best: enough memory to spare, then the shortest step, then the least cutting: the time model knows no
    communication, and within two digits its answer is no reason to cut a model further.
    """
    plans, illegal = [], {}
    for layout in candidates(problem.arch, gpus):
        try:
            plans.append(evaluate(problem, layout))
        except LayoutError as error:
            illegal[layout] = str(error)
    plans.sort(key=_rank)
    return plans, illegal


def _rank(plan: LayoutPlan) -> tuple[float, ...]:
    if not plan.fits:
        return (1, -plan.spare)
    layout = plan.layout
    cut = (layout.tensor * layout.context, layout.pipeline, layout.virtual_pipeline or 1, layout.expert)
    return (0, float(f"{plan.seconds.total:.2g}"), *cut, -plan.spare)


def candidates(arch: Architecture, gpus: int) -> Iterator[Layout]:
    """Layouts of `gpus` ranks: tensor within a node, powers of two, divisors for stages."""
    powers = [2**i for i in range(gpus.bit_length()) if 2**i <= gpus]
    stages = [n for n in range(1, min(gpus, arch.layers) + 1) if gpus % n == 0]
    experts = [n for n in powers if n <= arch.experts.count] if arch.experts else [1]
    for tensor, pipeline, context in product([n for n in powers if n <= NODE], stages, powers):
        if gpus % (tensor * pipeline * context):
            continue
        for virtual, expert in product((None, 2, 4) if pipeline > 1 else (None,), experts):
            yield Layout(
                tensor=tensor,
                sequence=tensor > 1,
                pipeline=pipeline,
                virtual_pipeline=virtual,
                context=context,
                expert=expert,
                data=gpus // (tensor * pipeline * context),
            )


def _check_micro_batch(work: PlannedStep, layout: Layout) -> None:
    tokens = token_multiple(work.precision, work.fp8.recipe)
    align = packed_multiple(layout.tensor, layout.context, tokens, sequence=layout.sequence)
    longest = -(-work.longest // align) * align
    if longest > work.tokens_per_micro_batch:
        raise LayoutError(
            f"train.tokens_per_micro_batch = {work.tokens_per_micro_batch} cannot hold one sequence of "
            f"{work.longest} tokens padded to a multiple of {align}"
        )
    if work.sequences / work.mini_batches < layout.data:
        raise LayoutError(
            f"{work.sequences / work.mini_batches:g} sequences per optimizer step leave some of the "
            f"{layout.data} data-parallel replicas without any"
        )
