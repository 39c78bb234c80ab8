"""What a practised eye looks for in the curves of a run, in plain words: each finding with its remedy.

A finding compares the beginning of a run with its end, or counts steps. It says what is there and no verdict:
a length that doubles may be what was wanted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mcore_rl.log import NON_FINITE
from mcore_rl.report.runs import RunData, number
from mcore_rl.report.svg import format_number
from mcore_rl.terminal import joined, short

LEAST_STEPS = 10
"""a metric with fewer values has no course yet"""
COLLAPSED, ROSE = 0.2, 3.0
"""entropy at the end over that at the beginning"""
DRIFT = 2.0
"""mean length at the end over that at the beginning, or its reciprocal"""
CUT_OFF, CLIPPED, VOID, STALE, NO_SIGNAL = 0.1, 0.4, 0.05, 0.1, 0.75
"""shares of responses, tokens, samples, samples and samples from which a finding is made"""
EFFECTIVE = 0.5
"""effective sample size of the importance weights below which a finding is made"""
OF_ALL = ("reward/mean", "reward/std", "reward/no_signal")
"""metrics of the reward that are no part of it"""


class Noticed(NamedTuple):
    """One thing to look at."""

    title: str
    what: str
    """in whole sentences, with numbers"""
    remedy: str


LOOKED_FOR = (
    "entropy, response length, cut responses, clipping, agreement of servers and trainer, void rollouts, "
    "staleness, groups without signal, parts of the reward, values that are no number"
)


def findings(run: RunData) -> list[Noticed]:
    """All findings of a run, in the order of LOOKED_FOR."""
    return [finding for look in LOOKS for finding in look(run)]


def _ends(values: Sequence[float]) -> tuple[float, float] | None:
    """Means of the first and the last tenth; None where there are too few values."""
    if len(values) < LEAST_STEPS:
        return None
    part = max(3, len(values) // 10)
    return statistics.fmean(values[:part]), statistics.fmean(values[-part:])


def _entropy(run: RunData) -> Iterator[Noticed]:
    ends = _ends(run.values("entropy"))
    if ends is None or ends[0] <= 0:
        return
    words = f"from {format_number(ends[0])} to {format_number(ends[1])} nats per token"
    if ends[1] < COLLAPSED * ends[0]:
        yield Noticed(
            "Entropy collapse",
            f"Entropy fell {words}: the policy says nearly the same every time, and learns little from more "
            "samples of it.",
            "Lower optimizer.lr, sample more various prompts, or clip higher upwards than downwards "
            "(`mcore-rl algorithms dapo`).",
        )
    elif ends[1] > ROSE * ends[0]:
        yield Noticed(
            "Entropy rises",
            f"Entropy rose {words}: the policy becomes more random.",
            "Lower optimizer.lr, and look at the samples for text that makes no sense.",
        )


def _length(run: RunData) -> Iterator[Noticed]:
    ends = _ends(run.values("length/mean"))
    if ends is not None and ends[0] > 0 and not 1 / DRIFT <= ends[1] / ends[0] <= DRIFT:
        kind = "longer" if ends[1] > ends[0] else "shorter"
        yield Noticed(
            "Length drift",
            f"Responses became {kind}: on average {format_number(ends[0])} tokens at first, and "
            f"{format_number(ends[1])} at the end.",
            "Read the longest and the shortest samples below: a reward that length alone earns is exploited.",
        )
    cut = _ends(run.values("truncated"))
    if cut is not None and cut[1] > CUT_OFF:
        yield Noticed(
            "Responses are cut off",
            f"{cut[1]:.0%} of the responses of the last steps end at rollout.max_new_tokens.",
            "Raise rollout.max_new_tokens, or leave cut responses out (algorithm.overlong_filter).",
        )


def _clipping(run: RunData) -> Iterator[Noticed]:
    ends = _ends(run.values("clip/fraction"))
    if ends is not None and ends[1] > CLIPPED:
        yield Noticed(
            "Much is clipped",
            f"The loss cuts the gradient of {ends[1]:.0%} of the tokens in the last steps: updates lead far "
            "from the policy that sampled.",
            "Lower optimizer.lr or algorithm.mini_batches, or widen the algorithm's clip range.",
        )


def _agreement(run: RunData) -> Iterator[Noticed]:
    for key, setting in (("mismatch/p999", "tolerance_p999"), ("mismatch/max_abs", "tolerance_max")):
        limit = number(run.settings.get(f"publish.{setting}"))
        values = run.values(key)
        beyond = [value for value in values if limit and value > limit]
        if limit and beyond:
            yield Noticed(
                "Servers and trainer disagree",
                f"In {len(beyond)} of {len(values)} steps {key} exceeds publish.{setting} = "
                f"{format_number(limit)}, by up to {format_number(max(beyond))}: the tokens were sampled by "
                "another policy than the one that is trained.",
                "Compare precision and kernels of servers and trainer (docs/rollout.md), or weigh by a "
                "correction of importance (docs/algorithms.md).",
            )
            return


def _void(run: RunData) -> Iterator[Noticed]:
    void, samples = sum(run.values("void")), sum(run.values("samples"))
    if not void or void / (void + samples) <= VOID:
        return
    reasons = {key: sum(run.values(key)) for key in run.keys if key.startswith("void/")}
    most = sorted(reasons, key=lambda key: -reasons[key])[:3]
    named = joined(f"{short(key.removeprefix('void/'))} {reasons[key]:.0f}" for key in most)
    yield Noticed(
        "Void rollouts",
        f"{void:.0f} of {void + samples:.0f} samples had no reward, since their environment or grader "
        f"failed{': ' + named if named else ''}.",
        "Mend the commonest reason first; a task that fails only where the policy does badly biases what is "
        "learned.",
    )


def _staleness(run: RunData) -> Iterator[Noticed]:
    asked, stale = (run.values(f"async/{what}") for what in ("asked", "discarded_stale"))
    if asked and stale and asked[-1] and stale[-1] / asked[-1] > STALE:
        yield Noticed(
            "Stale samples",
            f"{stale[-1] / asked[-1]:.0%} of the samples were thrown away, since they were too old when "
            "their step came.",
            "Raise rollout.max_staleness, or lower rollout.max_new_tokens, so that fewer wait for the "
            "longest.",
        )
    weights = _ends(run.values("behaviour/ess"))
    if weights is not None and weights[1] < EFFECTIVE:
        yield Noticed(
            "Staleness",
            f"Importance weights are so unequal that the samples of the last steps count as {weights[1]:.0%} "
            "of their number: the policy has moved far from those that sampled.",
            "Lower rollout.max_staleness or optimizer.lr.",
        )


def _signal(run: RunData) -> Iterator[Noticed]:
    values = run.values("reward/no_signal")
    ends = _ends(values)
    if values and min(values) == 1:  # which needs no course to be seen
        yield Noticed(
            "Nothing can be learned",
            f"Of {len(values)} steps, not one had a sample with an advantage other than 0, since all of its "
            "group have the same reward.",
            "Read the samples: look whether the reward function sees what it should, and take prompts that "
            "the model can sometimes solve, or begin with supervised training.",
        )
    elif ends is not None and ends[1] > NO_SIGNAL:
        yield Noticed(
            "Groups without signal",
            f"{ends[1]:.0%} of the samples of the last steps have an advantage of 0, since all of their "
            "group have the same reward.",
            "Take prompts of another difficulty (data.curriculum), replace such groups "
            "(rollout.dynamic_sampling), or end here.",
        )


def _parts(run: RunData) -> Iterator[Noticed]:
    whole = _ends(run.values("reward/mean"))
    for key in run.keys:
        if not key.startswith("reward/") or key in OF_ALL:
            continue
        values, name = run.values(key), short(key.removeprefix("reward/"))
        ends = _ends(values)
        if ends is None or whole is None:
            continue
        weight = number(run.settings.get(f"reward.weights.{key.removeprefix('reward/')}"))
        sign = -1 if weight is not None and weight < 0 else 1
        spread = max(values) - min(values)
        if spread <= 1e-9 * max(1.0, abs(values[0])):
            yield Noticed(
                "A part of the reward says nothing",
                f"The part {name} is {format_number(values[-1])} in every step.",
                "Look whether its function sees what it should, or leave the part out.",
            )
        elif sign * (ends[1] - ends[0]) < -0.5 * spread and whole[1] > whole[0]:
            yield Noticed(
                "A part of the reward falls while the reward rises",
                f"The part {name} went from {format_number(ends[0])} to {format_number(ends[1])}, and the "
                f"reward from {format_number(whole[0])} to {format_number(whole[1])}: one part is earned at "
                "the cost of another.",
                "Read the samples, and weigh the parts anew (reward.weights).",
            )


def _numbers(run: RunData) -> Iterator[Noticed]:
    broken: dict[str, int] = {}
    for record in run.steps:
        names = record.get(NON_FINITE)
        for name in names if isinstance(names, list) else ():
            broken[str(name)] = broken.get(str(name), 0) + 1
    if broken:
        named = joined(f"{short(name)} in {times}" for name, times in broken.items())
        yield Noticed(
            "Values that are no number",
            f"Some metrics were infinite or no number, of {len(run.steps)} records: {named}.",
            "A loss or gradient among them ends a run by itself; docs/debugging.md says how to find the "
            "token.",
        )


LOOKS: Sequence[Callable[[RunData], Iterator[Noticed]]] = (
    _entropy,
    _length,
    _clipping,
    _agreement,
    _void,
    _staleness,
    _signal,
    _parts,
    _numbers,
)
