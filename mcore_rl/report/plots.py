"""Which metrics become which plot, and how one run or several are drawn in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from mcore_rl.report.runs import RunData, number
from mcore_rl.report.summary import measure
from mcore_rl.report.svg import Line, Reference, format_number, line_chart, moving_average, stacked_bars, thin

HELD_OUT = ("eval/version", *(f"eval/*/{word}" for word in ("pass@*", "majority@*", "low", "high")))
HELD_OUT += tuple(f"eval/*/{word}" for word in ("samples", "missing", "sampled", "prompts", "labels"))
"""of the held-out sets, what has no plot of one metric: their table has it"""
SMOOTH_FROM = 25
"""points from which a noisy metric gets a moving average"""
SMOOTH_POINTS = 160
"""of a moving average, which has no spikes to lose"""
MAX_BARS = 60
PHASES = ("rollout", "reward", "train", "publish", "eval", "score", "save", "release")


BY_K = {
    "pass": "Chance that one of k samples passes; intervals are in the table",
    "majority": "How often the answer of most of k samples passes; intervals are in the table",
}


@dataclass(frozen=True)
class Plot:
    """One plot; `metrics` are (key, label), of which several runs show only the first."""

    title: str
    note: str
    metrics: tuple[tuple[str, str], ...]
    """a key with `*` becomes one plot per metric that matches"""
    band: tuple[str, str] | None = None
    noisy: bool = False
    dots: bool = False
    log: bool = False
    tolerances: Mapping[str, str] = field(default_factory=dict)
    """metric -> dotted key of resolved.toml with its upper limit"""


@dataclass(frozen=True)
class Figure:
    """A drawn plot."""

    title: str
    note: str
    svg: str
    legend: Sequence[tuple[int, str, str]]
    """(colour index, label, last value)"""


SECTIONS: Mapping[str, Sequence[Plot]] = {
    "Learning": [
        Plot(
            "Held-out accuracy",
            "Mean over prompts outside the training set; shaded: 95 % interval",
            (("eval/*/accuracy", "accuracy"),),
            band=("eval/*/accuracy/low", "eval/*/accuracy/high"),
            dots=True,
        ),
        Plot(
            "Held-out reward",
            "Of the reward model, mean over prompts outside the training set; shaded: 95 % interval",
            (("eval/*/reward", "reward"),),
            band=("eval/*/reward/low", "eval/*/reward/high"),
            dots=True,
        ),
        Plot(
            "Validation accuracy",
            "Share of the pairs of data.validation that are ranked as they are",
            (("validation/accuracy", "accuracy"),),
            dots=True,
        ),
        Plot(
            "Validation loss",
            "On data.validation, which is not trained",
            (("validation/loss", "loss"),),
            dots=True,
        ),
        Plot("Reward", "Mean over the step's samples", (("reward/mean", "reward"),), noisy=True),
        Plot(
            "Replaced groups",
            "Share of the sampled groups that had no signal",
            (("sampling/refill_rate", "replaced"),),
            noisy=True,
        ),
        Plot(
            "Response length",
            "Tokens; shaded: up to the longest",
            (("length/mean", "mean"),),
            band=("length/mean", "length/max"),
        ),
    ],
    "Optimisation": [
        Plot("Loss", "As optimised, over the global batch", (("loss/*", "loss"),), noisy=True),
        Plot(
            "Importance ratio",
            "New policy over old; shaded: lowest to highest",
            (("ratio/mean", "mean"),),
            band=("ratio/min", "ratio/max"),
        ),
        Plot("Clip fraction", "Tokens whose gradient is cut", (("clip/fraction", "clipped"),), noisy=True),
        Plot("Entropy", "Of the policy, nats per token", (("entropy", "entropy"),)),
        Plot("KL divergence", "k3 per token", (("kl/*", "KL"),), noisy=True),
        Plot("Learning rate", "Of the step's first update", (("lr/*", "rate"),)),
        Plot("Gradient norm", "Before clipping", (("grad_norm", "norm"),), noisy=True),
    ],
    "Exactness and speed": [
        Plot(
            "Log-prob agreement",
            "Trainer against server after a publish, per token",
            (
                ("mismatch/max_abs", "largest"),
                ("mismatch/p999", "99.9 % quantile"),
                ("publish/stale_max_abs", "previous weights (control)"),
                ("publish/moved_max_abs", "changed by the publish"),
            ),
            log=True,
            tolerances={
                "mismatch/max_abs": "publish.tolerance_max",
                "mismatch/p999": "publish.tolerance_p999",
            },
        ),
        Plot("Step time", "Seconds", (("time/step", "step"),), noisy=True),
        Plot("Throughput", "Tokens per second", (("throughput/tokens_per_second", "step"),), noisy=True),
        Plot("Model FLOPs utilisation", "Of the GPUs' bf16 peak", (("throughput/mfu", "MFU"),), noisy=True),
        Plot("Peak memory", "GiB, the largest rank", (("memory/peak_gib", "memory"),)),
    ],
}
"""heading -> plots; time by phase joins the last section, and another one has every metric that is in none"""


def draw_sections(runs: Sequence[RunData]) -> dict[str, list[Figure]]:
    """Heading -> figures. A plot without its metric is left out, and so is an empty section."""
    sections = {
        heading: [figure for plot in plots for one in _expand(plot, runs) if (figure := _draw(one, runs))]
        for heading, plots in SECTIONS.items()
    }
    sections["Learning"] += [figure for plot in _by_k(runs) if (figure := _draw(plot, runs))]
    sections["Exactness and speed"] += _phases(runs)
    sections["Everything else"] = [figure for plot in _others(runs) if (figure := _draw(plot, runs))]
    return {heading: figures for heading, figures in sections.items() if figures}


def _others(runs: Sequence[RunData]) -> list[Plot]:
    """A plot for every metric that no other plot shows, such as those of a loss of the user's own."""
    plots = [plot for plots in SECTIONS.values() for plot in plots]
    shown = [key for plot in plots for key, _ in plot.metrics] + [key for p in plots for key in p.band or ()]
    shown += ["step", "time/*", "data/*", *HELD_OUT]
    keys = dict.fromkeys(key for run in runs for key in run.keys)
    rest = [key for key in keys if not any(fnmatchcase(key, pattern) for pattern in shown)]
    return [Plot(key, "As logged", ((key, key.rsplit("/", 1)[-1]),), noisy=True) for key in sorted(rest)]


