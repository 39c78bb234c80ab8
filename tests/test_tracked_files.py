"""Nothing in the repository points at one machine or at one registry."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.sources import ROOT, report

MACHINE = re.compile(rb"(?<![\w.~-])/(?:work|root|tmp|home/\w+|Users/\w+|opt/wheels)/[\w.]")
REGISTRY = re.compile(
    rb"\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|conda\.anaconda\.org)"
)
KEY = re.compile(rb"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,}|AKIA[A-Z0-9]{16}|ghp_[A-Za-z0-9]{30,})")
KINDS = {"a path of one machine": MACHINE, "a package registry": REGISTRY, "a key": KEY}


def findings(name: str, content: bytes) -> list[str]:
    return [
        f"{name}:{1 + content[: match.start()].count(10)}: {kind}: {match[0].decode(errors='replace')!r}"
        for kind, pattern in KINDS.items()
        for match in pattern.finditer(content)
    ]


def test_no_tracked_file_names_a_machine_a_registry_or_a_key() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of tracked files")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    files = [name for name in names if name and (ROOT / name).is_file()]
    assert len(files) > 20
    report([finding for name in files for finding in findings(name, (ROOT / name).read_bytes())])


@pytest.mark.parametrize(
    "planted",
    [
        b"path = '/" + b"work/data'",
        b"cd /" + b"root/.cache",
        b"open('/" + b"home/ann/x')",
        b"--index-url https://" + b"pypi" + b".org/simple",
        b"token = hf_" + b"a" * 34,
    ],
)
def test_the_gate_sees_what_is_planted(planted: bytes) -> None:
    (found,) = findings("file", b"first line\n" + planted)
    assert found.startswith("file:2: ")


@pytest.mark.parametrize(
    "harmless", [b"framework/step.py", b"../work/x", b"/workshop/", b"a/tmp/b", b"runs/home/x"]
)
def test_the_gate_lets_ordinary_text_pass(harmless: bytes) -> None:
    assert findings("file", harmless) == []
