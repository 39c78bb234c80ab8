"""Any JSON value, the awkward ones included: what the fuzz tests put where a user would put a value."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import strategies as st


def examples(usual: int) -> int:
    """How many a fuzz test tries: `usual`, or FUZZ_EXAMPLES of the environment for a long run by hand."""
    return int(os.environ.get("FUZZ_EXAMPLES", usual))


AWKWARD: tuple[Any, ...] = (
    *(True, False, None, 0, -1, 1, 2**31, 2**53, 2**63, -(2**64), 10**400, 1.5, -0.0, 5e-324, 1e308, -1e308),
    *(float("nan"), float("inf"), "", "0", "\0", "\ud800", "\x1b[2J", "\u202e", "x" * 5000),
    *([], {}, [[]], [{}], {"": ""}, [None], [0] * 50),
)


def json_values() -> st.SearchStrategy[Any]:
    """Scalars of every kind and range, and objects and arrays of them."""
    text = st.text(st.characters(), max_size=12)
    scalars = st.sampled_from(AWKWARD) | st.integers() | st.floats() | text | st.integers(1, 64)
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4)
    )