def _by_k(runs: Sequence[RunData]) -> list[Plot]:
    """For each set a plot of all its pass@k, and one of all its majority@k."""
    keys = dict.fromkeys(key for run in runs for key in run.keys if not key.endswith(("/low", "/high")))
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for name, note in BY_K.items():
        for key in keys:
            head, at, k = key.rpartition(f"/{name}@")
            if at and head.startswith("eval/"):
                title = f"Held-out {name}@k: {head.removeprefix('eval/')}"
                found.setdefault((title, note), []).append((key, f"k = {k}"))
    return [Plot(title, note, tuple(metrics), dots=True) for (title, note), metrics in found.items()]


def _expand(plot: Plot, runs: Sequence[RunData]) -> list[Plot]:
    """A plot of its own for every metric that the pattern matches: their scales differ."""
    pattern, label = plot.metrics[0]
    if "*" not in pattern:
        return [plot]
    keys = list(dict.fromkeys(key for run in runs for key in run.keys if fnmatchcase(key, pattern)))
    head, tail = pattern.split("*")
    names = [f"{plot.title}: {key.removeprefix(head).removesuffix(tail)}" for key in keys]
    if tail and len(keys) == 1:
        names = [plot.title]
    return [
        replace(
            plot,
            title=name.replace(label, measured) if measured else name,
            metrics=((key, measured or label),),
            band=plot.band and (f"{key}/low", f"{key}/high"),
        )
        for name, key in zip(names, keys, strict=True)
        for measured in (_measured(runs, key),)
    ]


