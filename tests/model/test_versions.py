"""Each difference of the Megatron-Core versions is needed by the one that it names; others are refused."""

from __future__ import annotations

import re
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest
import transformers
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec

from mcore_rl.errors import ConfigError
from mcore_rl.model import platform, versions
from mcore_rl.model.build import build_policy
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.parallel.pool import Pool
from tests.model.conftest import save
from tests.model.families import FAMILIES
from tests.model.removal import Outcome, nothing, outcome
from tests.model.support import at_layout
from tests.model.test_policy import gradient_norm
from tests.sources import ROOT

INSTALLED = metadata.version("megatron-core")
BOTH = r"install 0\.16\.1 \(Python 3\.11\) or 0\.19\.2 \(Python 3\.12 and newer\)"


def test_another_version_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(platform, "_installed", False)
    monkeypatch.setattr(metadata, "version", lambda name: "0.18.0")
    with pytest.raises(ConfigError, match=rf"megatron-core 0\.18\.0 is not supported.*{BOTH}"):
        platform.install()


def test_a_missing_megatron_is_named(monkeypatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(platform, "_installed", False)
    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ConfigError, match=f"megatron-core is not installed; {BOTH}"):
        platform.install()


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_the_pinned_versions_are_the_supported_ones(file: str) -> None:
    """A pin that no index offers looks like a missing network to .ci/run, which is no failure."""
    pin = r"megatron-core==([\d.]+) ?; python_version (< |>= )\"3\.12\""
    pinned = re.findall(pin, (ROOT / file).read_text())
    assert dict(pinned) == dict(zip(versions.SUPPORTED, ("< ", ">= "), strict=True))


# --- every difference is needed, by the version that it names ---------------------------------------------

PLAIN = {
    "mark_shard": lambda parameter, dim: None,
    "name_te_gemm": lambda: None,
    "tell_te_absent": lambda: None,
    "mlp_module": lambda linears: ModuleSpec(module=MLP, submodules=linears),
    "drop_announcements": lambda: None,
}
"""difference -> what would stand there for the other version alone"""

SYMPTOMS = {
    "name_te_gemm": "name 'te_general_gemm' is not defined",
    "mlp_module": "Rewrapping ModuleSpec",
    "drop_announcements": "GPTModel IS DEPRECATED",
}
"""difference -> what the ranks of ep2, whose second layer is dense, say without it; mark_shard's is silent"""


def remove(name: str) -> None:
    setattr(versions, name, PLAIN[name])


def needed_here(name: str) -> bool:
    (difference,) = (one for one in versions.DIFFERENCES if one.met_by.__name__ == name)
    return difference.version == INSTALLED


def test_every_difference_is_listed_once() -> None:
    assert [one.met_by.__name__ for one in versions.DIFFERENCES] == list(PLAIN)
    assert {one.version for one in versions.DIFFERENCES} == set(versions.SUPPORTED)
    assert PLAIN.keys() == SYMPTOMS.keys() | {"mark_shard", "tell_te_absent"}


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Outcome:
    return outcome(nothing, "ep2", tmp_path_factory.mktemp("complete"))


@pytest.mark.parametrize("name", SYMPTOMS)
@pytest.mark.slow
def test_without_a_difference_its_version_says_so(name: str, complete: Outcome, tmp_path: Path) -> None:
    assert complete.finished
    assert SYMPTOMS[name] not in complete.words
    words = outcome(partial(remove, name), "ep2", tmp_path).words
    assert (SYMPTOMS[name] in words) == needed_here(name)


def norm_without(mesh: Mesh, directory: Path, name: str) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, name, PLAIN[name])
        return gradient_norm(mesh, directory)


def test_without_marks_the_gradient_norm_is_too_small(pool1: Pool, pool2: Pool, dense_dir: Path) -> None:
    (alone,) = at_layout(pool1, "tp1", gradient_norm, dense_dir)
    without = at_layout(pool2, "tp2", norm_without, dense_dir, "mark_shard")
    assert (without[0] < 0.99 * alone) == needed_here("mark_shard")


def test_without_being_told_that_the_engine_is_absent_latent_attention_is_not_built(
    pool1: Pool, tmp_path: Path
) -> None:
    kind, settings = FAMILIES["deepseek_v3"]
    config = getattr(transformers, kind)(**settings)
    directory = save(transformers.AutoModelForCausalLM.from_config, config, tmp_path / "hf")
    (words,) = at_layout(pool1, "tp1", words_of_a_latent_build, directory)
    assert ("isinstance() arg 2 must be a type" in words) == needed_here("tell_te_absent")


def words_of_a_latent_build(mesh: Mesh, directory: Path) -> str:
    """What building says where Megatron takes Transformer Engine for present, as 0.16.1 does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "tell_te_absent", PLAIN["tell_te_absent"])
        if INSTALLED == "0.16.1":
            patch.setattr(multi_latent_attention, "HAVE_TE", True)
        try:
            build_policy(directory, mesh)
        except TypeError as error:
            return str(error)
    return ""
