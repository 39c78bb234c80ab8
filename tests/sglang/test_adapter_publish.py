"""Runs that publish adapters by themselves to a real server: synchronous, beside generation, killed, planted.

What servers do with adapters, and what a publish must not trust, is in test_adapters.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mcore_rl.errors import ConfigError
from mcore_rl.log import read_metrics
from mcore_rl.lora import Lora
from mcore_rl.model.hf.adapters import AdapterMap
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.peft_files import write_adapter
from mcore_rl.rollout.adapters import AdapterNeeds, check_adapters
from mcore_rl.rollout.client import RolloutClient, call
from mcore_rl.rollout.fleet import Fleet, check_server
from mcore_rl.talk.weights import model_of
from mcore_rl.weights.adapters import _UNLOAD_SECONDS, Adapters
from tests.e2e.conftest import ENVIRONMENT, ROOT, Task, command, task  # noqa: F401 a fixture
from tests.e2e.ranks import Ranks
from tests.rollout.proxy import cut, proxy_beside, status
from tests.rollout.support import http, largest_error, log_probs_of
from tests.sglang.conftest import KEY_ENV, sglang_server
from tests.sglang.test_adapters import MATRICES, OUTPUT, PROMPT, RANK, SERVED, served

SLOTS = 4
NEEDS = AdapterNeeds(RANK, MATRICES, versions=SLOTS - 1)
CLOSE = 2e-5


@pytest.fixture(scope="module")
def url(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:  # noqa: F811
    """A server of the task's model that is started as a run would start its own."""
    log_file = tmp_path_factory.mktemp("adapter_server") / "log"
    options = (*NEEDS.options(), *SERVED[1:3])
    with sglang_server(task.root / "warm_start/model", log_file, *options) as server:
        yield server.url


def adapters_of(url: str, directory: Path) -> set[str]:
    """What the server holds, by the reply to loading one more, which goes again."""
    body = {"lora_name": "looked", "lora_path": str(directory)}
    held = http(url, "/load_lora_adapter", body).body["loaded_adapters"]
    assert http(url, "/unload_lora_adapter", {"lora_name": "looked"}).body["success"]
    return set(held) - {"looked"}


def flags(task: Task, url: str, directory: Path, *more: str) -> list[str]:  # noqa: F811
    lora = ["--lora.rank", str(RANK), "--lora.alpha", "16", "--publish.transport", "adapter"]
    learns = ["--optimizer.lr", "2e-3", "--optimizer.schedule", "constant", "--algorithm.mini_batches", "1"]
    learns += ["--rollout.prompts_per_step", "32"]  # of fewer, all rewards of a step may be equal
    servers = ["--rollout.urls", f'["{url}"]', "--run.dir", str(directory)]
    given = [one for pair in pairs(task.rl) if "threads" not in pair[0] for one in pair]
    return ["train", "examples/gspo_tiny.toml", *given, *lora, *learns, *servers, *more]


def pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    return zip(words[::2], words[1::2], strict=True)


def test_servers_sample_from_the_adapter_of_every_step_and_forget_it_with_the_run(
    ranks: Ranks,
    task: Task,  # noqa: F811
    url: str,
    tmp_path: Path,
) -> None:
    """With rsLoRA, which SGLang passes over: the published file says the same scale without it."""
    run = tmp_path / "run"
    done = ranks.run(*flags(task, url, run, "--train.steps", "3", "--lora.rslora", "true"), world=2)
    assert done.returncode == 0, done.stderr
    _, *steps = read_metrics(run / "metrics.jsonl")
    assert [step["weight_version"] for step in steps] == ["1", "2", "3"]
    assert all(step["publish/adapter_share"] == pytest.approx(1.0, abs=1e-3) for step in steps)
    assert max(step["publish/probe_max_abs"] for step in steps) <= CLOSE
    assert max(step["mismatch/max_abs"] for step in steps) <= CLOSE
    assert min(step["publish/stale_max_abs"] for step in steps) > 1e-3, "the control: a step shows"
    assert sorted(path.name for path in (run / "weights").iterdir() if path.is_dir()) == ["2", "3"]
    last = run / "weights/3"
    assert adapters_of(url, last) == set()

    assert http(url, "/load_lora_adapter", {"lora_name": "last", "lora_path": str(last)}).body["success"]
    try:
        with model_of(run) as merged:  # what `mcore-rl chat` and `eval` load
            model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        wanted = log_probs_of(model, PROMPT, [token % 16 for token in OUTPUT]).detach()
        got = served(url, "last", [token % 16 for token in OUTPUT])
        assert largest_error(got, wanted) <= CLOSE
        assert largest_error(served(url, None, [token % 16 for token in OUTPUT]), wanted) > 1e-2
    finally:
        http(url, "/unload_lora_adapter", {"lora_name": "last"})


