"""The pages as a site: every page is in it, and no link or anchor of it leads nowhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sources import ROOT
from tools.site_links import on_page_markdown


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        words, cwd=root, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.slow
def test_the_site_is_built_strictly(tmp_path: Path) -> None:
    for name in ("docs", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode == 0, built.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages - {"index"} == {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    page = (tmp_path / "site" / "tutorial" / "index.html").read_text()
    assert "fonts.googleapis" not in page
    with (tmp_path / "docs" / "faq.md").open("a") as file:
        file.write("\n[a](tutorial.md#no-such-heading)\n")
    broken = build(tmp_path, tmp_path / "broken")
    assert broken.returncode == 1
    assert "does not contain an anchor '#no-such-heading'" in broken.stderr


def test_what_is_outside_the_pages_is_named_and_pictures_stay() -> None:
    said = on_page_markdown("[a](../a.py), [`b`](b.md#c) ![p](../p.png) [c](../d/e.json)")
    assert said == "a, [`b`](b.md#c) ![p](../p.png) c"