def _measured(runs: Sequence[RunData], key: str) -> str:
    """What a mean over a held-out set is, by the run that has it; nothing for another metric."""
    if not key.startswith("eval/"):
        return ""
    return next((measure(run, key) for run in runs if key in run.keys), "")


def _draw(plot: Plot, runs: Sequence[RunData]) -> Figure | None:
    if len(runs) == 1:
        shown = [(runs[0], key, label) for key, label in plot.metrics]
    else:
        plot = replace(plot, band=None, metrics=plot.metrics[:1])
        shown = [(run, key, run.name) for run in runs for key, _ in plot.metrics]
    groups = [
        _lines(plot, run, key, label, i) for i, (run, key, label) in enumerate(shown) if run.points(key)
    ]
    lines = [line for group in groups for line in group]
    svg = line_chart(plot.title, lines, log=plot.log, references=_tolerances(plot, runs))
    if not svg:
        return None
    faint = [group[1] for group in groups if len(group) > 1]
    note = f"{plot.note}; bold: mean of {_window(faint[0])} steps" if faint else plot.note
    return Figure(plot.title, note, svg, [(g[0].color, g[0].label, _last(g[0])) for g in groups])


def _last(line: Line) -> str:
    return next(format_number(value) for _, value in reversed(line.points) if value is not None)


def _lines(plot: Plot, run: RunData, key: str, label: str, color: int) -> list[Line]:
    points = run.points(key)
    line = Line(label, points, color, dots=plot.dots, band=_band(plot, run))
    if not plot.noisy or len(points) < SMOOTH_FROM:
        return [line]
    smooth = thin(moving_average(points, _window(line)), SMOOTH_POINTS)
    return [replace(line, points=smooth), replace(line, faint=True)]


def _window(line: Line) -> int:
    return max(3, len(line.points) // 20) | 1


def _band(plot: Plot, run: RunData) -> list[tuple[float, float, float]]:
    if plot.band is None:
        return []
    low, high = (dict(run.points(key)) for key in plot.band)
    pairs = [(step, low[step], high.get(step)) for step in low]
    return [(step, a, b) for step, a, b in pairs if a is not None and b is not None]


def _tolerances(plot: Plot, runs: Sequence[RunData]) -> list[Reference]:
    """One dashed line per limit that all runs agree on, in its metric's colour where one run is drawn."""
    found = []
    for color, (metric, label) in enumerate(plot.metrics):
        limits = {number(run.settings.get(plot.tolerances.get(metric, ""))) for run in runs}
        if len(limits) == 1 and (limit := limits.pop() or 0.0) > 0:
            found.append(Reference(f"tolerance, {label}", limit, color if len(runs) == 1 else None))
    return found


def _phases(runs: Sequence[RunData]) -> list[Figure]:
    timed = [run for run in runs if any(run.points(f"time/{phase}") for phase in PHASES)]
    if not timed:
        return []
    if len(timed) == 1:
        (run,) = timed
        records = [r for r in run.steps if any(f"time/{phase}" in r for phase in PHASES)]
        size = math.ceil(len(records) / MAX_BARS)
        bins = [records[i : i + size] for i in range(0, len(records), size)]
        columns = [str(b[0]["step"]) for b in bins]
        note = "Seconds" if size == 1 else f"Seconds, mean of {size} steps"
    else:
        bins = [run.steps for run in timed]
        columns, note = [run.name for run in timed], "Seconds, mean of all steps"
    stacks = [(phase, [_mean(b, f"time/{phase}") for b in bins]) for phase in PHASES]
    stacks = [(phase, values) for phase, values in stacks if any(values)]
    if not stacks:
        return []
    legend = [(i, phase, f"{sum(values) / len(values):.2f} s") for i, (phase, values) in enumerate(stacks)]
    return [Figure("Time by phase", note, stacked_bars("Time by phase", columns, stacks), legend)]


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(number(record.get(key)) or 0.0 for record in records) / len(records)