def test_beside_generation_a_killed_run_goes_on_and_its_adapters_do_not_stay(
    task: Task,  # noqa: F811
    url: str,
    tmp_path: Path,
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    more = ["--rollout.max_staleness", "1", "--rollout.over_sampling", "2", "--checkpoint.every", "1"]
    more += ["--algorithm.params.correction", "tis-token", "--parallel.tensor", "1"]
    begun = start(flags(task, url, run, "--train.steps", "50", *more), log)
    wait_for(begun, log, b"step 3/")
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait(timeout=60)
    known = run / "weights/2"
    assert len(adapters_of(url, known)) >= 2, "the control: nobody took them back"
    steps = read_metrics(run / "metrics.jsonl")
    again = start(flags(task, url, run, "--train.steps", str(steps[-1]["step"] + 3), *more, "--resume"), log)
    assert again.wait(timeout=300) == 0, log.read_text()
    _, *steps = read_metrics(run / "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    shares = [step["publish/adapter_share"] for step in steps if "publish/adapter_share" in step]
    assert len(shares) > len(steps) // 2, "B is 0 until a group's rewards differ"
    assert shares == pytest.approx([1.0] * len(shares), abs=1e-3)
    assert {step["staleness/max"] for step in steps} == {0.0, 1.0}
    assert max(step["publish/probe_max_abs"] for step in steps) <= CLOSE
    assert adapters_of(url, next((run / "weights").glob("[0-9]*"))) == set()


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The command with a process group of its own; its output is appended to `log`."""
    with log.open("ab") as out:
        return subprocess.Popen(
            command(*arguments),
            cwd=ROOT,
            env=os.environ | ENVIRONMENT,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


def wait_for(process: subprocess.Popen[bytes], log: Path, said: bytes) -> None:
    end = time.monotonic() + 300
    while said not in log.read_bytes():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.2)


def test_a_publish_that_drops_the_adapter_ends_the_run_at_step_1(
    ranks: Ranks,
    task: Task,  # noqa: F811
    url: str,
    tmp_path: Path,
) -> None:
    planted = ["--algorithm.loss", "tests.losses.dropped_adapters:loss", "--parallel.tensor", "1"]
    done = ranks.run(*flags(task, url, tmp_path, "--train.steps", "3", *planted))
    assert done.returncode != 0
    assert "it does not hold the published weights" in done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0]


def test_a_lost_answer_costs_no_version_and_a_long_one_no_publish(
    task: Task,  # noqa: F811
    url: str,
    tmp_path: Path,
) -> None:
    """The server is asked again; what a request still asks for stays until it has ended."""
    mapping = AdapterMap(read_architecture(task.root / "warm_start/model"), Lora(RANK, 16.0))
    zeros = {name: torch.zeros(shape) for name, shape in mapping.hf_shapes().items()}
    with proxy_beside(url, status(502), cut(0.5), path="/load_lora_adapter") as before, ThreadPool(1) as pool:
        fleet = Fleet([before.url], vocabulary=16, timeout=60.0)
        fleet.adapters = "faulty"
        transport = Adapters(tmp_path, base="a model", kept=1)

        def publish(version: str) -> float:
            (tmp_path / version).mkdir()
            write_adapter(mapping, zeros, tmp_path / version, base="a model")
            begun = time.monotonic()
            assert transport._hand_over(fleet, tmp_path / version, version) == {}
            return time.monotonic() - begun

        for version in ("0", "1", "2"):
            publish(version)
        assert len(before.bodies("/load_lora_adapter")) == 5, "the control: two answers were lost"
        asked = {"input_ids": PROMPT, "lora_path": "faulty_2"}
        asked |= {"sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}
        answer = pool.apply_async(http, (url, "/generate", asked))
        time.sleep(0.2)
        http(url, "/pause_generation", {"mode": "in_place"})
        try:
            assert _UNLOAD_SECONDS <= publish("3") < 2 * _UNLOAD_SECONDS
            assert not answer.ready(), "the control: it held the unload"
        finally:
            http(url, "/continue_generation", {})
        assert answer.get(60).status == 200
        publish("4")
        assert adapters_of(url, tmp_path / "4") == {"faulty_4"}
        transport.close(fleet)
    assert adapters_of(url, tmp_path / "4") == set()


def test_servers_that_cannot_hold_them_are_refused_before_a_step(url: str, dense_url: str) -> None:
    info = call(RolloutClient(url), lambda client: client.server_info())
    check_adapters(url, info, NEEDS)
    for needs, said in (
        (replace(NEEDS, rank=16), "--max-lora-rank 8 is below lora.rank = 16"),
        (replace(NEEDS, versions=9), f"--max-loras-per-batch {SLOTS}, and 10 are needed"),
        (replace(NEEDS, matrices=("q_proj", "lm_head")), "no place for adapters of lm_head"),
    ):
        with pytest.raises(ConfigError, match=said):
            check_adapters(url, info, needs)
    with pytest.raises(ConfigError, match="serves no adapters; start it with --enable-lora"):
        call(RolloutClient(dense_url, api_key_env=KEY_ENV), lambda one: check_server(one, adapters=NEEDS))
