"""`mcore-rl samples`: dumps, samples and tokens as lines of text. What others wrote in them is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mcore_rl.dumps.directory import dumped_steps, find_dumps, find_sample, read_step, trained_file
from mcore_rl.dumps.rollouts import RolloutDump
from mcore_rl.dumps.tokens import TokenRow, token_rows
from mcore_rl.dumps.trained import TrainedTokens, read_trained
from mcore_rl.errors import DataError
from mcore_rl.terminal import escaped, listed
from mcore_rl.types import Group, Sample

_TEXT = 60
"""characters of a response in a list"""
_HEAD = ("place", "role", "id", "version", "log-prob", "old", "ratio", "advantage", "token")
_WIDTHS = (9, 8, 7, 7, 10, 10, 9, 10)


def show_samples(place: Path, step: int | None, sample: str | None, limit: int) -> Iterator[str]:
    """Lines about the dumps in `place`: of all of them, of the samples of a step, or of one sample.

    Args:
        sample: its id, of any step where `step` is None.
        limit: samples of a step that are listed, at most.

    Raises:
        DataError: there is no such dump or sample, or a file is damaged.
    """
    directory = find_dumps(place)
    steps = dumped_steps(directory)
    if step is not None and step not in steps:
        raise DataError(f"{directory}: no dump of step {step}; there are those of {listed(steps)}")
    if sample is not None:
        step = find_sample(directory, sample, steps if step is None else [step])
        dump = read_step(directory, step)
        yield from _one(dump, sample, read_trained(trained_file(directory, step)).get(sample))
    elif step is not None:
        yield from _of_step(read_step(directory, step), limit)
    else:
        yield from _all(directory, steps)


def _all(directory: Path, steps: Sequence[int]) -> Iterator[str]:
    for step in steps:
        samples = [s for group in read_step(directory, step).groups for s in group.samples]
        rewards = [s.reward for s in samples if s.reward is not None and not s.void]
        mean = f"{sum(rewards) / len(rewards):.4g}" if rewards else "-"
        tokens = sum(s.trained_tokens for s in samples)
        trained = "  trained" if trained_file(directory, step).exists() else ""
        yield f"step {step}: {len(samples)} samples, {tokens} tokens, mean reward {mean}{trained}"


def _of_step(dump: RolloutDump, limit: int) -> Iterator[str]:
    samples, limit = [s for group in dump.groups for s in group.samples], max(0, limit)
    for s in samples[:limit]:
        facts = [_reward(s), f"{s.trained_tokens} tokens", s.finish_reason]
        facts += [f"{len(s.segments)} segments"] if len(s.segments) > 1 else []
        text = s.text if len(s.text) <= _TEXT else f"{s.text[:_TEXT]}..."
        yield f"{escaped(s.id)}  {', '.join(facts)}  {escaped(text)}"
    if len(samples) > limit:
        yield f"and {len(samples) - limit} more: --limit {len(samples)} lists all"


def _one(dump: RolloutDump, id: str, trained: TrainedTokens | None) -> Iterator[str]:
    group, sample = find_in(dump, id)
    prompt = sample.prompt
    yield f"sample {escaped(sample.id)} of step {dump.step}: {_reward(sample)}, {sample.finish_reason}"
    rewards = [_reward(other) for other in group.samples]
    yield f"group {escaped(group.id)}: {', '.join(rewards)}"
    for name, text in (("prompt", prompt.text), ("label", prompt.label_text), ("response", sample.text)):
        yield f"{name}: {escaped(text)}"
    yield f"log-probs at temperature {dump.temperature:g}"
    yield "  ".join([*(name.rjust(width) for name, width in zip(_HEAD, _WIDTHS, strict=False)), _HEAD[-1]])
    for number, row in enumerate(token_rows(sample, dump.pieces, trained)):
        yield _line(number, row)


def find_in(dump: RolloutDump, id: str) -> tuple[Group, Sample]:
    """The sample and its group. Raises DataError where the dump has none of that id."""
    for group in dump.groups:
        for sample in group.samples:
            if sample.id == id:
                return group, sample
    raise DataError(f"step {dump.step} has no sample {escaped(id)}; `mcore-rl samples RUN_DIR STEP` lists it")


def _line(number: int, row: TokenRow) -> str:
    numbers = [row.log_prob, row.old_log_prob, row.ratio, row.advantage]
    cells = [f"{row.segment}:{number}", row.role, str(row.id), row.version or "-"]
    cells += ["-" if value is None else f"{value:.5g}" for value in numbers]
    shown = [cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True)]
    return "  ".join([*shown, repr(row.text)])


def _reward(sample: Sample) -> str:
    if sample.void:
        return "void"
    return "no reward" if sample.reward is None else f"reward {sample.reward:g}"
