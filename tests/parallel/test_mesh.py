"""Layouts in words, their contradictions, and the groups that they make."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from mcore_rl.errors import LayoutError
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import build_mesh, destroy_mesh
from mcore_rl.parallel.pool import Pool


@pytest.mark.parametrize(
    ("text", "layout", "ranks"),
    [
        ("tp1", Layout(), 1),
        ("tp2", Layout(tensor=2), 2),
        ("tp2+sp", Layout(tensor=2, sequence=True), 2),
        ("tp2sp", Layout(tensor=2, sequence=True), 2),
        ("tp2pp2", Layout(tensor=2, pipeline=2), 4),
        ("tp2+pp2", Layout(tensor=2, pipeline=2), 4),
        ("pp2+vpp2", Layout(pipeline=2, virtual_pipeline=2), 2),
        ("pp2vpp2dp2", Layout(pipeline=2, virtual_pipeline=2, data=2), 4),
        ("tp2cp2+sp", Layout(tensor=2, context=2, sequence=True), 4),
        ("ep2", Layout(expert=2, data=2), 2),
        ("ep4cp2", Layout(expert=4, context=2, data=2), 4),
        ("tp2ep2", Layout(tensor=2, expert=2, sequence=True), 2),
        ("tp2ep2dp2", Layout(tensor=2, expert=2, data=2, sequence=True), 4),
        ("dp16tp8pp4", Layout(tensor=8, pipeline=4, data=16), 512),
    ],
)
def test_parse(text: str, layout: Layout, ranks: int) -> None:
    assert Layout.parse(text) == layout
    assert layout.world_size == ranks
    assert Layout.parse(str(layout).replace("1rank", "tp1")) == layout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "layout '': cannot read ''"),
        ("tp", "cannot read 'tp'"),
        ("tp0", "cannot read 'tp0'"),
        ("tp-2", "cannot read 'tp-2'"),
        ("xp2", "cannot read 'xp2'"),
        ("tp2tp4", "cannot read 'tp4'"),
        ("tp2++pp2", r"cannot read '\+\+pp2'"),
        ("tp2 pp2", "cannot read ' pp2'"),
        ("sp2", "cannot read 'sp2'"),
        ("sp", "sequence parallelism needs tensor parallelism"),
        ("vpp2", "virtual pipeline stages need parallel.pipeline above 1"),
        ("ep3dp2", "expert parallelism 3 must divide tensor x context x data = 2"),
    ],
)
def test_what_cannot_be_read_or_contradicts_itself(text: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Layout.parse(text)


def coordinates(text: str) -> dict:
    mesh = build_mesh(Layout.parse(text), timeout=60.0)
    try:
        sizes = {name: getattr(mesh, name).size() for name in ("tp", "cp", "pp", "replica", "data", "world")}
        flags = (mesh.is_main, mesh.is_last_stage, mesh.is_replica_lead, mesh.owns_metrics)
        ranks = (mesh.tp_rank, mesh.pp_rank, mesh.cp_rank, mesh.dp_rank, mesh.expert_dp_rank)
        return {"ranks": ranks, "flags": flags, "sizes": sizes}
    finally:
        destroy_mesh()


@pytest.mark.parametrize(
    ("text", "second", "replica", "flags"),
    [
        ("tp2", (1, 0, 0, 0, 1), 2, (False, True, False, False)),
        ("pp2", (0, 1, 0, 0, 0), 2, (False, True, False, True)),
        ("cp2", (0, 0, 1, 0, 1), 2, (False, True, False, True)),
        ("dp2", (0, 0, 0, 1, 1), 1, (False, True, True, True)),
        ("ep2", (0, 0, 0, 1, 0), 1, (False, True, True, True)),
    ],
)
def test_coordinates_of_the_second_rank(
    pool2: Pool, text: str, second: tuple[int, ...], replica: int, flags: tuple[bool, ...]
) -> None:
    first, other = pool2.run(coordinates, text)
    assert first["ranks"] == (0, 0, 0, 0, 0)
    assert other["ranks"] == second
    assert other["flags"] == flags
    layout = asdict(Layout.parse(text))
    for name, key in (("tp", "tensor"), ("cp", "context"), ("pp", "pipeline"), ("data", "data")):
        assert first["sizes"][name] == layout[key]
    assert first["sizes"]["replica"] == replica
    assert first["sizes"]["world"] == 2


def test_several_layouts_in_the_same_processes(pool2: Pool) -> None:
    for text in ("tp2", "pp2", "tp2"):
        assert pool2.run(coordinates, text)[1]["sizes"]["world"] == 2


def refusal(text: str) -> str:
    try:
        build_mesh(Layout.parse(text), timeout=60.0)
    except LayoutError as error:
        return str(error)
    return ""


def test_a_layout_of_another_size_is_refused_before_any_group_exists(pool2: Pool) -> None:
    for message in pool2.run(refusal, "tp4"):
        assert "needs 4 processes, 2 are running; launch with --nproc-per-node 4" in message
    assert pool2.run(coordinates, "tp2")[1]["sizes"]["world"] == 2
