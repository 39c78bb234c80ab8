"""Line charts and stacked bars as inline SVG. Colours are the page's CSS variables --s1 to --s8."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise

from mcore_rl.report.runs import Point

WIDTH, HEIGHT = 420, 212
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 24
"""margins around the plotting area, in units of the view box"""
MAX_POINTS = 280
"""a line with more is thinned to the extremes of its buckets, so that no spike is lost"""
SERIES = 8
LABEL = 12
"""from one line of text to the next"""
MINUS = "\u2212"
WIDEST = 7
"""characters of a tick's label that fit beside the axis at the usual size of letters"""


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[Point]
    color: int
    """index of the series colour"""
    faint: bool = False
    """drawn thin behind the others, without a place in the legend and the tooltip"""
    dots: bool = False
    band: Sequence[tuple[float, float, float]] = ()
    """(step, low, high) shaded behind the curve"""


@dataclass(frozen=True)
class Reference:
    """A horizontal line, such as a tolerance."""

    label: str
    value: float
    color: int | None = None
    """index of the series colour that it belongs to"""


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)


def line_chart(
    title: str, lines: Sequence[Line], *, log: bool = False, references: Sequence[Reference] = ()
) -> str:
    """An <svg> of the lines over steps; empty when nothing can be drawn (a log axis has no place for 0)."""
    lines = [shown for line in lines if (shown := _drawable(line, log)).points]
    if not lines:
        return ""
    steps = [step for line in lines for step, _ in line.points]
    x = Axis(min(steps), max(max(steps), min(steps) + 1), LEFT, WIDTH - RIGHT)
    y = _value_axis(lines, references, log)
    body = [_grid(x, y), *(_band(line, x, y) for line in lines if line.band)]
    body += [_curve(line, x, y) for line in sorted(lines, key=lambda line: not line.faint)]
    heights = labels_apart([y(reference.value) - 4 for reference in references])
    body += [_reference(reference, y(reference.value)) for reference in references]
    # Names come last, so that no line crosses one.
    body += [_named(one, height) for one, height in zip(references, heights, strict=True)]
    named = [line for line in lines if not line.faint]
    hover = [
        {
            "label": line.label,
            "color": color_class(line.color),
            "points": [[int(s), round(x(s), 1), format_number(v)] for s, v in line.points if v is not None],
        }
        for line in named
    ]
    return _svg(f"{title}. " + " ".join(map(_in_words, named)), "".join(body), hover)


def stacked_bars(title: str, columns: Sequence[str], stacks: Sequence[tuple[str, Sequence[float]]]) -> str:
    """An <svg> with one bar per column; `stacks` are (label, seconds per column) from the bottom up."""
    totals = [sum(values[i] for _, values in stacks) for i in range(len(columns))]
    y = Axis(0.0, max(*totals, 1e-9) * 1.06, HEIGHT - BOTTOM, TOP)
    pitch = (WIDTH - RIGHT - LEFT) / len(columns)
    bar = min(pitch * (0.8 if pitch > 3 else 1.0), 72.0)
    left = [LEFT + pitch * i + (pitch - bar) / 2 for i in range(len(columns))]
    body, hover = [_horizontal_grid(y)], []
    base = [0.0] * len(columns)
    for color, (label, values) in enumerate(stacks):
        tops = [b + v for b, v in zip(base, values, strict=True)]
        body += [
            f'<rect x="{at:.1f}" y="{y(t):.1f}" width="{bar:.1f}" height="{max(y(b) - y(t) - 0.6, 0):.1f}" '
            f'class="{color_class(color)}"/>'
            for at, b, t in zip(left, base, tops, strict=True)
            if t > b
        ]
        points = zip(columns, left, values, strict=True)
        hover.append(
            {
                "label": label,
                "color": color_class(color),
                "points": [
                    [column, round(at + bar / 2, 1), f"{value:.2f} s"] for column, at, value in points
                ],
            }
        )
        base = tops
    every = math.ceil(len(columns) / 5)
    body += [
        f'<text x="{at + bar / 2:.1f}" y="{HEIGHT - 7}" text-anchor="middle">'
        f"{escape(_short(column, pitch * every))}</text>"
        for column, at in list(zip(columns, left, strict=True))[::every]
    ]
    words = ", ".join(f"{label} {sum(values) / len(values):.2f} s" for label, values in stacks)
    return _svg(f"{title}. On average {words}.", "".join(body), hover)


