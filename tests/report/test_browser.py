"""The page in a real browser: how large it is, how fast it opens, and what its script does."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcore_rl.metric_names import SECTIONS
from mcore_rl.report import write_report
from mcore_rl.report.follow import serving
from tests.browser import CHROMIUM, Browser, browser
from tests.dumps.support import step_of_run, write
from tests.test_report import SETTINGS, step, write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
BYTES, MILLISECONDS = 3e6, 2000.0
"""of a page of three runs of 500 steps, and from the start of its load to its end"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as one:
        yield one


def metrics_of_everything(n: int, seed: int) -> dict[str, object]:
    """Every metric of the table at once, with all digits: more than any run has."""
    names = [name.replace("*", "one") for table in SECTIONS.values() for name in table]
    return {
        "step": n,
        **{
            name: math.sin(n / 30 + i) + (n * 7919 + i + seed) % 101 / 307 + 1 for i, name in enumerate(names)
        },
    }


@pytest.mark.slow
def test_three_runs_of_500_steps_are_small_and_open_at_once(chromium: Browser, tmp_path: Path) -> None:
    runs = []
    for seed in range(3):
        steps = [metrics_of_everything(n, seed) for n in range(500)]
        runs.append(write_run(tmp_path / f"run{seed}", steps, seed))
    page = write_report(runs)
    size = page.stat().st_size
    assert size < BYTES, size
    took = min(chromium.open(page.as_uri()) for _ in range(3))  # the machine may be busy
    print(f"{size} bytes, opened in {took:.0f} ms")
    assert took < MILLISECONDS
    plots = chromium.run("document.querySelectorAll('svg').length")
    assert plots > 80
    assert chromium.errors == []


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """A run with dumped groups and a chat for a prompt."""
    run = tmp_path / "run"
    write(run, 4, step_of_run())
    (run / "metrics.jsonl").write_text(json.dumps(step(4)) + "\n")
    (run / "resolved.toml").write_text(SETTINGS.format(seed=0))
    (run / "samples").mkdir()
    chat = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
    lines = [
        {"prompt": chat, "response": "x" * length, "label": "2", "reward": reward}
        for length, reward in ((30, 0.5), (300, 1.0), (3, None), (90, -2.0))
    ]
    (run / "samples" / "step_4.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write_report([run])


CHOOSE = """(() => {{ const field = document.getElementById("{id}"); field.value = "{value}";
field.dispatchEvent(new Event(field.tagName === "INPUT" ? "input" : "change")); }})()"""
LENGTHS = "[...document.querySelectorAll('tbody[data-ordered] > tr')].filter(r => !r.hidden)"
LENGTHS += ".map(r => Number(r.dataset.length))"


def choose(chromium: Browser, id: str, value: str) -> None:
    chromium.run(CHOOSE.format(id=id, value=value))


def background(chromium: Browser, selector: str) -> str:
    return chromium.run(f"getComputedStyle(document.querySelector('{selector}')).backgroundColor")


def test_samples_are_searched_ordered_and_coloured(chromium: Browser, page: Path) -> None:
    chromium.errors.clear()
    chromium.open(page.as_uri())
    assert chromium.run("[...document.querySelectorAll('tbody .role')].map(r => r.textContent)")[:2] == [
        "system",
        "user",
    ]
    assert chromium.run(LENGTHS) == [30, 300, 3, 90]
    for order, lengths in {
        "-length": [300, 90, 30, 3],
        "length": [3, 30, 90, 300],
        "-reward": [300, 30, 90, 3],
        "reward": [90, 30, 300, 3],
        "": [30, 300, 3, 90],
    }.items():
        choose(chromium, "order", order)
        assert chromium.run(LENGTHS) == lengths, order
    everything = chromium.run("document.querySelectorAll('[data-item]').length")
    choose(chromium, "search", "X" * 80)
    assert chromium.run(LENGTHS) == [300, 90]
    assert chromium.run("document.getElementById('found').textContent") == "2 samples"
    choose(chromium, "search", "")
    assert chromium.run("[...document.querySelectorAll('[data-item]')].filter(i => !i.hidden).length") == (
        everything
    )
    choose(chromium, "color", "m")
    trained, observed = background(chromium, ".card .p0"), background(chromium, ".card .observed")
    assert trained != observed
    choose(chromium, "color", "a")
    assert background(chromium, ".card .a0, .card .a1") != background(chromium, ".card .a3, .card .a4")
    assert background(chromium, ".card .observed") == "rgba(0, 0, 0, 0)"
    assert chromium.errors == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1360])
def test_nothing_is_wider_than_the_window_and_text_can_be_read(
    chromium: Browser, page: Path, width: int, dark: bool
) -> None:
    chromium.show(width, 900, dark=dark)
    chromium.open(page.as_uri())
    chromium.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert chromium.run("document.documentElement.scrollWidth") <= width
    luminance = """(s => s.match(/[\\d.]+/g).slice(0, 3).reduce((a, v) => a + Number(v) / 765, 0))"""
    ink, ground = (
        chromium.run(f"{luminance}(getComputedStyle(document.documentElement).{what})")
        for what in ("color", "backgroundColor")
    )
    assert ink - ground > 0.7 if dark else ground - ink > 0.7


def test_a_followed_page_loads_itself_anew(chromium: Browser, page: Path) -> None:
    chromium.show(1360, 900)
    chromium.errors.clear()
    with serving([page.parent]) as address:
        chromium.open(address)
        chromium.run("document.querySelector('details').open = false")
        before = chromium.run("document.documentElement.dataset.version")
        with (page.parent / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(step(5)) + "\n")
        chromium.until(f"document.documentElement.dataset.version !== {json.dumps(before)}")
        chromium.until("document.readyState === 'complete'")
        assert chromium.run("document.querySelector('details').open") is False, "what was folded stays so"
        assert chromium.errors == []
        chromium.open("about:blank")
