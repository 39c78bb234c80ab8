"""Whole runs that train adapters: their publishes, their checkpoints, and a publish that drops them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_rl.convert.command import adapter, mcore_to_hf, merge
from mcore_rl.errors import ConfigError
from mcore_rl.log import read_metrics
from mcore_rl.rollout.processes import Embedded, LocalServer
from mcore_rl.talk.weights import model_of
from tests.checkpoint.support import stored
from tests.e2e.conftest import Task, without_threads
from tests.e2e.ranks import Ranks

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]
LORA = (
    "--lora.rank",
    "8",
    "--lora.alpha",
    "16",
    "--optimizer.lr",
    "2e-3",
    "--optimizer.schedule",
    "constant",
)


@pytest.fixture(scope="module")
def url(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the warm start, which takes the weights of whatever run publishes to it."""
    log = tmp_path_factory.mktemp("server") / "log"
    with LocalServer(task.root / "warm_start/model", Embedded(threads=1), log_file=log) as server:
        yield server.url


def grpo(task: Task, url: str, directory: Path, *flags: str) -> list[str]:
    rl = without_threads(task.rl)
    steps = ["--train.steps", "3", "--rollout.prompts_per_step", "32", "--rollout.urls", f'["{url}"]']
    return ["train", "examples/grpo_tiny.toml", *rl, *LORA, *steps, "--run.dir", str(directory), *flags]


def test_a_run_publishes_merged_weights_and_continues_from_its_adapters(
    ranks: Ranks, task: Task, url: str, tmp_path: Path
) -> None:
    flags = ["--checkpoint.every", "1", "--checkpoint.keep", "3", "--algorithm.params.kl_in_loss", "0.01"]
    flags += ["--algorithm.mini_batches", "1"]
    done = ranks.run(*grpo(task, url, tmp_path / "whole", *flags), world=2)
    assert done.returncode == 0, done.stderr
    assert "grpo on adapters of rank " in done.stderr
    first, *steps = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert "publish/adapter_share" not in first, "B is 0: nothing tells the policy from the frozen model"
    assert all(step["publish/adapter_share"] == pytest.approx(1.0, abs=1e-3) for step in steps)
    assert all(step["kl/reference"] > 0 for step in steps[1:])
    assert steps[0]["kl/reference"] == 0, "the reference is the policy without its adapters, which began so"
    resumed = ["--resume", str(tmp_path / "whole/checkpoints/step_2")]
    done = ranks.run(*grpo(task, url, tmp_path / "again", *flags, *resumed), world=2)
    assert done.returncode == 0, done.stderr
    one, other = (stored(tmp_path / name / "checkpoints/step_3") for name in ("whole", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    written = load_file(next((tmp_path / "whole/weights/3").glob("*.safetensors")))
    base = load_file(next((task.root / "warm_start/model").glob("*.safetensors")))
    moved = {name for name, tensor in base.items() if not torch.equal(written[name], tensor)}
    assert moved == {name for name in base if "_proj" in name}, "norms, embeddings and the head are frozen"
    saved, model = tmp_path / "whole/checkpoints/step_3", task.root / "warm_start/model"
    adapter(saved, tmp_path / "adapter", model=model)
    for source in (saved, tmp_path / "adapter"):
        merge(source, tmp_path / f"merged_{source.name}", model=model)
        found = load_file(next((tmp_path / f"merged_{source.name}").glob("*.safetensors")))
        assert found.keys() == written.keys()
        for name, tensor in written.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
    for weights in (None, "latest"):  # what `mcore-rl chat` and `serve` load: published, and a checkpoint
        with model_of(tmp_path / "whole", weights) as served:
            found = load_file(next(served.glob("*.safetensors")))
        assert found.keys() == written.keys()
        for name, tensor in written.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
    with pytest.raises(ConfigError, match="holds adapters alone"):
        mcore_to_hf(saved, tmp_path / "alone", config=model)
    shutil.copytree(model, tmp_path / "model")
    (file,) = (tmp_path / "model").glob("*.safetensors")
    save_file(base | {"model.norm.weight": base["model.norm.weight"] + 1}, file)
    with pytest.raises(ConfigError, match="are not those of the model that the adapters of"):
        merge(saved, tmp_path / "other", model=tmp_path / "model")


def test_servers_that_generate_beside_training_have_the_adapters(
    ranks: Ranks, task: Task, url: str, tmp_path: Path
) -> None:
    flags = ["--rollout.max_staleness", "1", "--algorithm.params.correction", "tis-token"]
    done = ranks.run(*grpo(task, url, tmp_path, *flags, "--parallel.tensor", "1"))
    assert done.returncode == 0, done.stderr
    steps = read_metrics(tmp_path / "metrics.jsonl")[1:]
    assert len(steps) == 3
    assert all(step["publish/adapter_share"] == pytest.approx(1.0, abs=1e-3) for step in steps)
    assert all(step["staleness/mean"] > 0 for step in steps[1:])


@pytest.mark.parametrize(
    ("precision", "said"),
    [("fp32", "it does not hold the published weights"), ("bf16", "The adapters did not arrive")],
)
def test_a_publish_that_drops_the_adapters_ends_the_run_at_step_1(
    ranks: Ranks, task: Task, url: str, tmp_path: Path, precision: str, said: str
) -> None:
    planted = ["--algorithm.loss", "tests.losses.dropped_adapters:loss", "--model.precision", precision]
    done = ranks.run(*grpo(task, url, tmp_path, *planted), world=2)
    assert done.returncode != 0
    assert said in done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0]
