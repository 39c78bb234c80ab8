"""Groups of dumped samples beside each other, the tokens of each coloured by what the trainer made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mcore_rl.dumps.directory import NAME, dumped_steps, read_step, trained_file
from mcore_rl.dumps.rollouts import RolloutDump
from mcore_rl.dumps.tokens import token_rows
from mcore_rl.dumps.trained import TrainedTokens, read_trained
from mcore_rl.errors import DataError
from mcore_rl.report.chat import chat_html, messages_of
from mcore_rl.report.tables import TEXT, badge
from mcore_rl.report.tokens import shown, strip
from mcore_rl.types import Group, Sample

STEPS, GROUPS, SAMPLES = 3, 4, 16
"""of a run, of a step and of a group that a page shows"""
TOKENS = 20_000
"""of all groups; each takes some 130 bytes"""
DOT = " \u00b7 "
HEAD, TAIL = 300, 100
"""tokens of a long sample that are shown, from its beginning and its end"""


def group_panels(run_dir: Path) -> list[str]:
    """Panels of the most telling groups of the first, a middle and the last dumped step, the last first.

    A dump that is damaged is left out; the panels of single samples say why.
    """
    directory = run_dir / NAME
    steps = dumped_steps(directory)
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}, reverse=True)[:STEPS] if steps else []
    return list(_panels(directory, chosen))


def _panels(directory: Path, steps: Sequence[int]) -> Iterator[str]:
    left, first = TOKENS, True
    for step in steps:
        try:
            dump, trained = read_step(directory, step), read_trained(trained_file(directory, step))
        except DataError:
            continue
        for group, why in _telling(dump.groups):
            left -= sum(min(_length(sample), HEAD + TAIL) for sample in group.samples[:SAMPLES])
            if left < 0:
                return
            yield _panel(dump, group, why, trained, is_open=first)
            first = False


def _telling(groups: Sequence[Group]) -> list[tuple[Group, str]]:
    """(group, why it is shown): mixed rewards, the longest and the shortest sample, then what came first."""
    groups = [group for group in groups if group.samples]
    if not groups:
        return []
    found: dict[str, tuple[Group, list[str]]] = {}

    def take(group: Group, why: str) -> None:
        found.setdefault(group.id, (group, []))[1].append(why)

    mixed = max(groups, key=_spread)
    if _spread(mixed) > 0:
        take(mixed, "rewards differ most")
    take(max(groups, key=lambda g: max(map(_length, g.samples))), "longest")
    take(min(groups, key=lambda g: min(map(_length, g.samples))), "shortest")
    for group in groups:
        if len(found) < GROUPS:
            found.setdefault(group.id, (group, []))
    return [(group, ", ".join(why)) for group, why in found.values()]


def _spread(group: Group) -> float:
    rewards = [s.reward for s in group.samples if s.reward is not None and not s.void]
    return max(rewards) - min(rewards) if rewards else -1.0


def _length(sample: Sample) -> int:
    return sum(len(segment.token_ids) for segment in sample.segments)


def _panel(
    dump: RolloutDump, group: Group, why: str, trained: Mapping[str, TrainedTokens], *, is_open: bool
) -> str:
    prompt = group.samples[0].prompt
    rewards = [s.reward for s in group.samples if s.reward is not None and not s.void]
    facts = [f"step {dump.step}", f"{len(group.samples)} samples"]
    facts += [f"mean reward {sum(rewards) / len(rewards):.3g}"] if rewards else []
    facts += [f"label {prompt.label_text[:TEXT]}", *([why] if why else [])]
    cards = "".join(_card(dump, s, trained.get(s.id)) for s in group.samples[:SAMPLES])
    more = len(group.samples) - SAMPLES
    note = f'<p class="note">{more} more samples are in the dump.</p>' if more > 0 else ""
    return (
        f'<details class="panel wide group"{" open" if is_open else ""}><summary>{shown(group.id)} '
        f"<span>{shown(', '.join(facts))}</span></summary>"
        f'<div class="chat" data-shared>{chat_html(messages_of(prompt.text, prompt.messages), TEXT)}</div>'
        f'<div class="cards" data-ordered>{cards}</div>{note}</details>'
    )


def _card(dump: RolloutDump, sample: Sample, trained: TrainedTokens | None) -> str:
    length, reward = _length(sample), None if sample.void else sample.reward
    rows = [row for row in token_rows(sample, dump.pieces, trained) if row.role != "context"]
    if len(rows) > HEAD + TAIL:
        between = f'<span class="note"> \u2026 {len(rows) - HEAD - TAIL} tokens \u2026 </span>'
        text = strip(rows[:HEAD]) + between + strip(rows[-TAIL:])
    else:
        text = strip(rows)
    facts = [f"{badge(reward)} {length} tokens", shown(sample.finish_reason), *(["void"] * sample.void)]
    facts += [f"{shown(part.name)} {part.value:.3g}" for part in sample.parts]
    return (
        f'<article class="card" data-item data-length="{length}" '
        f'data-reward="{"" if reward is None else f"{reward:g}"}">'
        f'<p class="note">{DOT.join(facts)}</p>'
        f'<pre class="tokens">{text}</pre></article>'
    )


_ORDERS = {
    "": "as sampled",
    "-length": "longest first",
    "length": "shortest first",
    "-reward": "highest reward first",
    "reward": "lowest reward first",
}
_COLORS = {
    "p": (
        "probability when sampled",
        "Darker blue: less probable when it was sampled; red: below 0.1, and below 0.01.",
    ),
    "a": (
        "advantage",
        "Green: the advantage is positive; red: it is negative; stronger: beyond 1 and -1.",
    ),
    "r": (
        "importance ratio",
        "Green: more probable than before the step's updates; red: less; stronger: by more than 20 %.",
    ),
    "m": (
        "what is trained",
        "Blue: sampled and trained; grey: observed, such as the answer of a tool, and not trained.",
    ),
}


def tools() -> str:
    """Search, order and colours of all samples; what a script alone can do is hidden without one."""
    orders = "".join(f'<option value="{value}">{label}</option>' for value, label in _ORDERS.items())
    colors = "".join(f'<option value="{value}">{label}</option>' for value, (label, _) in _COLORS.items())
    notes = "".join(
        f'<p class="note wide" data-key="{key}"{"" if key == "p" else " hidden"}>{note}</p>'
        for key, (_, note) in _COLORS.items()
    )
    return (
        '<div class="tools" hidden><label>Search '
        '<input type="search" id="search" placeholder="in prompts and responses"></label>'
        f'<label>Order <select id="order">{orders}</select></label>'
        f'<label>Colour of tokens <select id="color">{colors}</select></label>'
        f'<span id="found" role="status"></span></div>{notes}'
    )
