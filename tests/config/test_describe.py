"""Every key is described, with its type and default, and docs/config.md is what the code says."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field

from mcore_rl.config import Config
from mcore_rl.config.describe import as_markdown, describe, kind_of
from mcore_rl.errors import ConfigError
from tests.sources import ROOT


def test_every_key_has_a_type_a_default_and_a_meaning() -> None:
    lines = describe().splitlines()
    keys = [(s, k) for s, f in Config.model_fields.items() for k in f.annotation.model_fields]
    assert len(keys) > 50
    for _, key in keys:
        places = [i for i, line in enumerate(lines) if line.startswith(f"  {key} = ")]
        assert places, key
        assert all(lines[i + 1].strip() for i in places), f"{key} has no meaning"
    assert "  temperature = 1.0  (number > 0)" in lines


def test_one_section_is_shown_alone() -> None:
    text = describe(["checkpoint"])
    assert text.startswith("[checkpoint]")
    assert "[rollout]" not in text


def test_an_unknown_section_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean rollout"):
        describe(["rolout"])


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        (bool, "true or false"),
        (Annotated[int, Field(ge=1)], "integer >= 1"),
        (Annotated[float, Field(ge=0, lt=1)], "number >= 0 and < 1"),
        (Literal["a", "b", "c"], '"a", "b" or "c"'),
        (tuple[str, ...], "list of strings"),
        (tuple[Annotated[int, Field(ge=1)], ...], "list of integers >= 1"),
        (tuple[Literal["a", "b"], ...], 'list of "a" or "b"'),
        (int | None, "integer"),
    ],
)
def test_types_are_said_in_words(annotation: object, kind: str) -> None:
    assert kind_of(annotation) == kind


def test_the_page_is_what_the_code_says() -> None:
    assert (ROOT / "docs/config.md").read_text() == as_markdown(), (
        "write it anew: mcore-rl config --markdown > docs/config.md"
    )
