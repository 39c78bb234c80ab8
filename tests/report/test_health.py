"""Every finding about a run's health fires on a run that has it, and on no healthy one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mcore_rl.__main__ import main
from mcore_rl.report import write_report
from mcore_rl.report.groups import _telling
from mcore_rl.report.health import LOOKS, findings
from mcore_rl.report.runs import RunData, read_runs
from mcore_rl.types import Group, Prompt, Sample, VersionSpan
from tests.test_report import step, write_run

STEPS = 40
EXACT = "mcore_rl.rewards.exact:exact_match"
Plant = Callable[[int, float], dict[str, object]]
"""(step, share of the run that is over) -> metrics in the place of healthy ones"""


def healthy(n: int) -> dict[str, object]:
    """A step of a run that learns: a little noise, and nothing that stands out."""
    noise = (n * 7919 % 13 - 6) / 100
    return step(n) | {
        "entropy": 0.6 - 0.3 * n / STEPS + noise / 10,
        "length/mean": 40.0 + 10 * n / STEPS + noise,
        "truncated": 0.02,
        "reward/no_signal": 0.3,
        "reward/format": 0.5 + 0.4 * n / STEPS + noise,
        "reward/answer": 0.2 + 0.5 * n / STEPS + noise,
        "samples": 128,
        "void": 1,
        "void/timeout": 1,
        "async/asked": 128 * n,
        "async/discarded_stale": n,
        "behaviour/ess": 0.9,
    }


def run_of(directory: Path, plant: Plant | None = None) -> RunData:
    steps = [healthy(n) | (plant(n, n / STEPS) if plant else {}) for n in range(1, STEPS + 1)]
    return read_runs([write_run(directory, steps)])[0]


PLANTED: dict[str, tuple[Plant, str]] = {
    "Entropy collapse": (lambda n, over: {"entropy": 0.6 * 0.05**over}, "fell from 0.499 to"),
    "Entropy rises": (lambda n, over: {"entropy": 0.3 + 2 * over}, "nats per token"),
    "Length drift": (lambda n, over: {"length/mean": 40 - 30 * over}, "shorter"),
    "Responses are cut off": (lambda n, over: {"truncated": over / 2}, "48% of the responses"),
    "Much is clipped": (lambda n, over: {"clip/fraction": over}, "of the tokens"),
    "Servers and trainer disagree": (
        lambda n, over: {"mismatch/p999": 3e-5 if n in (8, 9) else 1e-6},
        "In 2 of 40 steps mismatch/p999 exceeds publish.tolerance_p999 = 2e\u22125, by up to 3e\u22125",
    ),
    "Void rollouts": (
        lambda n, over: {"void": 32, "samples": 96, "void/timeout": 30, "void/crash": 2},
        "1280 of 5120 samples had no reward, since their environment or grader failed: timeout 1200, crash",
    ),
    "Stale samples": (lambda n, over: {"async/discarded_stale": 32 * n}, "25% of the samples"),
    "Staleness": (lambda n, over: {"behaviour/ess": 0.9 - 0.8 * over}, "of their number"),
    "Groups without signal": (lambda n, over: {"reward/no_signal": over}, "advantage of 0"),
    "A part of the reward says nothing": (lambda n, over: {"reward/format": 0.0}, "The part format is 0"),
    "A part of the reward falls while the reward rises": (
        lambda n, over: {"reward/answer": 0.9 - 0.8 * over},
        "The part answer went from 0.85 to 0.13",
    ),
    "Values that are no number": (
        lambda n, over: {"loss/value": None, "non_finite": ["loss/value"]} if n == 5 else {},
        "loss/value in 1",
    ),
}


@pytest.mark.parametrize("title", PLANTED)
def test_a_planted_fault_is_found_and_nothing_else(title: str, tmp_path: Path) -> None:
    plant, words = PLANTED[title]
    found = findings(run_of(tmp_path / "run", plant))
    assert [finding.title for finding in found] == [title]
    assert words in found[0].what
    assert found[0].remedy


def test_a_healthy_run_has_no_finding_and_every_look_is_planted(tmp_path: Path) -> None:
    assert findings(run_of(tmp_path / "run")) == []
    named = {look.__name__ for look in LOOKS}
    fired = {
        look.__name__
        for number, (plant, _) in enumerate(PLANTED.values())
        for run in [run_of(tmp_path / str(number), plant)]
        for look in LOOKS
        if list(look(run))
    }
    assert fired == named


def test_a_run_that_has_just_begun_has_no_course(tmp_path: Path) -> None:
    steps = [healthy(n) | {"entropy": 1.0 / n**3} for n in range(1, 6)]
    assert findings(read_runs([write_run(tmp_path / "run", steps)])[0]) == []


def test_rewards_that_are_all_equal_are_said_from_the_first_step(tmp_path: Path) -> None:
    """And a page of few steps does not call a run sound that has shown little."""
    for shares, said in (((1.0,), 1), ((1.0, 1.0, 1.0), 3), ((1.0, 0.9), 0)):
        steps = [healthy(n) | {"reward/no_signal": share} for n, share in enumerate(shares, 1)]
        directory = write_run(tmp_path / f"run_{len(shares)}_{said}", steps)
        found = findings(read_runs([directory])[0])
        assert [finding.title for finding in found] == ["Nothing can be learned"] * bool(said)
        page = write_report([directory]).read_text()
        assert ("Nothing stands out yet: what takes a course is told from 10 steps on" in page) == (not said)


def rewarded(name: str, *rewards: float) -> Group:
    prompt, spans = Prompt(name, "", (1,), "", {}), (VersionSpan("0", 0, 2),)
    made = [
        replace(
            Sample.of_response(f"{name}@0/{k}", prompt, (2, 3), (-0.5, -1.0), "", "stop", spans),
            reward=reward,
        )
        for k, reward in enumerate(rewards)
    ]
    return Group(f"{name}@0", tuple(made))


@pytest.mark.parametrize(("rewards", "said"), [((0.0, 0.0), False), ((0.0, 1.0), True)])
def test_rewards_differ_only_where_they_do(rewards: tuple[float, ...], said: bool) -> None:
    shown = _telling([rewarded("a", 0.0, 0.0), rewarded("b", *rewards)])
    assert any("rewards differ most" in why for _, why in shown) == said


def test_a_penalty_that_is_earned_less_is_no_finding(tmp_path: Path) -> None:
    """With a weight below 0 a part that falls is a part that improves."""
    plant, _ = PLANTED["A part of the reward falls while the reward rises"]
    directory = tmp_path / "run"
    run_of(directory, plant)
    with (directory / "resolved.toml").open("a") as file:
        file.write("[reward.weights]\nanswer = -1.0\n")
    assert findings(read_runs([directory])[0]) == []


def test_pages_and_the_terminal_say_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant, _ = PLANTED["Entropy collapse"]
    ill, well = tmp_path / "ill", tmp_path / "well"
    run_of(ill, plant)
    run_of(well)
    page = write_report([ill]).read_text()
    assert page.index("<h3>Entropy collapse</h3>") < page.index("<h2>Learning")
    assert "Nothing stands out. Looked at: entropy" in write_report([well]).read_text()
    both = write_report([ill, well]).read_text()
    assert both.count("<h3>Entropy collapse</h3>") == 1
    assert main(["report", str(ill)]) == 0
    assert "Entropy collapse: Entropy fell from" in capsys.readouterr().out


def test_a_page_of_several_runs_leaves_that_of_the_first_alone(tmp_path: Path) -> None:
    one, other = (run_of(tmp_path / name).name for name in ("one", "other"))
    own = write_report([tmp_path / one])
    before = own.read_bytes()
    both = write_report([tmp_path / one, tmp_path / other])
    assert (own.name, both.name, both.parent) == ("report.html", "comparison.html", own.parent)
    assert own.read_bytes() == before != both.read_bytes()


def test_a_mean_reward_is_called_a_reward(tmp_path: Path) -> None:
    """An accuracy is the mean of what is right or wrong; the mean of another function is no such thing."""
    named = {
        f'function = "{EXACT}"': "accuracy",
        'function = "mine:score"': "reward",
        f'function = "mine:score"\n[eval.sets.e]\nreward = "{EXACT}"': "accuracy",
        '[reward.functions.a]\nfunction = "mine:score"': "reward",
    }
    for number, (setting, word) in enumerate(named.items()):
        directory = write_run(
            tmp_path / str(number), [healthy(n) | {"eval/e/accuracy": n / 4} for n in (1, 2, 3)]
        )
        (directory / "resolved.toml").write_text(f"[reward]\n{setting}\n")
        page = write_report([directory]).read_text()
        assert f"<dt>Held-out {word}</dt>" in page
        assert f"<h3>Held-out {word}</h3>" in page
        assert f'<td data-label="Measure">{word}</td>' in page
        assert json.dumps(f"Held-out {'reward' if word == 'accuracy' else 'accuracy'}") not in page
