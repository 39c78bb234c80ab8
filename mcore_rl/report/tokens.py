"""Samples of dumped steps, token by token: a strip to read, a table of the same tokens with their numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from mcore_rl.dumps.directory import NAME, dumped_steps, find_sample, read_step, trained_file
from mcore_rl.dumps.rollouts import RolloutDump
from mcore_rl.dumps.tokens import TokenRow, token_rows
from mcore_rl.dumps.trained import TrainedTokens, read_trained
from mcore_rl.errors import DataError
from mcore_rl.terminal import escaped
from mcore_rl.types import Sample

TOKENS = 6000
"""of all samples that a page shows unasked; each takes some 500 bytes"""
_HEAD = ("#", "Token", "Id", "Role", "Version", "Log-prob", "Trainer's old", "Ratio", "Advantage")
_LEVELS = (-0.1, -0.7, -2.3, -4.6)
"""log-probs (probabilities 0.9, 0.5, 0.1, 0.01) between the shades of a token"""
_ADVANTAGES = (-1.0, -1e-6, 1e-6, 1.0)
_RATIOS = (0.8, 0.98, 1.02, 1.2)
"""between the same of its advantage and of its ratio: the middle one is neutral"""


def token_panels(run_dir: Path, wanted: Sequence[str] = ()) -> list[str]:
    """Panels of the samples `wanted`, by id, or else of some of the first and the last dumped step.

    Raises:
        DataError: no dump has a sample that is wanted. A dump that is damaged is said on the page.
    """
    directory = run_dir / NAME
    steps = dumped_steps(directory)
    if wanted:
        return [_of_sample(directory, find_sample(directory, id, steps), id) for id in wanted]
    panels, left = [], TOKENS
    for step in sorted({*steps[:1], *steps[-1:]}, reverse=True):
        try:
            dump, trained = read_step(directory, step), read_trained(trained_file(directory, step))
        except DataError as error:
            panels.append(f'<div class="panel wide">{escape(escaped(error))}</div>')
            continue
        for sample in _telling(dump):
            left -= sum(len(s.context) + len(s.token_ids) for s in sample.segments)
            if left >= 0:
                panels.append(_panel(dump, sample, trained.get(sample.id), is_open=not panels))
    if panels:
        panels.append(
            f'<p class="wide note">{len(steps)} steps are kept. <code>mcore-rl samples RUN_DIR STEP</code> '
            "lists the samples of one, <code>mcore-rl report RUN_DIR --sample ID</code> shows one.</p>"
        )
    return panels


def _telling(dump: RolloutDump) -> list[Sample]:
    """The best, the middle and the worst by reward, the first of several segments and the first void one."""
    samples = [s for group in dump.groups for s in group.samples]
    scored = [s for s in samples if s.reward is not None and not s.void]
    ranked = sorted(scored, key=lambda s: -(s.reward or 0))
    chosen = [ranked[i] for i in (0, len(ranked) // 2, -1)] if ranked else []
    chosen += [s for s in samples if len(s.segments) > 1][:1] + [s for s in samples if s.void][:1]
    return list({sample.id: sample for sample in chosen}.values())


def _of_sample(directory: Path, step: int, id: str) -> str:
    dump = read_step(directory, step)
    (sample,) = (s for group in dump.groups for s in group.samples if s.id == id)
    return _panel(dump, sample, read_trained(trained_file(directory, step)).get(id), is_open=True)


def _panel(dump: RolloutDump, sample: Sample, trained: TrainedTokens | None, *, is_open: bool) -> str:
    rows = token_rows(sample, dump.pieces, trained)
    reward = "-" if sample.reward is None else f"{sample.reward:g}"
    facts = [f"step {dump.step}", "void" if sample.void else f"reward {reward}", sample.finish_reason]
    facts += [f"{sample.trained_tokens} sampled tokens", f"label {sample.prompt.label_text}"]
    strips = "".join(_strip(number, rows) for number in range(len(sample.segments)))
    return (
        f'<details class="panel wide"{" open" if is_open else ""}><summary>{shown(sample.id)} '
        f"<span>{shown(', '.join(facts))}</span></summary>{strips}"
        f"<details><summary>Numbers</summary>{_table(rows)}</details></details>"
    )


def _strip(number: int, rows: Sequence[TokenRow]) -> str:
    return f'<pre class="tokens">{strip([row for row in rows if row.segment == number])}</pre>'


def strip(rows: Sequence[TokenRow]) -> str:
    """Tokens in a row as HTML, each with the classes of all its shades and its numbers as a title."""
    return "".join(
        f'<span class="tok {_shades(row)}" title="{_title(row)}">{shown(row.text)}</span>' for row in rows
    )


def _shades(row: TokenRow) -> str:
    """By probability, advantage and ratio, as far as they are known; by role, where it was not sampled."""
    if row.log_prob is None:
        return row.role
    found = [f"p{sum(row.log_prob < level for level in _LEVELS)}"]
    for letter, value, levels in (("a", row.advantage, _ADVANTAGES), ("r", row.ratio, _RATIOS)):
        found += [] if value is None else [f"{letter}{sum(value > level for level in levels)}"]
    return " ".join(found)


def _title(row: TokenRow) -> str:
    numbers = [("log-prob", row.log_prob), ("ratio", row.ratio), ("advantage", row.advantage)]
    said = [f"{name} {value:.4g}" for name, value in numbers if value is not None]
    return shown(", ".join([f"{row.role} {row.id}", *said]))


def _table(rows: Sequence[TokenRow]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in _HEAD)
    body = "".join(f"<tr>{''.join(_cells(number, row))}</tr>" for number, row in enumerate(rows))
    return f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cells(number: int, row: TokenRow) -> Iterator[str]:
    yield f"<td>{row.segment}:{number}</td><td><code>{shown(repr(row.text))}</code></td>"
    yield f"<td>{row.id}</td><td>{row.role}</td><td>{shown(row.version or '-')}</td>"
    for value in (row.log_prob, row.old_log_prob, row.ratio, row.advantage):
        yield f"<td>{'-' if value is None else f'{value:.5g}'}</td>"


def shown(text: str) -> str:
    """Text of others as HTML; what a reader could not see, such as a change of direction, is spelt out."""
    return escape(escaped(text))
