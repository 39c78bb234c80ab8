"""The page's tables: runs side by side, samples, settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from mcore_rl.report.runs import VERSION, RunData, number
from mcore_rl.report.summary import differing_settings, headline
from mcore_rl.report.svg import color_class

SAMPLES = 8
TEXT = 600
"""characters of a prompt or response that are shown"""


def run_key(index: int, run: RunData) -> str:
    """A run's name behind a square of its colour."""
    return f'<i class="key {color_class(index)}"></i>{escape(run.name)}'


def comparison(runs: Sequence[RunData]) -> str:
    """One row per run with the numbers of its tiles."""
    rows = [{fact.label: fact.value for fact in headline(run)} for run in runs]
    labels = list(dict.fromkeys(label for row in rows for label in row))
    cells = [
        [run_key(i, runs[i]), *(escape(row.get(label, "-")) for label in labels)]
        for i, row in enumerate(rows)
    ]
    return f'<div class="panel wide">{_table(["Run", *labels], cells)}</div>'


def sample_tables(runs: Sequence[RunData]) -> list[str]:
    """One run's first, middle and last recorded step, the last one open; of several runs, the last step."""
    if len(runs) > 1:
        last = [(run, max(run.samples)) for run in runs if run.samples]
        return [_sample_table(f"{run.name}, step {step}", run.samples[step]) for run, step in last]
    (run,) = runs
    steps = list(run.samples)
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    return [_sample_table(f"step {s}", run.samples[s], is_open=s == chosen[-1]) for s in chosen]


def held_out_table(runs: Sequence[RunData]) -> str:
    """Every measure of every held-out set with its 95 % interval: the last in each run, and those alone."""
    rows = []
    for index, run in enumerate(runs):
        last = {
            key: value for record in run.steps for key, value in record.items() if key.startswith("eval/")
        }
        places = {"last": last, **run.alone}
        for place, metrics in places.items():
            version = number(metrics.get(VERSION))
            where = place if version is None else f"after step {version:.0f}"
            rows += [
                [run_key(index, run), *map(escape, (name, measure, value, interval, of, where))]
                for name, measure, value, interval, of in _measures(metrics)
            ]
    head = ["Run", "Set", "Measure", "Value", "95 % interval", "Of", "Weights"]
    if len(runs) == 1:
        head, rows = head[1:], [row[1:] for row in rows]
    return f'<div class="panel wide">{_table(head, rows)}</div>' if rows else ""


def _measures(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """(set, measure, value, interval, of how many) of what is measured of each set."""
    for key, value in metrics.items():
        name, _, measure = key.removeprefix("eval/").rpartition("/")
        shown = number(value)
        if shown is None or not (measure in ("accuracy", "reward") or "@" in measure):
            continue
        low, high = (number(metrics.get(f"{key}/{end}")) for end in ("low", "high"))
        interval = "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        counts = [number(metrics.get(f"eval/{name}/{what}")) for what in ("sampled", "samples")]
        of = "" if None in counts else "{:.0f} prompts, {:.0f} samples".format(*counts)
        yield name, measure, f"{shown:.3f}", interval, of


def settings_tables(runs: Sequence[RunData]) -> list[str]:
    """Where several runs differ, then every resolved.toml, folded."""
    parts = []
    if differing := differing_settings(runs):
        cells = [[f"<code>{escape(cell)}</code>" for cell in (key, *values)] for key, values in differing]
        table = _table(["Setting", *(run.name for run in runs)], cells)
        parts.append(f'<div class="panel wide"><h3>Settings that differ</h3>{table}</div>')
    return parts + [
        f'<details class="panel wide"><summary>{escape(run.name)}/resolved.toml</summary>'
        f"<pre>{escape(run.settings_text)}</pre></details>"
        for run in runs
        if run.settings_text
    ]


def _sample_table(title: str, lines: Sequence[Mapping[str, Any]], *, is_open: bool = False) -> str:
    shown = lines[:: max(1, len(lines) // SAMPLES)][:SAMPLES]  # neighbours mostly share a prompt
    table = _table(["Prompt", "Response", "Label", "Reward"], map(_sample_cells, shown))
    return (
        f'<details class="panel wide"{" open" if is_open else ""}><summary>{escape(title)} '
        f"<span>{len(shown)} of {len(lines)} samples</span></summary>{table}</details>"
    )


def _sample_cells(line: Mapping[str, Any]) -> list[str]:
    reward = number(line.get("reward"))
    kind = "reward good" if reward is not None and reward > 0 else "reward"
    texts = [f"<pre>{escape(_clip(str(line.get(key, ''))))}</pre>" for key in ("prompt", "response", "label")]
    return [*texts, f'<span class="{kind}">{"-" if reward is None else f"{reward:g}"}</span>']


def _clip(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]}\u2026 ({len(text):,} characters)"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """`head` is plain text, the cells are HTML; on a phone every cell carries its column's name."""
    heads = "".join(f'<th scope="col">{escape(label)}</th>' for label in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(
            f'<td data-label="{escape(label)}">{cell}</td>'
            for label, cell in zip(head[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
