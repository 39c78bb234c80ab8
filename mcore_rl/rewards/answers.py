"""Built-in rewards that compare the answer of a response with the label, and what finds an answer in a text.

A reward takes the sample and can be named in `reward.function`; the others take a text, for functions of
one's own. None of them judges whether two expressions mean the same: math_answer.py does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from mcore_rl.types import Sample

_NUMBER = re.compile(
    r"[-+]?(?:\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?(?!\d)(?:\s*/\s*\d+)?\s*%?"
)
_LONGEST = 400
"""characters of a number: beyond them nothing was meant, and arithmetic takes long"""
_BOXED = r"\boxed{"


def numeric_match(sample: Sample) -> float:
    """1.0 when the last number of the response equals the last of the label exactly, else 0.0."""
    expected = last_number(sample.prompt.label_text)
    return float(expected is not None and last_number(sample.text) == expected)


def regex_match(sample: Sample) -> float:
    """1.0 when the label, a regular expression, matches the whole response without white space around it.

    `.` matches line ends too. Raises re.error for a label that is none.
    """
    return float(re.fullmatch(sample.prompt.label_text, sample.text.strip(), re.DOTALL) is not None)


def boxed_match(sample: Sample) -> float:
    r"""1.0 when the last \boxed{...} of the response holds the label, white space aside, else 0.0."""
    answer = last_boxed(sample.text)
    return float(answer is not None and _without_space(answer) == _without_space(sample.prompt.label_text))


def tags_match(sample: Sample, *, tags: Sequence[str]) -> float:
    """1.0 when the response is `<tag>...</tag>` for each of `tags` in turn, else 0.0; see has_tags.

    Special tokens are not in `sample.text`; for tags that are, write a function with `full_text`.
    """
    return float(has_tags(sample.text, tags))


def last_number(text: str) -> Fraction | None:
    """The last number of a text; None where there is none.

    Signs, decimals, thousands as 1,234, exponents of up to 3 digits, fractions as 3/4 and percent are read.
    """
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007 the last one
        pass
    return None if found is None or len(found[0]) > _LONGEST else _value(found[0])


def _value(text: str) -> Fraction | None:
    number, percent = text.replace(",", "").rstrip("% \t\n"), text.endswith("%")
    above, _, below = ("".join(number.split())).partition("/")
    if below and not int(below):
        return None
    value = Fraction(above) / Fraction(below or 1)
    return value / 100 if percent else value


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} of a text holds, the braces in it balanced; None where there is none."""
    start = text.rfind(_BOXED)
    if start < 0:
        return None
    depth = 0
    for place in range(start + len(_BOXED) - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start + len(_BOXED) : place]
    return None


def has_tags(text: str, tags: Sequence[str]) -> bool:
    """Whether a text is `<tag>...</tag>` for each of `tags` in turn, each once, with white space between."""
    body = r"\s*".join(rf"<{re.escape(tag)}>.*?</{re.escape(tag)}>" for tag in tags)
    once = all(text.count(f"<{tag}>") == 1 and text.count(f"</{tag}>") == 1 for tag in tags)
    return once and re.fullmatch(rf"\s*{body}\s*", text, re.DOTALL) is not None


def _without_space(text: str) -> str:
    return "".join(text.split())
