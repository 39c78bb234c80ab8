"""The pages: links lead somewhere, and the program takes the commands and configurations."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcore_rl.__main__ import build_parser
from mcore_rl.config.file import KEYS, OTHER_TRAINERS
from mcore_rl.metric_names import SECTIONS, meaning_of
from tests.doc_commands import FENCE, PAGES
from tests.sources import ROOT

LINK = re.compile(r"\]\(([^)\s]+)\)")
METRIC = re.compile(r"`([a-z_]+)/([a-z_0-9]+)`")
KEY = re.compile(r"`([a-z_]+)\.([a-z_]+)(\.[a-z_]+)*`")


def fences(page: Path, *languages: str) -> Iterator[str]:
    return (body for language, body in FENCE.findall(page.read_text()) if language in languages)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = FENCE.sub("", page.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


def broken_links(page: Path, text: str) -> list[str]:
    found = []
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        if not there.exists() or (anchor and there.suffix == ".md" and anchor not in anchors(there)):
            found.append(target)
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command of this project in the lines of a shell block."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        starts = [k for k, word in enumerate(words) if word.endswith("mcore-rl")]
        if starts and not any(word in ("|", "&&", ";") for word in words):
            yield words[starts[0] + 1 :]


def unknown_keys(tables: dict) -> list[str]:
    return [
        f"{section}.{key}"
        for section, keys in tables.items()
        for key in (keys if isinstance(keys, dict) else [None])
        if section not in KEYS or (key is not None and key not in KEYS[section])
    ]


def unknown_metrics(text: str) -> list[str]:
    """Names of metrics, as their first words tell them from paths, that no run logs."""
    first = {name.partition("/")[0] for names in SECTIONS.values() for name in names if "/" in name}
    return [f"{a}/{b}" for a, b in METRIC.findall(text) if a in first and not meaning_of(f"{a}/{b}")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_are_logged(page: Path) -> None:
    assert unknown_metrics(page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_taken(page: Path) -> None:
    for block in fences(page, "bash", "sh"):
        for words in commands(block):
            arguments, rest = build_parser().parse_known_args(words)
            assert callable(arguments.command)
            overrides = [word.lstrip("-").split("=")[0] for word in rest if word.startswith("--")]
            keys = [name.partition(".") for name in overrides]
            assert [name for name, _, key in keys if key.partition(".")[0] not in KEYS.get(name, ())] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configurations_have_keys_that_there_are(page: Path) -> None:
    for block in fences(page, "toml"):
        assert unknown_keys(tomllib.loads(block)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_is_python(page: Path) -> None:
    for block in fences(page, "python"):
        ast.parse(block)


def test_keys_beside_those_of_others_are_ours() -> None:
    lines = (ROOT / "docs" / "coming_from.md").read_text().splitlines()
    rows = [line.split("|")[1] for line in lines if "|" in line]
    named = [match.groups() for row in rows for match in KEY.finditer(row)]
    assert len(named) > 30
    assert [f"{section}.{key}" for section, key, _ in named if key not in KEYS.get(section, ())] == []


def test_what_a_key_of_another_trainer_means_is_what_the_page_says() -> None:
    lines = (ROOT / "docs" / "coming_from.md").read_text().splitlines()
    rows = [(line.split("|")[1], line) for line in lines if "|" in line]
    for theirs, ours in OTHER_TRAINERS.items():
        section, _, key = ours.partition(".")
        assert key in KEYS[section], ours
        assert any(f"`{ours}`" in first and theirs in line for first, line in rows), theirs


def test_what_is_wrong_is_seen() -> None:
    """The controls: a dead link, a dead anchor, a flag, a key and a metric that are not there."""
    page = ROOT / "README.md"
    assert broken_links(page, "[a](docs/nothing.md) [b](#no-such-heading) [c](docs/faq.md)") == [
        "docs/nothing.md",
        "#no-such-heading",
    ]
    assert unknown_metrics("`length/truncated`, `length/mean` and `docs/mean`") == ["length/truncated"]
    with pytest.raises(SystemExit):
        build_parser().parse_known_args(next(commands("mcore-rl plans run.toml\n")))
    wrong = tomllib.loads("[rollout]\nsamples = 1\n[runs]\ndir = 'x'")
    assert unknown_keys(wrong) == ["rollout.samples", "runs.dir"]
