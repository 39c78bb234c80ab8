"""A plan for people, and as one JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mcore_rl.parallel.layout import Layout
from mcore_rl.plan.clock import publish_seconds
from mcore_rl.plan.memory import GIB, RankMemory
from mcore_rl.plan.search import ENOUGH_SPARE, LayoutPlan, PlanInputs

SHOWN = 10
"""legal layouts in the table, and illegal ones below it"""


def to_json(
    problem: PlanInputs,
    gpus: int,
    configured: LayoutPlan | None,
    plans: Sequence[LayoutPlan],
    illegal: Mapping[Layout, str],
) -> dict[str, Any]:
    """Memory in GiB, time in seconds; `layouts` are the legal ones, best first.

    Args:
        configured: None where the config's layout is none of them.
    """
    forward = problem.work.forward_flops(problem.shape)
    return {
        "family": problem.arch.family,
        "parameters": problem.parameters,
        "gpus": gpus,
        "gpu_memory_gib": problem.gpu_memory / GIB,
        "forward_flops": forward,
        "publish_seconds": publish_seconds(problem.parameters, problem.work.precision),
        "configured": plan_json(configured) if configured else None,
        "best": best_of(gpus, plans, configured),
        "layouts": [plan_json(plan) for plan in plans],
        "illegal": [{"layout": str(layout), "why": why} for layout, why in illegal.items()],
    }


def plan_json(plan: LayoutPlan) -> dict[str, Any]:
    """One entry of `layouts`."""
    return {
        "layout": str(plan.layout),
        "parallel": asdict(plan.layout),
        "fits": plan.fits,
        "spare": plan.spare,
        "micro_batches": plan.micro_batches,
        "bubble": plan.bubble,
        "seconds": asdict(plan.seconds) | {"total": plan.seconds.total},
        "stages": [_gib(memory) for memory in plan.stages],
    }


def _gib(memory: RankMemory) -> dict[str, float]:
    sizes = {name: size for name, size in asdict(memory).items() if name != "offloaded"}
    sizes |= {"total": memory.total}
    return {name: size / GIB for name, size in sizes.items()}


def table(
    problem: PlanInputs,
    gpus: int,
    configured: LayoutPlan | None,
    plans: Sequence[LayoutPlan],
    illegal: Mapping[Layout, str],
) -> str:
    """What a person decides by: the configured layout in full, then the best ones, then what cannot be."""
    lines = [*_head(problem, gpus)]
    lines += [*_stages(configured), ""] if configured else []
    best = list(plans[:SHOWN])
    lines.append(f"Legal layouts of {gpus} GPUs, best first ({len(best)} of {len(plans)}; * is the config's)")
    lines.append("  best: memory to spare, then the shortest step in two digits, then the fewest cuts")
    lines.append(
        f"  {'layout':26} {'GiB':>6} {'spare':>6} {'m.b.':>5} {'bubble':>6}"
        f" {'generate':>8} {'scores':>7} {'train':>7} {'publish':>7} {'step':>7}"
    )
    lines += [_row(plan, "*" if configured and plan.layout == configured.layout else " ") for plan in best]
    if configured and configured.layout not in [plan.layout for plan in best]:
        lines.append(_row(configured, "*"))
    lines += ["", best_of(gpus, plans, configured)]
    if illegal:
        lines += ["", f"Not legal ({min(SHOWN, len(illegal))} of {len(illegal)}; --json has all)"]
        lines += [f"  {layout!s:26} {why}" for layout, why in list(illegal.items())[:SHOWN]]
    return "\n".join(lines)


def best_of(gpus: int, plans: Sequence[LayoutPlan], configured: LayoutPlan | None) -> str:
    """The best layout of `gpus` GPUs, and why, in a sentence."""
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return f"No layout of {gpus} GPUs leaves {ENOUGH_SPARE:.0%} of their memory; take more of them."
    best, s = fitting[0], fitting[0].seconds
    phases = {"generation": s.generate + s.greedy, "scores": s.log_probs}
    phases |= {"training": s.train, "publishing": s.publish}
    longest = max(phases, key=lambda name: phases[name])
    shortest = min(fitting, key=lambda plan: plan.seconds.total)
    why = (
        "no other that fits is shorter"
        if shortest is best
        else f"{shortest.layout} saves {s.total - shortest.seconds.total:.0f} s and cuts the model further"
    )
    ours = ""
    if configured is not None and configured.layout != best.layout:
        saved = configured.seconds.total - s.total
        ours = (
            f", the config's {configured.layout} takes {abs(saved):.0f} s {'more' if saved >= 0 else 'less'}"
            f"{'' if configured.fits else ' and leaves too little memory'}"
        )
    return (
        f"Best for {gpus} GPUs: {best.layout}, {s.total:.0f} s a step, of which {longest} has "
        f"{phases[longest]:.0f} s, with {best.spare:.0%} of the memory to spare: {why}{ours}."
    )


def _head(problem: PlanInputs, gpus: int) -> Iterator[str]:
    work = problem.work
    segments = "" if work.segments == 1 else f"{work.segments:g} segments of "
    yield (
        f"{problem.arch.family}: {problem.parameters:,} parameters, {gpus} GPUs of "
        f"{problem.gpu_memory / GIB:g} GiB, {work.precision}, recompute {work.recompute}"
    )
    yield (
        f"A step: {work.samples} samples of {segments}"
        f"{work.prompt_tokens:g} + {work.response_tokens:g} tokens, "
        f"{work.mini_batches} x {work.epochs} optimizer steps, one forward pass "
        f"{work.forward_flops(problem.shape):.3g} FLOP"
    )
    times = publish_seconds(problem.parameters, work.precision)
    if work.greedy:
        yield f"{work.greedy} greedy answers to compare with are a part of generation, and not trained"
    if work.energy_share:
        yield "One more forward pass of the policy, at half the temperature, is a part of the scores"
    if work.staleness:
        yield "Generation runs beside the other phases (rollout.max_staleness): a step is the longer"
    yield "One copy of the weights: " + ", ".join(f"{s:.3g} s by {link}" for link, s in times.items())
    yield ""


def _stages(plan: LayoutPlan) -> Iterator[str]:
    """A line per component that is not 0, a column per pipeline stage."""
    yield f"GiB per rank of {plan.layout}, by pipeline stage (spare {plan.spare:.0%})"
    columns = [_gib(memory) for memory in plan.stages]
    for name in columns[0]:
        sizes = [column[name] for column in columns]
        if any(sizes):
            yield f"  {name.replace('_', ' '):16}" + "".join(f"{size:8.2f}" for size in sizes)


def _row(plan: LayoutPlan, mark: str) -> str:
    fullest = max(memory.total for memory in plan.stages) / GIB
    s = plan.seconds
    verdict = "" if plan.fits else "  does not fit" if plan.spare < 0 else f"  under {ENOUGH_SPARE:.0%} spare"
    return (
        f"{mark} {plan.layout!s:26} {fullest:6.1f} {plan.spare:6.0%} {plan.micro_batches:5d}"
        f" {plan.bubble:6.0%} {s.generate + s.greedy:8.1f}"
        f" {s.log_probs:7.1f} {s.train:7.1f} {s.publish:7.1f} {s.total:7.1f}{verdict}"
    )
