"""The numbers a reader wants first: what was run, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from mcore_rl.metric_names import held_out_word
from mcore_rl.report.runs import RunData, number
from mcore_rl.report.svg import format_number
from mcore_rl.terminal import short

AXES = (
    ("tensor", "TP"),
    ("pipeline", "PP"),
    ("virtual_pipeline", "VPP"),
    ("context", "CP"),
    ("expert", "EP"),
    ("data", "DP"),
)


class Fact(NamedTuple):
    """One tile."""

    label: str
    value: str
    detail: str


def headline(run: RunData) -> list[Fact]:
    """The tiles of a single run, the most telling first."""
    found = [
        _of_how_many(run, key, _change(run, key, f"Held-out {measure(run, key)}{suffix}"))
        for what in ("accuracy", "reward")
        for key, suffix in _held_out(run, what)
    ]
    found += [_change(run, f"validation/{what}", f"Validation {what}") for what in ("accuracy", "loss")]
    found += [_change(run, "reward/mean", "Reward", average=10)]
    found += [_steps(run), _wall(run), _tokens(run), _agreement(run), *_dropped(run)]
    return [fact for fact in found if fact]


def text_table(run: RunData) -> str:
    """The headline for a terminal, a fact per line."""
    facts = [(short(fact.label), fact.value, fact.detail) for fact in headline(run)]
    label = max(len(name) for name, _, _ in facts)
    value = max(len(number) for _, number, _ in facts)
    return "\n".join(
        f"{name:<{label}}  {number:>{value}}  {detail}".rstrip() for name, number, detail in facts
    )


def key_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What tells this run from another at a glance; only what resolved.toml has."""
    get = settings.get
    known = {short: number(get(f"parallel.{axis}")) for axis, short in AXES}
    degrees = [f"{short} {degree:g}" for short, degree in known.items() if degree and degree > 1]
    sequence = ["SP"] if get("parallel.sequence") else []
    per_step, group = get("rollout.prompts_per_step"), get("rollout.samples_per_prompt")
    batch = f"{per_step} prompts \u00d7 {group}" if per_step and group else ""
    if rows := get("supervised.batch_size"):
        batch = f"{rows} rows"
    rate = number(get("optimizer.lr"))
    found = {
        "Kind": str(get("run.kind", "")),
        "Algorithm": str(get("algorithm.name", "")),
        "Model": str(get("model.path", "")).rstrip("/").rsplit("/", 1)[-1],
        "Layout": " \u00b7 ".join(degrees + sequence),
        "Batch": batch,
        "Mini-batches": str(get("algorithm.mini_batches", "")),
        "Learning rate": "" if rate is None else format_number(rate),
        "Temperature": str(get("rollout.temperature", "")),
        "Precision": str(get("model.precision", "")),
        "Seed": str(get("run.seed", "")),
    }
    return [(name, value) for name, value in found.items() if value]


def differing_settings(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """(dotted key, value per run) where several runs do not agree, their directories aside."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != "run.dir")
    rows = [(key, [str(run.settings.get(key, "-")) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def duration(seconds: float) -> str:
    """Seconds for people: 41 s, 2 min 05 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def measure(run: RunData, key: str) -> str:
    """What the metric eval/NAME/accuracy is: `accuracy` of right and wrong, else `reward`, its mean."""
    _, name, what = [*key.split("/"), "", ""][:3]
    own, of_run = run.settings.get(f"eval.sets.{name}.reward"), run.settings.get("reward.function", "")
    mixed = any(setting.startswith("reward.functions.") for setting in run.settings)
    function = str(own or ("mixed" if mixed else of_run))
    environment = run.settings.get("environment.function")
    return held_out_word(function, environment and str(environment)) if function else what


def _held_out(run: RunData, what: str) -> list[tuple[str, str]]:
    keys = [key for key in run.keys if fnmatchcase(key, f"eval/*/{what}")]
    return [(key, f" \u00b7 {key.split('/')[1]}" if len(keys) > 1 else "") for key in keys]


def _change(run: RunData, key: str, label: str, average: int = 1) -> Fact | None:
    values = run.values(key)
    if not values:
        return None
    n = min(average, max(1, len(values) // 4))
    start, end = sum(values[:n]) / n, sum(values[-n:]) / n
    sign = "+" if end >= start else "\u2212"
    span = f"means of {n} steps" if n > 1 else "from start to end"
    return Fact(label, f"{start:.3f} \u2192 {end:.3f}", f"{sign}{abs(end - start):.3f}, {span}")


def _of_how_many(run: RunData, key: str, fact: Fact | None) -> Fact | None:
    """The fact, with how many prompts of their file the last mean is of, where that is known."""
    known = [run.values(f"{key.rpartition('/')[0]}/{what}") for what in ("sampled", "prompts")]
    if fact is None or not all(known):
        return fact
    sampled, prompts = (values[-1] for values in known)
    return fact._replace(detail=f"{fact.detail}; {sampled:.0f} of {prompts:.0f} prompts")


def _is_count(key: str) -> bool:
    return fnmatchcase(key, "data/*/dropped")


def _dropped(run: RunData) -> list[Fact]:
    """A tile for each prompt file (`train`, `eval/NAME`) with prompts beyond data.max_prompt_tokens."""
    names = [key.removeprefix("data/").removesuffix("/dropped") for key in run.keys if _is_count(key)]
    counts = {name: [run.values(f"data/{name}/{what}") for what in ("dropped", "prompts")] for name in names}
    return [
        Fact(
            f"Prompts left out \u00b7 {name}",
            f"{dropped[0]:.0f} of {read[0]:.0f}",
            "longer than allowed",
        )
        for name, (dropped, read) in counts.items()
        if dropped and read and dropped[0]
    ] + [
        Fact("Over-long prompts \u00b7 train", f"{met[-1]:.0f}", "met after the start, and passed over")
        for met in [run.values("data/train/passed_over")]
        if met
    ]


def _steps(run: RunData) -> Fact:
    last, planned = int(run.steps[-1]["step"]), run.settings.get("train.steps")
    return Fact("Steps", str(last), f"of {planned}" if planned else "logged so far")


def _wall(run: RunData) -> Fact | None:
    seconds = run.values("time/step")
    if not seconds:
        return None
    middle = sorted(seconds)[len(seconds) // 2]
    return Fact("Wall time", duration(sum(seconds)), f"median {middle:.2f} s per step")


def _tokens(run: RunData) -> Fact | None:
    tokens, seconds = sum(run.values("tokens")), sum(run.values("time/step"))
    rate = f"{format_number(tokens / seconds)}/s" if seconds else "in all steps"
    what = "Response tokens" if run.settings.get("run.kind", "rl") == "rl" else "Trained tokens"
    return Fact(what, format_number(tokens), rate) if tokens else None


def _agreement(run: RunData) -> Fact | None:
    values = run.values("mismatch/max_abs")
    if not values:
        return None
    tolerance = number(run.settings.get("publish.tolerance_max"))
    detail = f"tolerance {format_number(tolerance)}" if tolerance else "trainer against server"
    return Fact("Largest log-prob mismatch", format_number(max(values)), detail)
