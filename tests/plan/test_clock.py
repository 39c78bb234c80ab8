"""The time model against published steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mcore_rl.parallel.layout import Layout
from mcore_rl.plan.clock import LINKS, Seconds, publish_seconds
from mcore_rl.plan.published import LLAMA_70B, OTHERS, rows
from tests.sources import ROOT

WITHIN = 0.25


def test_every_phase_of_the_published_step_is_within_a_quarter() -> None:
    fitted = [error for name, *_, error in rows() if name.startswith(LLAMA_70B.name)]
    assert len(fitted) == 5
    assert max(map(abs, fitted)) <= WITHIN


def test_dense_steps_it_was_not_fitted_to_are_within_a_quarter() -> None:
    errors = {name: error for name, *_, error in rows() if "8B," in name or "32B," in name}
    assert len(errors) == 2
    assert max(map(abs, errors.values())) <= WITHIN


def test_the_comparison_can_fail() -> None:
    """Negative control: the 70B step with a third of its tokens is out of bounds."""
    published = LLAMA_70B.published
    assert isinstance(published, Seconds)
    fewer = replace(LLAMA_70B, response_tokens=LLAMA_70B.response_tokens / 3).estimate()
    assert fewer.train / published.train < 1 - WITHIN
    assert fewer.log_probs / published.log_probs < 1 - WITHIN


def test_a_mixture_of_experts_takes_longer_than_the_model_says() -> None:
    """docs/layouts.md says so; when the model learns better, the page must too."""
    (moe,) = [error for name, *_, error in rows() if "A3B" in name]
    assert moe < -WITHIN
    assert OTHERS[-1].shape.experts > 0


def test_the_page_shows_the_table() -> None:
    page = (ROOT / "docs" / "layouts.md").read_text()
    for name, published, estimated, error in rows():
        assert f"| {name} | {published:g} | {estimated:.0f} | {error:+.0%} |" in page


@pytest.mark.parametrize(
    ("layout", "micro_batches", "bubble"),
    [("tp4pp4dp4+sp", 13, 3 / 16), ("tp4pp4vpp2dp4+sp", 16, 1.5 / 17.5), ("tp8dp8+sp", 7, 0.0)],
)
def test_bubble_of_a_pipeline(layout: str, micro_batches: int, bubble: float) -> None:
    work = LLAMA_70B.work()
    assert work.micro_batches(Layout.parse(layout)) == micro_batches
    assert work.bubble(Layout.parse(layout)) == pytest.approx(bubble)


def test_a_sample_of_three_segments_is_three_sequences_and_one_sample() -> None:
    one, layout = LLAMA_70B.work(), Layout.parse("tp4pp4dp4+sp")
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
