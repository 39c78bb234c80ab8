"""docs/metrics.md is the table of the code; tests of whole runs ask whether the table is complete."""

from __future__ import annotations

from mcore_rl.metric_names import SECTIONS, as_markdown, meaning_of
from tests.sources import ROOT


def test_the_page_is_the_table() -> None:
    command = "python -c 'from mcore_rl.metric_names import as_markdown; print(as_markdown(), end=\"\")'"
    assert (ROOT / "docs/metrics.md").read_text() == as_markdown(), (
        f"write it anew: {command} > docs/metrics.md"
    )


def test_every_name_stands_once_and_means_something() -> None:
    names = [name for table in SECTIONS.values() for name in table]
    assert len(names) == len(set(names))
    assert all(text.endswith(".") for table in SECTIONS.values() for text in table.values())


def test_a_star_stands_for_any_set() -> None:
    assert meaning_of("eval/held_out/accuracy") == meaning_of("eval/gsm8k/accuracy")
    assert meaning_of("length/median") is None
    assert meaning_of("reward/mean") != meaning_of("reward/format")
