"""The platform module: every fix is needed, none reaches beyond Megatron-Core."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mcore_rl.errors import ConfigError
from mcore_rl.model import platform
from mcore_rl.parallel.launch import Pool

# --- versions and CUDA ------------------------------------------------------------------------------------


def test_an_unknown_version_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.99.0")
    with pytest.raises(ConfigError, match=r"megatron-core 0\.99\.0 is not supported.*install 0\.16\.1"):
        platform.install()


def test_a_missing_megatron_is_named(monkeypatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"megatron-core is not installed; install 0\.16\.1"):
        platform.install()


@pytest.mark.parametrize(("cuda", "calls"), [(True, 0), (False, 1)])
def test_where_cuda_is_present_nothing_is_changed(monkeypatch, cuda: bool, calls: int) -> None:
    called: list[str] = []
    monkeypatch.setattr(platform, "_installed", False)
    monkeypatch.setattr(platform, "FIXES", (lambda: called.append("fix"),))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    platform.install()
    platform.install()
    assert len(called) == calls


# --- beyond Megatron-Core ---------------------------------------------------------------------------------

FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")


def logits_and_factories(directory: Path) -> tuple[torch.Tensor, list[bool]]:
    """What transformers computes in a process with the platform; which of torch's factories are its own."""
    from transformers import Qwen3ForCausalLM

    before = [getattr(torch, name) for name in FACTORIES]
    platform.install()
    unchanged = [getattr(torch, name) is one for name, one in zip(FACTORIES, before, strict=True)]
    with torch.no_grad():
        return Qwen3ForCausalLM.from_pretrained(directory)(torch.arange(20)[None]).logits, unchanged


def test_transformers_is_left_alone(pool1: Pool, dense_dir: Path) -> None:
    from transformers import Qwen3ForCausalLM

    with torch.no_grad():
        expected = Qwen3ForCausalLM.from_pretrained(dense_dir)(torch.arange(20)[None]).logits
    ((logits, unchanged),) = pool1.run(logits_and_factories, dense_dir)
    assert torch.equal(logits, expected)
    assert all(unchanged)


def test_literals_are_redirected_inside_megatron_only(pool1: Pool) -> None:
    inside, outside = pool1.run(device_of_a_literal)[0]
    assert inside == "cpu"
    assert "Torch not compiled with CUDA" in outside or "CUDA" in outside


def device_of_a_literal() -> tuple[str, str]:
    platform.install()
    from megatron.core.pipeline_parallel import schedules

    inside = schedules.torch.zeros(1, device="cuda", pin_memory=True)
    try:
        outside = str(torch.zeros(1, device="cuda").device)
    except (AssertionError, RuntimeError) as error:
        outside = str(error)
    return str(inside.device), outside


# --- every fix is needed ----------------------------------------------------------------------------------

NEEDS = {
    "redirect_literal_devices": "pp2",
    "answer_current_device": "pp2",
    "keep_tensors_on_cpu": "pp2:tied",
    "skip_synchronize": "pp2",
    "use_cpu_generator": "pp2",
    "name_cuda_types": "pp2",
    "null_streams": "ep2",
    "answer_without_transformer_engine": "ep2",
    "list_splits_on_host": "ep2",
}
"""fix -> a case of `verify layouts` that cannot run without it"""


def step_without(removed: str, case: str, rank: int, rendezvous: Path) -> None:
    """One measurement on two ranks with one fix removed; the exit code tells."""
    from mcore_rl.verify_layouts.case import Case
    from mcore_rl.verify_layouts.measure import measure

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with (rendezvous.parent / f"{removed}.{rank}").open("w") as words:
        os.dup2(words.fileno(), 2)
    torch.set_num_threads(1)
    platform.FIXES = tuple(fix for fix in platform.FIXES if fix.__name__ != removed)
    dist.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=2)
    measure(Case.parse(case), ("gspo",), None)
    dist.barrier()
    dist.destroy_process_group()


def outcome(target: Callable[..., Any], removed: str, case: str, directory: Path) -> str:
    """Last words of the ranks of `target`, forked from a process that has already imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mcore_rl.verify_layouts.measure"])
    ranks = [
        context.Process(target=target, args=(removed, case, rank, directory / "rendezvous"), daemon=True)
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + 60
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
        ranks[0].join(timeout=0.1)
        if any(rank.exitcode for rank in ranks):  # the other one waits for it
            break
    for rank in ranks:
        rank.kill()
        rank.join()
    if all(rank.exitcode == 0 for rank in ranks):
        return ""
    return "\n".join((directory / f"{removed}.{rank}").read_text() for rank in range(2))


def test_every_fix_is_listed() -> None:
    assert set(NEEDS) == {fix.__name__ for fix in platform.FIXES}


@pytest.mark.parametrize("case", sorted(set(NEEDS.values())))
def test_nothing_fails_with_all_fixes(case: str, tmp_path: Path) -> None:
    assert outcome(step_without, "none", case, tmp_path) == ""


@pytest.mark.parametrize("fix", NEEDS)
def test_without_a_fix_something_fails(fix: str, tmp_path: Path) -> None:
    assert "Error" in outcome(step_without, fix, NEEDS[fix], tmp_path)
