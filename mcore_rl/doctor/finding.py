"""What a check answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from mcore_rl.errors import EXIT_CONFIG, McoreRLError

Level = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    check: str
    """what was looked at, such as `tokenizer`"""
    level: Level
    """`note`: not there and not needed; `warning`: the run starts, and may not be what was meant"""
    what: str
    remedy: str = ""
    """what to do about it; of every warning and error"""
    exit_code: int = EXIT_CONFIG
    """the remedy of an error"""


def guarded(check: str, examine: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """The findings of one check; a typed error becomes one more, since a doctor looks at everything."""
    findings: list[Finding] = []
    try:
        findings.extend(examine())
    except McoreRLError as error:
        findings.append(of_error(check, error))
    return findings


def of_error(check: str, error: McoreRLError) -> Finding:
    """The library's messages end with the remedy, after the last semicolon or full stop."""
    text = str(error)
    cut = max(text.rfind("; "), text.rfind(". "))
    what, remedy = (text[:cut], text[cut + 2 :]) if cut > 0 else (text, "see the message")
    return Finding(check, "error", what, remedy, error.exit_code)
