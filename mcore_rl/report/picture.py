"""A chart of the report as a picture that stands alone: with a title and a legend."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from mcore_rl.report.svg import HEIGHT, LEFT, WIDTH, Line, Reference, color_class, line_chart

STYLE = Path(__file__).with_name("style.css")
TITLE, ENTRY, COLUMNS = 26, 18, 3
"""heights of the title and of a row of the legend, and its columns; in units of the view box"""


def picture(
    title: str, lines: Sequence[Line], *, faint: str = "", references: Sequence[Reference] = ()
) -> str:
    """An SVG document of the lines; `faint` says in the legend what the thin ones are."""
    chart = line_chart(title, lines, references=references)
    named = [line for line in lines if not line.faint]
    rows = -(-len(named) // COLUMNS) + bool(faint)
    height = TITLE + HEIGHT + ENTRY * rows + 8
    body = chart[chart.index(">") + 1 : chart.rindex("</svg>")]
    entries = [_entry(index, line) for index, line in enumerate(named)]
    if faint:
        entries.append(_text(LEFT, TITLE + HEIGHT + ENTRY * rows, f"thin, in the same colours: {faint}"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'style="background: var(--panel)">'
        f"<style>{STYLE.read_text()}</style>"
        f'<text x="{LEFT}" y="17" style="font-weight: 600; fill: var(--ink)">{escape(title)}</text>'
        f'<g transform="translate(0 {TITLE})">{body}</g>{"".join(entries)}</svg>\n'
    )


def _entry(index: int, line: Line) -> str:
    column, row = index % COLUMNS, index // COLUMNS
    x = LEFT + column * (WIDTH - LEFT) // COLUMNS
    y = TITLE + HEIGHT + ENTRY * (row + 1)
    mark = f'<polyline class="line {color_class(line.color)}" points="{x},{y - 4} {x + 16},{y - 4}"/>'
    return mark + _text(x + 22, y, line.label)


def _text(x: float, y: float, words: str) -> str:
    return f'<text x="{x}" y="{y}">{escape(words)}</text>'
