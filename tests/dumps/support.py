"""Groups with everything that a dump has to keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from mcore_rl.directories import mark
from mcore_rl.dumps.directory import groups_file, trained_file
from mcore_rl.dumps.rollouts import Words, dump_bytes
from mcore_rl.dumps.trained import TrainedTokens, trained_bytes
from mcore_rl.types import Group, Prompt, RewardPart, Sample, Segment, TurnReward, VersionSpan
from tests.training.test_trajectories import random_trajectory

HOSTILE = "\x1b[2J<script>alert(1)</script>\u202e\r\n&"
WORDS = Words(lambda ids: " ".join(map(str, np.asarray(ids).tolist())), lambda id: f"<{id}>")
LABELS = ("0", 1, [2.5, {"unit": None}], "", True)
"""any values of JSON"""
CURSOR = {"seed": 0, "epoch": 1, "position": 3}


def response(id: str, prompt: Prompt, tokens: int, reward: float, experts: bool = False) -> Sample:
    """A sample of one segment of which all is trained, by two weight versions."""
    half = tokens // 2
    spans = (VersionSpan("2", 0, half), VersionSpan("3", half, tokens))
    routed = np.arange((len(prompt.token_ids) + tokens - 1) * 4, dtype=np.uint8).reshape(-1, 2, 2) % 2
    return Sample.of_response(
        *(id, prompt, np.arange(tokens, dtype=np.int32), -np.arange(tokens, dtype=np.float32) / 7),
        *(HOSTILE, "length", spans, reward, routed if experts else None),
    )


def trajectories(count: int, seed: int = 0, step: int = 4) -> list[Group]:
    """Groups of one sample of several segments, masks, cut contexts; every fifth is void."""
    rng, groups = np.random.default_rng(seed), []
    for number in range(count):
        sample, _ = random_trajectory(rng, number)
        prompt = replace(sample.prompt, text=HOSTILE, label=LABELS[number % len(LABELS)])
        asked = ({"role": "user", "content": HOSTILE},) if number % 2 else ()
        prompt = replace(prompt, metadata={"tags": [number, None]}, messages=asked)
        old, sample = sample.prompt.token_array, replace(sample, prompt=prompt, id=f"p{number}@{step}/0")
        cut = [replace(s, context=prompt.token_array) if s.context is old else s for s in sample.segments]
        sample = replace(sample, segments=tuple(cut), void=number % 5 == 4, text=f"said {number}")
        sample = replace(sample, reward=None) if sample.void else sample
        groups.append(Group(f"p{number}@{step}", (sample,)))
    return groups


def step_of_run(step: int = 4) -> list[Group]:
    """Trajectories, a group of two responses, one with experts, and a group whose samples were aborted."""
    prompt = Prompt("a", "7+1=", (5, 6), "8")
    parted = {"parts": (RewardPart("form", -1.0, 0.5),), "turn_rewards": (TurnReward(2, -0.5),)}
    pair = (
        response(f"a@{step}/0", prompt, 5, 1.0),
        replace(response(f"a@{step}/1", prompt, 3, -0.5, experts=True), **parted),
    )
    return [*trajectories(9, step=step), Group(f"a@{step}", pair), Group(f"b@{step}", ())]


def write(run_dir: Path, step: int, groups: list[Group], *, trained: bool = True) -> Path:
    """RUN_DIR/rollouts with a dump of the step, and what a trainer made of it; the directory."""
    directory = run_dir / "rollouts"
    directory.mkdir(parents=True, exist_ok=True)
    mark(directory, "rollouts")
    content = dump_bytes(step, groups, temperature=0.5, cursor=CURSOR, words=WORDS)
    groups_file(directory, step).write_bytes(content)
    alive = [s for group in groups for s in group.samples if not s.void]
    if trained:
        ends = np.cumsum([s.trained_tokens for s in alive])
        total = int(ends[-1])
        old = np.linspace(-2, 0, total, dtype=np.float32)
        now = old + np.float32(0.25)
        now[:1] = np.nan
        tokens = TrainedTokens(old, now, np.linspace(-1, 1, total, dtype=np.float32))
        path = trained_file(directory, step)
        path.write_bytes(trained_bytes([s.id for s in alive], ends.tolist(), tokens))
    return directory


def segments_equal(one: Segment, other: Segment) -> bool:
    """Token for token, with log-probs, masks, versions and experts."""
    masks = [np.ones(len(s.token_ids), bool) if s.trained is None else s.trained for s in (one, other)]
    routed = [np.zeros(0) if s.experts is None else s.experts for s in (one, other)]
    return (
        one.versions == other.versions
        and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in ("context", "token_ids"))
        and np.array_equal(one.log_probs, other.log_probs)
        and np.array_equal(*masks)
        and np.array_equal(*routed)
    )