def color_class(index: int) -> str:
    """The CSS class that sets a series colour; after the eighth they come round again."""
    return f"c{index % SERIES + 1}"


def format_number(value: float) -> str:
    """Three significant digits, more near 1 and for counts: 0.702, 1.0003, 1.23e-05, 12 300."""
    if (value == int(value) and abs(value) < 1e12) or 1000 <= abs(value) < 1e7:
        text = f"{value:,.0f}"
    elif abs(value - 1) < 0.01:
        text = f"{value:.4f}"
    elif 1e-3 <= abs(value) < 1000:
        text = f"{value:.3g}"
    else:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return text.replace(",", "\u202f").replace("-", MINUS)


def moving_average(points: Sequence[Point], window: int) -> list[Point]:
    """Centred mean over `window` points (fewer at the ends); gaps are left out of the means."""
    half = window // 2
    smooth: list[Point] = []
    for i, (step, _) in enumerate(points):
        near = [v for _, v in points[max(0, i - half) : i + half + 1] if v is not None]
        smooth.append((step, sum(near) / len(near) if near else None))
    return smooth


def ticks(axis: Axis) -> list[float]:
    """Round values inside the axis: powers of ten on a log axis, else multiples of 1, 2 or 5.

    Where a log axis has less than three powers of ten, their doubles and fives are among them.
    """
    if axis.log:
        first, last = math.ceil(math.log10(axis.low) - 1e-9), math.floor(math.log10(axis.high) + 1e-9)
        if last - first >= 2:
            return [10.0**e for e in range(first, last + 1, max(1, math.ceil((last - first) / 5)))]
        between = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
        return [value for value in between if axis.low <= value * (1 + 1e-9) and value <= axis.high]
    rough = (axis.high - axis.low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(m for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)
    count = range(math.ceil(axis.low / step - 1e-9), math.floor(axis.high / step + 1e-9) + 1)
    return [float(f"{i * step:.12g}") for i in count]


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most about `most` points: the lowest and the highest of every bucket, in order."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        finite = [p for p in bucket if p[1] is not None]
        key: Callable[[Point], float] = lambda p: p[1] or 0.0  # noqa: E731
        kept += sorted({min(finite, key=key), max(finite, key=key)}) if finite else bucket[:1]
    return kept


def _drawable(line: Line, log: bool) -> Line:
    points = [(s, v if v is not None and (v > 0 or not log) else None) for s, v in thin(line.points)]
    if all(value is None for _, value in points):
        points = []
    size = math.ceil(2 * len(line.band) / MAX_POINTS) or 1
    buckets = [line.band[i : i + size] for i in range(0, len(line.band), size)]
    band = [(b[0][0], min(low for _, low, _ in b), max(high for _, _, high in b)) for b in buckets]
    return replace(line, points=points, band=band)


def _value_axis(lines: Sequence[Line], references: Sequence[Reference], log: bool) -> Axis:
    values = [v for line in lines for _, v in line.points if v is not None] + [r.value for r in references]
    values += [v for line in lines for _, low, high in line.band for v in (low, high)]
    low, high = min(values), max(values)
    if log:
        return Axis(low / 2, max(high * 2, low * 10), HEIGHT - BOTTOM, TOP, log=True)
    if low > 0 and low < 0.5 * high:
        low = 0.0
    # Values that differ in their last digits only would leave no room for a tick between them.
    pad = max(0.07 * (high - low), 1e-6 * abs(high)) if high > low else 0.1 * abs(high) or 1.0
    return Axis(0.0 if low == 0 else low - pad, high + pad, HEIGHT - BOTTOM, TOP)


def _grid(x: Axis, y: Axis) -> str:
    marks = [t for t in ticks(x) if t == int(t)]
    labels = "".join(
        f'<text x="{x(t):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{format_number(t)}</text>' for t in marks
    )
    return f'{_horizontal_grid(y)}{labels}<text x="{LEFT - 7}" y="{HEIGHT - 7}" text-anchor="end">step</text>'


def _horizontal_grid(y: Axis) -> str:
    marks = ticks(y)
    labels = [_power(t) for t in marks] if y.log else tick_labels(marks)
    size = "" if y.log or max(map(len, labels), default=0) <= WIDEST else ' style="font-size: 8px"'
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{LEFT - 7}" y="{y(t) + 4:.1f}" text-anchor="end"{size}>{label}</text>'
        for t, label in zip(marks, labels, strict=True)
    )


