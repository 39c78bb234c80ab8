"""The page's tables: runs side by side, samples, settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from mcore_rl.report.chat import chat_html, clipped, messages_of
from mcore_rl.report.runs import VERSION, RunData, number
from mcore_rl.report.summary import differing_settings, headline, measure
from mcore_rl.report.svg import color_class

SAMPLES, STEPS = 8, 9
"""of a step and of a run that are shown"""
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
    """Recorded steps of one run from its first to its last, the last one open; of several, the last step."""
    if len(runs) > 1:
        last = [(run, max(run.samples)) for run in runs if run.samples]
        return [_sample_table(f"{run.name}, step {step}", run.samples[step]) for run, step in last]
    (run,) = runs
    steps = list(run.samples)
    chosen = sorted({steps[k * (len(steps) - 1) // (STEPS - 1)] for k in range(STEPS)}) if steps else []
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
                [run_key(index, run), *map(escape, (name, what, value, interval, of, where))]
                for name, what, value, interval, of in _measures(run, metrics)
            ]
    head = ["Run", "Set", "Measure", "Value", "95 % interval", "Of", "Weights"]
    if len(runs) == 1:
        head, rows = head[1:], [row[1:] for row in rows]
    return f'<div class="panel wide">{_table(head, rows)}</div>' if rows else ""


def _measures(run: RunData, metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, str]]:
    """(set, measure, value, interval, of how many) of what is measured of each set."""
    for key, value in metrics.items():
        name, _, what = key.removeprefix("eval/").rpartition("/")
        shown = number(value)
        if shown is None or not (what in ("accuracy", "reward") or "@" in what):
            continue
        what = what if "@" in what else measure(run, key)
        low, high = (number(metrics.get(f"{key}/{end}")) for end in ("low", "high"))
        interval = "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        counts = [number(metrics.get(f"eval/{name}/{what}")) for what in ("sampled", "samples")]
        of = "" if None in counts else "{:.0f} prompts, {:.0f} samples".format(*counts)
        yield name, what, f"{shown:.3f}", interval, of


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
    chosen = lines[:: max(1, len(lines) // SAMPLES)][:SAMPLES]  # neighbours mostly share a prompt
    marks = [_sample_marks(line) for line in chosen]
    table = _table(["Prompt", "Response", "Label", "Reward"], map(_sample_cells, chosen), marks)
    return (
        f'<details class="panel wide"{" open" if is_open else ""}><summary>{escape(title)} '
        f"<span>{len(chosen)} of {len(lines)} samples</span></summary>{table}</details>"
    )


def _sample_cells(line: Mapping[str, Any]) -> list[str]:
    messages = line.get("messages")
    known = messages if isinstance(messages, list) and all(isinstance(m, dict) for m in messages) else ()
    prompt = chat_html(messages_of(str(line.get("prompt", "")), known), TEXT)
    texts = [f"<pre>{escape(clipped(str(line.get(key, '')), TEXT))}</pre>" for key in ("response", "label")]
    return [prompt, *texts, badge(number(line.get("reward")))]


def _sample_marks(line: Mapping[str, Any]) -> str:
    """Attributes by which a script orders the rows."""
    reward = number(line.get("reward"))
    shown = "" if reward is None else f"{reward:g}"
    return f' data-item data-length="{len(str(line.get("response", "")))}" data-reward="{shown}"'


def badge(reward: float | None) -> str:
    """A reward, green where it is above 0."""
    kind = "reward good" if reward is not None and reward > 0 else "reward"
    return f'<span class="{kind}">{"-" if reward is None else f"{reward:.4g}"}</span>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], marks: Sequence[str] = ()) -> str:
    """`head` is plain text, the cells are HTML; on a phone every cell carries its column's name.

    Args:
        marks: attributes of each row, where a script orders them.
    """
    heads = "".join(f'<th scope="col">{escape(label)}</th>' for label in head)
    body = "".join(
        f'<tr{marks[place] if marks else ""}><th scope="row">{row[0]}</th>'
        + "".join(
            f'<td data-label="{escape(label)}">{cell}</td>'
            for label, cell in zip(head[1:], row[1:], strict=True)
        )
        + "</tr>"
        for place, row in enumerate(rows)
    )
    ordered = " data-ordered" if marks else ""
    return f"<table><thead><tr>{heads}</tr></thead><tbody{ordered}>{body}</tbody></table>"
