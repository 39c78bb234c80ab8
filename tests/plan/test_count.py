"""The plan's counts against Megatron's own modules on every rank, and against what the publishers say."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import config

from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.parallel.layout import Layout
from mcore_rl.plan.count import StageCount, count_critic, count_policy, distinct, layers_of
from tests.plan.ranks import main
from tests.sources import ROOT

MODELS = ROOT / "examples" / "models"
PUBLISHED = {  # parameters of the published checkpoints
    "Llama-3.3-70B-Instruct": 70_553_706_496,
    "Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-30B-A3B": 30_532_122_624,
}
DENSE = ("tp8pp4cp2", "tp4pp2vpp2", "tp2pp4dp2", "tp8pp8", "pp4vpp5")
LAYOUTS = {
    "Llama-3.3-70B-Instruct": DENSE,
    "Qwen2.5-72B-Instruct": DENSE,
    "Qwen3-8B": ("tp8", "tp4pp2vpp2", "tp2pp4dp2:all", "tp2pp3cp2", "pp6vpp3"),
    "Qwen3-30B-A3B": ("ep8", "tp4ep8dp2", "pp4ep4", "tp2pp2ep2:all", "tp4pp2vpp2ep4cp2"),
}
QUICK = ("Qwen3-8B=tp2pp3cp2", "Qwen3-30B-A3B=tp2pp2ep2:all")
"""for the inner loop"""
CASES = [f"{model}={layout}" for model, layouts in LAYOUTS.items() for layout in layouts]


def build(cases: list[str], directory: Path) -> dict[str, list[dict[str, Any]]]:
    """In a process forked from one that has imported the library, tests/preloaded.py."""
    out = directory / "ranks.json"
    context = multiprocessing.get_context("forkserver")
    named = [f"{MODELS}/{case}" for case in cases]
    process = context.Process(target=build_all, args=(out, named), daemon=True)
    process.start()
    process.join(timeout=900)
    process.kill()
    process.join()
    assert process.exitcode == 0, "its traceback is on stderr"
    return dict(zip(cases, json.loads(out.read_text()), strict=True))


def build_all(out: Path, cases: list[str]) -> None:
    config.update("jaxtyping_disable", True)  # a mesh that only builds models has no groups
    main(out, cases)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return build(list(QUICK), tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def built(quick, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return quick | build([case for case in CASES if case not in QUICK], tmp_path_factory.mktemp("ranks"))


def counted(case: str) -> tuple[Layout, list[StageCount], list[StageCount]]:
    model, _, text = case.partition("=")
    arch, layout = read_architecture(MODELS / model), Layout.parse(text.removesuffix(":all"))
    return layout, count_policy(arch, layout), count_critic(arch, layout)


def check(case: str, ranks: list[dict[str, Any]]) -> None:
    *ranks, whole = ranks
    layout, policy, critic = counted(case)
    published = PUBLISHED[case.partition("=")[0]]
    assert distinct(policy, layout) == whole["whole"] == published
    for model in ("policy", "critic"):
        assert {rank["stage"] for rank in ranks if model in rank} == set(range(layout.pipeline))
    if case.endswith(":all"):
        assert len(ranks) == layout.world_size
    for rank in ranks:
        for model, stages in (("policy", policy), ("critic", critic)):
            if model not in rank:
                continue
            stage = stages[rank["stage"]]
            assert rank[model] == {"dense": stage.dense, "experts": stage.experts}, (
                case,
                rank["stage"],
                model,
            )


@pytest.mark.xdist_group("ranks of the plan")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", QUICK)
@pytest.mark.slow
def test_counts_are_those_of_the_built_ranks(case: str, quick) -> None:
    check(case, quick[case])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("ranks of the plan")
@pytest.mark.parametrize("case", CASES)
def test_counts_of_published_models_at_five_layouts_each(case: str, built) -> None:
    check(case, built[case])


@pytest.mark.slow
@pytest.mark.xdist_group("ranks of the plan")
@pytest.mark.timeout(300)
def test_the_check_sees_a_wrong_count(quick) -> None:
    """Negative control: ranks that miss one parameter, and a whole model of another size."""
    case = QUICK[0]
    *ranks, whole = quick[case]
    with pytest.raises(AssertionError):
        check(case, [*ranks, {"whole": whole["whole"] - 1}])
    fewer = ranks[-1]["policy"] | {"dense": ranks[-1]["policy"]["dense"] - 1}
    with pytest.raises(AssertionError):
        check(case, [*ranks[:-1], ranks[-1] | {"policy": fewer}, whole])


def test_a_tied_embedding_is_counted_once_and_lies_on_two_stages() -> None:
    arch = replace(read_architecture(MODELS / "Qwen3-8B"), tied=True)
    rows = arch.vocab * arch.hidden
    for text in ("tp1", "tp4pp2"):
        layout = Layout.parse(text)
        stages = count_policy(arch, layout)
        assert distinct(stages, layout) == PUBLISHED["Qwen3-8B"] - rows
        assert stages[-1].copied == (rows if layout.pipeline > 1 else 0)
        assert stages[-1].vocabulary == rows // layout.tensor


def test_padding_is_apart() -> None:
    arch = replace(read_architecture(MODELS / "Qwen3-8B"), vocab=151_937)
    layout = Layout(tensor=8)
    (stage,) = count_policy(arch, layout)
    assert stage.padding == 2 * 7 * arch.hidden
    assert distinct([stage], layout) == PUBLISHED["Qwen3-8B"] + 2 * arch.hidden


def test_interleaved_stages_own_stretches() -> None:
    assert layers_of(1, 8, Layout(pipeline=2, virtual_pipeline=2)) == [2, 3, 6, 7]
    assert layers_of(1, 8, Layout(pipeline=2)) == [4, 5, 6, 7]
