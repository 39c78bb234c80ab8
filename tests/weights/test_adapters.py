"""The export of adapters to files: typed where the disk is full, never over what is not ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mcore_rl.directories import files_in
from mcore_rl.errors import McoreRLError
from mcore_rl.lora import Lora
from mcore_rl.model.build import build_policy
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from mcore_rl.weights.adapters import export_adapter
from tests.model.support import at_layout


def export_to(mesh: Mesh, source: Path, target: Path) -> str:
    model = build_policy(source, mesh, lora=Lora(64, 16.0))
    try:
        export_adapter(model, target, base="a model", kind="weights")
    except McoreRLError as error:
        return f"{error.exit_code}: {error}"
    return ""


@pytest.mark.parametrize("options", ["size=12k", "nr_inodes=3"])
def test_a_full_disk_is_said_on_every_rank_with_the_file_and_the_remedy(
    pool2: Pool, options: str, dense_dir: Path, small_disk: Callable[[str], Path]
) -> None:
    place = small_disk(options)
    said = at_layout(pool2, "tp2", export_to, dense_dir, place / "1")
    assert said[0] == said[1]
    assert said[0].startswith("75: ")
    assert f"{place}/1.partial" in said[0]
    assert "No space left on device" in said[0]
    assert "choose another directory" in said[0]
    assert files_in(place) == [], "what fills the disk stays there"


@pytest.mark.parametrize("place", ["1", "1.partial"])
def test_what_somebody_else_put_in_its_way_stays(
    pool1: Pool, place: str, dense_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / place).mkdir()
    (tmp_path / place / "theirs").write_text("days of work")
    (said,) = at_layout(pool1, "tp1", export_to, dense_dir, tmp_path / "1")
    assert said.startswith(f"2: {tmp_path / place} holds files and no mark")
    assert files_in(tmp_path) == [f"{place}/theirs"]
    (tmp_path / place / "theirs").unlink()
    assert at_layout(pool1, "tp1", export_to, dense_dir, tmp_path / "1") == [""]
    assert json.loads((tmp_path / "1/adapter_config.json").read_text())["r"] == 64
