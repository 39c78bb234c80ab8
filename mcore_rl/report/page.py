"""The page: head, summary, figures, samples and settings, as one HTML file without any external request."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from html import escape
from importlib.resources import files
from pathlib import Path

from mcore_rl.directories import write_whole
from mcore_rl.errors import DataError
from mcore_rl.report.groups import group_panels, tools
from mcore_rl.report.health import LEAST_STEPS, LOOKED_FOR, findings
from mcore_rl.report.plots import Figure, draw_sections
from mcore_rl.report.runs import RunData, read_runs
from mcore_rl.report.summary import Fact, headline, key_settings
from mcore_rl.report.svg import color_class
from mcore_rl.report.tables import comparison, held_out_table, run_key, sample_tables, settings_tables
from mcore_rl.report.tokens import token_panels
from mcore_rl.terminal import escaped

_TITLE = "mcore_rl report</title>"
"""in every page; what lacks it is somebody else's"""
ALONE, TOGETHER = "report.html", "comparison.html"
"""the page of one run, and that of several, which leaves the first run's own alone"""
SCRIPTS = ("hover.js", "samples.js")
FOLLOW = "follow.js"
"""asks the server of `report --follow` whether there is more"""
_HEAD_BYTES = 1 << 16


def write_report(run_dirs: Sequence[Path], out: Path | None = None, samples: Sequence[str] = ()) -> Path:
    """Write the page of one run, or of several over each other.

    It is written to `out`, by default ALONE in the run's directory, and TOGETHER in the first of several.

    Args:
        samples: ids of dumped samples of one run that are shown token by token; by default it shows a few.

    Returns its path. Raises DataError where a run directory has no complete line of metrics, no dump has such
    a sample, or something else wrote what would be replaced, StorageError where the page cannot be written;
    an older page then stays as it is.
    """
    text = page_of(run_dirs, samples)
    path = out or run_dirs[0] / (ALONE if len(run_dirs) == 1 else TOGETHER)
    _check_ours(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path


def page_of(run_dirs: Sequence[Path], samples: Sequence[str] = (), *, follows: bool = False) -> str:
    """The page's text; `follows` adds what loads it anew. Raises DataError as write_report."""
    if samples and len(run_dirs) > 1:
        raise DataError("report: --sample shows samples of one run; name one run directory")
    runs = read_runs(run_dirs)
    alone = len(run_dirs) == 1
    tokens = token_panels(run_dirs[0], samples) if alone else []
    groups = group_panels(run_dirs[0]) if alone and not samples else []
    return render(runs, tokens, groups, follows=follows)


def _check_ours(path: Path) -> None:
    """Raises DataError where something other than this command wrote the file at `path`."""
    if path.is_dir() or not os.path.lexists(path):  # a directory is never replaced by a file
        return
    with suppress(OSError):
        if path.is_file():
            with path.open("rb") as page:
                if _TITLE.encode() in page.read(_HEAD_BYTES):
                    return
    raise DataError(
        f"{path} is no page of this command: something else wrote it, and it would be replaced. Nothing was "
        "touched. Move it away"
    )


def render(
    runs: Sequence[RunData],
    tokens: Sequence[str] = (),
    groups: Sequence[str] = (),
    *,
    follows: bool = False,
) -> str:
    """The page as text, with panels of `tokens` and of `groups`; the same runs give the same text.

    Control characters and bidirectional marks of names, keys and samples are written out, as on a terminal.
    """
    script = "\n".join(_asset(name) for name in (*SCRIPTS, *([FOLLOW] if follows else [])))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    policy += "; connect-src 'self'" if follows else ""
    parts = [_one_run(runs[0]) if len(runs) == 1 else _several_runs(runs)]
    parts += [_section("Health", [_health(runs)]), _section("Held-out sets", [held_out_table(runs)])]
    parts += [_section(heading, map(_figure, figures)) for heading, figures in draw_sections(runs).items()]
    tables = sample_tables(runs)
    above = [tools()] if tables or groups or tokens else []
    parts += [_section("Samples", [*above, *tables]), _section("Groups of samples", groups)]
    parts += [_section("Token by token", tokens), _section("Settings", settings_tables(runs))]
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(", ".join(run.name for run in runs))} \u00b7 {_TITLE}
<style>{_asset("style.css")}</style>
</head>
<body>
<main data-color="p">{"".join(parts)}</main>
<div id="tip" role="status" hidden></div>
<script>{script}</script>
</body>
</html>
"""
    return "\n".join(map(escaped, page.split("\n")))


def _one_run(run: RunData) -> str:
    chips = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in key_settings(run.settings)
    )
    title = f'<p class="eyebrow">Run report</p><h1>{escape(run.name)}</h1>'
    tiles = "".join(map(_tile, headline(run)))
    return f'<header>{title}<dl class="chips">{chips}</dl></header><dl class="tiles">{tiles}</dl>'


def _several_runs(runs: Sequence[RunData]) -> str:
    names = "".join(f'<span class="run">{run_key(i, run)}</span>' for i, run in enumerate(runs))
    header = f'<header><p class="eyebrow">{len(runs)} runs compared</p><h1>{names}</h1></header>'
    return header + _section("Result", [comparison(runs)])


def _health(runs: Sequence[RunData]) -> str:
    """What was found in each run, and what was looked for where nothing was."""
    found = [(i, run, finding) for i, run in enumerate(runs) for finding in findings(run)]
    if not found:
        early = any(len(run.steps) < LEAST_STEPS for run in runs)
        so_far = f" yet: what takes a course is told from {LEAST_STEPS} steps on" if early else ""
        return f'<p class="note wide">Nothing stands out{so_far}. Looked at: {LOOKED_FOR}.</p>'
    return "".join(
        f'<div class="panel finding"><h3>{escape(finding.title)}</h3>'
        f"{f'<p class=note>{run_key(i, run)}</p>' if len(runs) > 1 else ''}"
        f'<p>{escape(finding.what)}</p><p class="note">{escape(finding.remedy)}</p></div>'
        for i, run, finding in found
    )


def _tile(fact: Fact) -> str:
    return (
        f'<div class="tile"><dt>{escape(fact.label)}</dt><dd>{escape(fact.value)}</dd>'
        f'<dd class="detail">{escape(fact.detail)}</dd></div>'
    )


def _section(heading: str, parts: Iterable[str]) -> str:
    content = "".join(parts)
    return (
        f'<section><h2>{escape(heading)}</h2><div class="grid">{content}</div></section>' if content else ""
    )


def _figure(figure: Figure) -> str:
    legend = "".join(
        f'<li><i class="key {color_class(color)}"></i>{escape(label)} <b>{escape(value)}</b></li>'
        for color, label, value in figure.legend
    )
    caption = f"<figcaption><h3>{escape(figure.title)}</h3><p>{escape(figure.note)}</p></figcaption>"
    return f'<figure class="panel">{caption}{figure.svg}<ul class="legend">{legend}</ul></figure>'


def _asset(name: str) -> str:
    return files("mcore_rl.report").joinpath(name).read_text(encoding="utf-8")
