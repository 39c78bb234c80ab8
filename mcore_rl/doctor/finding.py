"""What a check answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from mcore_rl.errors import EXIT_CONFIG, McoreRLError

Level = Literal["ok", "note", "warning", "error"]

REMEDIES = {
    "model": "take a model that docs/models.md lists, or fetch its published files again",
    "layout": "change [parallel]; `mcore-rl plan CONFIG.toml --search` says which layouts fit",
    "lora": "correct [lora]; docs/lora.md says what adapters there are, and of which models",
    "tokenizer": "fetch the published tokenizer files into model.path again",
    "teachers": "correct [distill.teachers]; docs/kinds.md says which models can teach which",
    "data": "correct the row, or name its fields in [data]; docs/data.md has the forms that are read",
    "eval": "correct the row, or the set's keys; docs/evaluation.md has them",
    "environment": "correct [environment]; docs/environments.md has the forms of functions and tools",
    "reward": "correct [reward] or the function; docs/rewards.md says what it is given and returns",
    "critic": "name a sequence classifier for the policy's tokens in critic.path, or leave it out",
    "curriculum": "correct data.curriculum; docs/rollout.md says what it is given and returns",
    "trackers": "set what it needs, or leave it out of run.trackers; docs/trackers.md has the details",
    "disk": "name a directory on a disk that can be written",
    "precision": "set model.precision to what this machine can run; docs/models.md says what each needs",
    "server": "start it by the command of docs/cluster.md, or correct rollout.urls; its log says more",
    "megatron-core": "install the version that pyproject.toml names: `make setup`",
    "gradient scale": "install the torch and megatron-core that pyproject.toml names: `make setup`",
}
"""check, or its first part, -> what to do where the message itself does not say"""


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
    what, remedy = (text[:cut], text[cut + 2 :]) if cut > 0 else (text, _where_to_look(check, text))
    return Finding(check, "error", what, remedy, error.exit_code)


def _where_to_look(check: str, text: str) -> str:
    """Where the remedy is told, for a message that says what was expected and not what to do."""
    if check == "config":
        dotted = re.search(r": ([a-z]\w*)(?:\.[\w.-]+)?: ", text)
        section = f" {dotted[1]}" if dotted else ""
        return f"set it so, or leave it out; `mcore-rl config{section}` says what each key means and takes"
    return REMEDIES[check.partition(".")[0]]
