r"""Built-in reward: the answer is the label as mathematics has it, by the package math-verify (extra `math`).

The answer is what the last \boxed{...} of the response holds; without one, the last expression that
math-verify finds in it. math-verify's deadlines are alarms, which work in a worker of the reward pool.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from mcore_rl.errors import ConfigError
from mcore_rl.rewards.answers import last_boxed
from mcore_rl.rewards.outcome import Void
from mcore_rl.types import Sample

_LONGEST_ANSWER = 1000
"""characters: beyond them nothing was meant, and parsing takes its whole deadline"""
_END = 4000
"""characters of a response without a box in which an answer is looked for"""
_SECONDS = 5
"""of parsing, and of comparing"""


def math_match(sample: Sample) -> float | Void:
    r"""1.0 when the answer equals the label as mathematics has it (1/2, 0.5 and \frac12), else 0.0.

    An answer that cannot be parsed in time is wrong. A label in which there is no expression makes the sample
    void: `label`.
    """
    _, verify = _math_verify()
    label = sample.prompt.label_text
    expected = _expected(label)
    if not expected:
        return Void("label", f"a label without an expression: {label[:60]!r}")
    box = last_boxed(sample.text)
    if box is not None and len(box) > _LONGEST_ANSWER:
        return 0.0
    found = _parse(sample.text[-_END:] if box is None else rf"\boxed{{{box}}}")
    return float(verify(expected, found, timeout_seconds=_SECONDS))


@lru_cache(maxsize=4096)
def _expected(label: str) -> list[Any]:
    """The label's expressions; it may be LaTeX without dollars, as data files have it."""
    marked = "$" in label or r"\boxed" in label
    return (_parse(label) if marked else _parse(f"${label}$")) if label.strip() else []


def _parse(text: str) -> list[Any]:
    parse, _ = _math_verify()
    return parse(text, parsing_timeout=_SECONDS)


def _math_verify() -> tuple[Any, Any]:
    try:
        from math_verify import parse, verify  # imports sympy, a second that only this reward needs to spend
    except ImportError as error:
        raise ConfigError(
            "mcore_rl.rewards.math_answer: math-verify is not installed; pip install 'mcore-rl[math]'"
        ) from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs whole responses that it cannot read
    return parse, verify
