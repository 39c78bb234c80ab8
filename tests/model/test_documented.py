"""docs/models.md and the four places of a family name the same families and rope types."""

from __future__ import annotations

import re

import transformers

from mcore_rl.model.hf.families import FAMILIES
from mcore_rl.model.hf.rope import ROPE_FIELDS
from mcore_rl.model.hf.tables import TABLES
from tests.model.families import FAMILIES as TINY
from tests.sources import ROOT

PAGE = (ROOT / "docs" / "models.md").read_text()


def first_column(heading: str) -> list[str]:
    """The code words in the first column of the table whose heading begins so."""
    rows = PAGE.split(f"| {heading} |")[1].split("\n\n")[0].splitlines()[2:]
    return [word for row in rows for word in re.findall(r"`(\w+)`", row.split("|")[1])]


def test_the_four_places_of_a_family_agree() -> None:
    tiny = {getattr(transformers, kind).model_type for kind, _ in TINY.values()}
    assert set(first_column("`model_type`")) == FAMILIES.keys() == TABLES.keys() == tiny


def test_every_rope_type_is_on_the_page() -> None:
    assert set(first_column("rope type")) == ROPE_FIELDS.keys()
