"""One page over the stages of the tiny RLHF task: what each learnt, its curves, and samples before and after.

    python -m examples.rlhf_tiny.page RUNS

reads RUNS/sft, RUNS/reward_model, RUNS/ppo and RUNS/dpo as `make rlhf` leaves them, and writes
RUNS/index.html, with a link to the report of each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from mcore_rl.config import load_config
from mcore_rl.directories import write_whole
from mcore_rl.errors import DataError
from mcore_rl.log import read_metrics
from mcore_rl.report.picture import STYLE, picture
from mcore_rl.report.svg import Line, Reference

TRUTH = "eval/truth/accuracy"
"""the hidden true score of held-out prompts"""
KL_TARGET = load_config(Path(__file__).with_name("ppo.toml")).algorithm.params["kl_target"]
SAMPLES = 8
LAYOUT = (
    "html body{max-width:66rem;margin:0 auto;padding:1.5rem}html h2{margin-top:2rem}"
    "html svg{width:min(100%,32rem);height:auto}"
)


class Chart(NamedTuple):
    """Curves of one stage in one picture."""

    title: str
    metrics: Mapping[str, str]
    """metric -> its label"""
    target: float | None = None


STAGES: Mapping[str, tuple[str, Sequence[Chart]]] = {
    "sft": (
        "1. SFT: respond as the writers do, good and bad",
        [Chart("Loss, nats per token", {"loss/policy": "trained"})],
    ),
    "reward_model": (
        "2. Reward model: score as the judge prefers",
        [
            Chart("Accuracy on pairs", {"preference/accuracy": "trained", "validation/accuracy": "held out"}),
            Chart("Loss", {"loss/reward_model": "trained", "validation/loss": "held out"}),
        ],
    ),
    "ppo": (
        "3. PPO against the reward model",
        [
            Chart("Hidden true score", {TRUTH: "held out"}),
            Chart("Reward of the model", {"reward/mean": "mean"}),
            Chart("KL to the SFT policy, nats per response", {"kl/response": "KL"}, KL_TARGET),
            Chart("Coefficient of the KL", {"kl/coefficient": "adapted"}),
            Chart("Critic: explained variance of the returns", {"value/explained_variance": "critic"}),
        ],
    ),
    "dpo": (
        "Instead of 2 and 3. DPO on the same pairs",
        [
            Chart("Hidden true score", {TRUTH: "held out"}),
            Chart("Accuracy on pairs", {"preference/accuracy": "trained", "validation/accuracy": "held out"}),
        ],
    ),
}


def points_of(records: Sequence[Mapping[str, float]], metric: str) -> list[tuple[float, float | None]]:
    """(step, value) of the records that have the metric."""
    return [(record["step"], record[metric]) for record in records if metric in record]


def charts(run: Path, wanted: Sequence[Chart]) -> Iterator[str]:
    """The pictures of one stage."""
    records = read_metrics(run / "metrics.jsonl")
    for chart in wanted:
        names = enumerate(chart.metrics.items())
        lines = [Line(label, points_of(records, metric), color) for color, (metric, label) in names]
        known = [] if chart.target is None else [Reference("target", chart.target)]
        yield picture(chart.title, [line for line in lines if line.points], references=known)


def last_step(run: Path) -> int:
    """The last step that the log has."""
    return max(int(record["step"]) for record in read_metrics(run / "metrics.jsonl"))


def answers(run: Path, step: int) -> dict[str, tuple[str, float]]:
    """Held-out prompt -> a response to it after a step, and its hidden true score."""
    lines = (run / "eval" / f"step_{step}.truth.jsonl").read_text().splitlines()
    return {row["prompt"]: (row["response"], row["reward"]) for row in map(json.loads, lines)}


def samples(runs: Path) -> str:
    """A table of the same held-out prompts: what the SFT policy answers, and what PPO and DPO made of it."""
    found = [answers(runs / "ppo", 0)]
    found += [answers(runs / name, last_step(runs / name)) for name in ("ppo", "dpo")]
    shown = [prompt for prompt in found[0] if all(prompt in its for its in found)][:SAMPLES]
    cells = [[prompt, *(f"{its[prompt][0]} ({its[prompt][1]:.2f})" for its in found)] for prompt in shown]
    rows = [["prompt", "after SFT (true score)", "after PPO", "after DPO"], *cells]
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<h2>Held-out prompts, before and after</h2><table>{lines}</table>"


def stage(runs: Path, name: str) -> str:
    """A section of the page."""
    title, wanted = STAGES[name]
    pictures = "".join(charts(runs / name, wanted))
    return f'<h2>{escape(title)}</h2><p><a href="{name}/report.html">its report</a></p>{pictures}'


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page."""
    runs = Path((sys.argv[1:] if argv is None else argv)[0])
    body = "".join(stage(runs, name) for name in STAGES) + samples(runs)
    head = '<!doctype html><meta charset="utf-8"><title>From data to an aligned model</title>'
    style = f"<style>{STYLE.read_text()}{LAYOUT}</style>"
    write_whole(runs / "index.html", f"{head}{style}<h1>From data to an aligned model</h1>{body}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DataError as error:  # a stage that has not run
        print(f"page: {error}", file=sys.stderr)
        sys.exit(2)
