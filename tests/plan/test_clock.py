"""The time model against published steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mcore_rl.config import load_config
from mcore_rl.parallel.layout import Layout
from mcore_rl.plan.clock import LINKS, SamplingServers, Seconds, publish_seconds, step_seconds
from mcore_rl.plan.exchange import NETWORK, NVLINK, forward_exchange, replicas_exchange
from mcore_rl.plan.published import FITTED, HELD_OUT, LLAMA_70B, QWEN_30B, STEPS, WITHIN, rows
from mcore_rl.plan.work import work_of
from tests.sources import ROOT

STEP_70B = STEPS[0]


def test_rows_that_were_not_fitted_to_are_within_fifteen_percent() -> None:
    found = rows()
    held_out = [row for row in found if row.role == HELD_OUT]
    fitted = [row for row in found if row.role == FITTED]
    assert len(held_out) > len(fitted) >= 10
    for row in (*held_out, *fitted):
        assert abs(row.error) <= WITHIN, str(row)
    assert {row.role.partition(":")[0] for row in found} == {FITTED, HELD_OUT, "out of reach"}
    kinds = {bool(step.model.shape.experts) for step in STEPS if step.role == HELD_OUT}
    assert kinds == {False, True}


def test_the_comparison_can_fail() -> None:
    """Negative control: steps with a third of their tokens, and a mixture taken for a dense model."""
    for step in (STEPS[4], STEPS[15]):
        fewer = replace(step, response_tokens=step.response_tokens / 3).estimate().total
        assert fewer / step.seconds < 1 - WITHIN
    plain = replace(QWEN_30B, shape=replace(QWEN_30B.shape, experts=0.0))
    assert replace(STEPS[15], model=plain).estimate().total / STEPS[15].seconds < 1 - WITHIN


def test_the_page_shows_the_table() -> None:
    page = (ROOT / "docs" / "layouts.md").read_text()
    for row in rows():
        assert str(row) in page


def test_generation_beside_training_hides_the_shorter_side() -> None:
    turns = STEP_70B.estimate()
    stale = replace(STEP_70B.work(), staleness=1)
    assert stale.staleness == 1
    beside = replace(turns, beside=True)
    others = turns.log_probs + turns.train + turns.publish
    assert turns.total == pytest.approx(turns.generate + others)
    assert beside.total == pytest.approx(max(turns.generate, others))


def test_what_an_algorithm_asks_for_besides_its_samples_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """ReMax: as much as a step of one sample a prompt generates. OTB: one more pass than two epochs score."""
    monkeypatch.chdir(ROOT)

    def seconds(name: str, *flags: str, judge: float = 0.0) -> Seconds:
        work = work_of(load_config(Path("examples/gspo_8b.toml"), ["--algorithm.name", name, *flags]))
        work = replace(work, reward_flops=judge)
        return step_seconds(LLAMA_70B.shape, 8 * 10**9, Layout.parse("tp4+sp"), work, SamplingServers(4, 1))

    plain, remax = seconds("rloo"), seconds("remax")
    one = seconds("reinforce", "--rollout.samples_per_prompt", "1")
    assert remax == replace(plain, greedy=one.generate)
    assert 0 == plain.greedy < remax.greedy < remax.generate
    assert remax.total == pytest.approx(plain.total + remax.greedy)
    stale = replace(remax, beside=True)
    assert stale.total == pytest.approx(max(remax.generate, remax.total - remax.generate))
    otb, twice = seconds("otb"), seconds("rloo", "--algorithm.epochs", "2")
    assert otb == replace(plain, log_probs=otb.log_probs)
    assert otb.log_probs == pytest.approx(2 * twice.log_probs)
    judged, compared = (seconds(name, judge=0.5).log_probs for name in ("rloo", "remax"))
    # a greedy answer has a score too: one more for eight
    assert compared - plain.log_probs == pytest.approx(9 / 8 * (judged - plain.log_probs))


def test_what_ranks_exchange_is_bytes_over_links() -> None:
    """By hand: 80 layers, two blocks, an all-gather and a reduce-scatter of 7 / 8 of [T, 8192] in bf16."""
    shape, tokens = LLAMA_70B.shape, 1000.0
    assert forward_exchange(shape, Layout(), tokens).total == 0
    tensor = forward_exchange(shape, Layout.parse("tp8+sp"), tokens)
    assert tensor.tensor == pytest.approx(80 * 4 * 7 / 8 * 2 * 8192 * tokens / NVLINK)
    assert tensor.total == tensor.tensor
    staged = forward_exchange(shape, Layout.parse("tp8pp4+sp"), tokens)
    assert staged.tensor == pytest.approx(tensor.tensor / 4)
    assert staged.pipeline == pytest.approx(2 * 8192 * tokens / 8 / NETWORK)
    experts = forward_exchange(QWEN_30B.shape, Layout.parse("ep16"), tokens)
    assert experts.expert == pytest.approx(48 * 2 * 15 / 16 * 8 * 2 * 2048 * tokens / 16 / NETWORK)
    assert replicas_exchange(1e9, Layout(data=2)) == pytest.approx(6e9 / 2 / NVLINK)


@pytest.mark.parametrize(
    ("layout", "micro_batches", "bubble"),
    [("tp4pp4dp4+sp", 13, 3 / 16), ("tp4pp4vpp2dp4+sp", 16, 1.5 / 17.5), ("tp8dp8+sp", 7, 0.0)],
)
def test_bubble_of_a_pipeline(layout: str, micro_batches: int, bubble: float) -> None:
    work = STEP_70B.work()
    assert work.micro_batches(Layout.parse(layout)) == micro_batches
    assert work.bubble(Layout.parse(layout)) == pytest.approx(bubble)


def test_a_sample_of_three_segments_is_three_sequences_and_one_sample() -> None:
    one, layout = STEP_70B.work(), Layout.parse("tp4pp4dp4+sp")
    three, thrice = replace(one, segments=3.0), replace(one, samples=3 * one.samples)
    shape = LLAMA_70B.shape
    assert three.samples == one.samples
    assert three.tokens == thrice.tokens == 3 * one.tokens
    assert three.forward_flops(shape) == thrice.forward_flops(shape)
    assert three.micro_batches(layout) == thrice.micro_batches(layout) > one.micro_batches(layout)
    assert three.bubble(layout) < one.bubble(layout)


def test_publishing_is_bytes_over_speed() -> None:
    assert publish_seconds(70_553_706_496, "bf16")["400 Gb/s"] == pytest.approx(2.822, abs=1e-3)
    assert publish_seconds(1, "fp32").keys() == LINKS.keys()