def tick_labels(marks: Sequence[float]) -> list[str]:
    """The marks of a linear axis with as many digits as tell neighbours apart, and as 0 needs none."""
    if len({format_number(t) for t in marks}) == len(marks) or len(set(marks)) < len(marks):
        return [format_number(t) for t in marks]
    gap = min(after - before for before, after in pairwise(marks))
    largest = max(map(abs, marks))
    if 1e-3 <= largest < 1e7:
        decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
        texts = [f"{t:,.{decimals}f}" for t in marks]
    else:
        decimals = max(0, math.floor(math.log10(largest)) - math.floor(math.log10(gap) + 1e-9))
        texts = [f"{t:.{decimals}e}" for t in marks]
    return [text.replace(",", "\u202f").replace("-", MINUS) for text in texts]


def _power(value: float) -> str:
    exponent = math.floor(math.log10(value) + 1e-9)
    factor = round(value / 10.0**exponent)
    raised = f'10<tspan dy="-4" font-size="8">{str(exponent).replace("-", MINUS)}</tspan>'
    return raised if factor == 1 else f"{factor}\u00b7{raised}"


def labels_apart(heights: Sequence[float]) -> list[float]:
    """The heights of labels, in pixels from above: moved down where two would touch, and up from the axis."""
    apart = list(heights)
    order = sorted(range(len(apart)), key=apart.__getitem__)
    for above, below in pairwise(order):
        apart[below] = max(apart[below], apart[above] + LABEL)
    lowest = float(HEIGHT - BOTTOM - 2)
    for label in reversed(order):
        apart[label] = min(apart[label], lowest)
        lowest = apart[label] - LABEL
    return apart


def _reference(reference: Reference, at: float) -> str:
    kind = _class_of(reference)
    return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'


def _named(reference: Reference, at: float) -> str:
    place = f'x="{WIDTH - RIGHT}" y="{at:.1f}" text-anchor="end"'
    return f'<text class="{_class_of(reference)}" {place}>{escape(reference.label)}</text>'


def _class_of(reference: Reference) -> str:
    return "reference" if reference.color is None else f"reference {color_class(reference.color)}"


def _runs_of(points: Sequence[Point]) -> list[list[tuple[float, float]]]:
    """The pieces between the gaps."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((step, value))
    return [piece for piece in pieces if piece]


def _curve(line: Line, x: Axis, y: Axis) -> str:
    kind = f"line {color_class(line.color)}" + (" faint" if line.faint else "")
    pieces = _runs_of(line.points)
    lone = [piece[0] for piece in pieces if len(piece) == 1]
    dots = [p for piece in pieces for p in piece] if line.dots else lone
    return "".join(
        f'<polyline class="{kind}" points="{_path(piece, x, y)}"/>' for piece in pieces if len(piece) > 1
    ) + "".join(
        f'<circle class="{color_class(line.color)}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="3"/>' for s, v in dots
    )


def _band(line: Line, x: Axis, y: Axis) -> str:
    outline = [(s, high) for s, _, high in line.band] + [(s, low) for s, low, _ in reversed(line.band)]
    return f'<polygon class="band {color_class(line.color)}" points="{_path(outline, x, y)}"/>'


def _path(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    return " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)


def _in_words(line: Line) -> str:
    finite = [(s, v) for s, v in line.points if v is not None]
    (s0, v0), (s1, v1) = finite[0], finite[-1]
    return f"{line.label}: {format_number(v0)} at step {s0:g}, {format_number(v1)} at step {s1:g}."


def _short(text: str, pixels: float) -> str:
    most = max(4, int(pixels / 6.5))
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def _svg(words: str, body: str, hover: Sequence[dict[str, object]]) -> str:
    data = json.dumps(hover, separators=(",", ":"))
    data = data.replace("&", "&amp;").replace("<", "&lt;").replace("'", "&#x27;")  # double quotes are many
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{escape(words)}" '
        f"data-lines='{data}'>"
        f'{body}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" hidden=""/></svg>'
    )
