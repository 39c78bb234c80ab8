"""Whole runs whose servers say what the model cannot have said, or what other weights say."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from mcore_rl.checkpoint import committed, find
from mcore_rl.log import read_metrics
from tests.e2e.conftest import run
from tests.e2e.ranks import Ranks
from tests.environments.served import embedded
from tests.rollout.proxy import Fault, proxy_beside

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]
PROMPTS, EACH = 8, 4
ASYNC = ("--rollout.max_staleness", "1", "--algorithm.params.correction", "tis-token")
TRAINED = r"@\d+/"
"""ids of samples that are to be trained; those of an evaluation and of a publish's check are others"""
Replies = list[dict[str, Any]]
Command = Callable[..., subprocess.CompletedProcess[str]]


def altered(change: Callable[[Replies], None], ids: str) -> Fault:
    """The server's own replies, those with such ids changed."""

    def answer(request: web.Request, raw: bytes) -> web.Response:
        replies = json.loads(raw)
        mine = [r for r in replies if isinstance(r, dict) and re.search(ids, r["meta_info"]["id"])]
        if mine:
            change(mine)
        return web.json_response(replies)

    return answer


@contextmanager
def wrong(server: str, change: Callable[[Replies], None], ids: str = TRAINED) -> Iterator[str]:
    with proxy_beside(server, *[altered(change, ids)] * 10_000) as between:
        yield between.url


def gspo(folder: Path, directory: Path, url: str, *flags: str) -> list[str]:
    return [
        *(
            "train",
            "examples/gspo_tiny.toml",
            "--run.dir",
            str(directory),
            "--model.path",
            f"{folder}/policy",
        ),
        *("--data.train", f"{folder}/train.jsonl", "--data.eval", f"{folder}/eval.jsonl"),
        *("--train.eval_every", "0", "--reward.function", "tests.e2e.rewards:brevity"),
        *("--train.steps", "3", "--rollout.urls", f'["{url}"]'),
        *("--rollout.prompts_per_step", str(PROMPTS), "--rollout.samples_per_prompt", str(EACH)),
        *("--rollout.max_new_tokens", "8", "--optimizer.warmup_steps", "0", *flags),
    ]


def impossible(replies: Replies) -> None:
    """The first token of the last sample is none of the model's."""
    replies[-1]["output_ids"][0] = replies[-1]["meta_info"]["output_token_logprobs"][0][1] = 9999


def threes(replies: Replies) -> None:
    """All tokens are 3; their log-probs stay."""
    for reply in replies:
        reply["output_ids"] = [3] * len(reply["output_ids"])
        for entry in reply["meta_info"]["output_token_logprobs"]:
            entry[1] = 3


def swapped() -> Fault:
    """The samples of a step's first two prompts change places, but for their ids; a call has one each."""
    first: dict[str, tuple[Replies, asyncio.Event]] = {}

    async def answer(request: web.Request, raw: bytes) -> web.Response:
        replies = json.loads(raw)
        step = re.search(r"@(\d+)/", replies[0]["meta_info"]["id"])
        if step and step[1] not in first:
            first[step[1]] = replies, asyncio.Event()
            await asyncio.wait_for(first[step[1]][1].wait(), 60)
        elif step and not first[step[1]][1].is_set():
            exchange(first[step[1]][0], replies)
            first[step[1]][1].set()
        return web.json_response(replies)

    return answer


def exchange(some: Replies, others: Replies) -> None:
    for one, other in zip(some, others, strict=True):
        mine, theirs = one["meta_info"]["id"], other["meta_info"]["id"]
        kept = dict(one)
        one.update(other, meta_info={**other["meta_info"], "id": mine})
        other.update(kept, meta_info={**kept["meta_info"], "id": theirs})


def in_parallel(ranks: Ranks, degree: int) -> Command:
    """A run of so many tensor-parallel ranks."""
    return lambda *arguments: ranks.run(*arguments, "--parallel.tensor", str(degree), world=degree)


@pytest.mark.parametrize(
    ("degree", "flags", "ids"),
    [(1, (), TRAINED), (2, ASYNC, TRAINED), (2, (), "@eval")],
    ids=["tp1", "tp2-async", "evaluation"],
)
def test_a_token_that_the_model_cannot_have_sampled_is_never_trained(
    ranks: Ranks, folder: Path, server_url: str, tmp_path: Path, degree: int, flags: tuple[str, ...], ids: str
) -> None:
    """The first by the whole command."""
    start = in_parallel(ranks, degree) if degree > 1 else run
    with wrong(server_url, impossible, ids) as url:
        done = start(*gspo(folder, tmp_path / "run", url, "--parallel.tensor", "1", *flags))
    assert done.returncode == 75, done.stderr
    assert f"{url}/generate: no usable reply after" in done.stderr
    assert "output_ids: 9999 (token 0) is no id of the model's" in done.stderr
    assert "Traceback" not in done.stderr
    assert "step 1/" not in done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] in ([], [0])


def test_what_was_saved_stays_whole_when_no_server_is_left(
    ranks: Ranks, folder: Path, server_url: str, tmp_path: Path
) -> None:
    """Every server fails in the middle of step 2, of which nothing is trained."""
    saved: dict[str, bytes] = {}

    async def gone(request: web.Request, raw: bytes) -> web.Response:
        if b"@2/" not in raw:
            return web.Response(body=raw, content_type="application/json")
        if not saved:
            async with asyncio.timeout(60):
                while not committed(tmp_path / "checkpoints"):  # it is written beside the step
                    await asyncio.sleep(0.05)
            saved.update(files_of(tmp_path / "checkpoints"))
        return web.Response(status=502)

    with proxy_beside(server_url, *[gone] * 10_000) as between:
        places = ["--checkpoint.dir", str(tmp_path / "checkpoints"), "--checkpoint.every", "1"]
        done = in_parallel(ranks, 2)(*gspo(folder, tmp_path / "run", between.url, *places))
    assert done.returncode == 75, done.stderr
    assert "no rollout server is left" in done.stderr
    assert "HTTP 502" in done.stderr
    assert saved, "the fault did not fire"
    assert files_of(tmp_path / "checkpoints") == saved
    assert find(tmp_path / "checkpoints", "latest").step == 1
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1]


def files_of(directory: Path) -> dict[str, bytes]:
    """Name -> content of all files of checkpoints."""
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.glob("step_*/**/*") if p.is_file()
    }


def test_samples_of_other_prompts_are_dropped_and_said(
    ranks: Ranks, folder: Path, server_url: str, tmp_path: Path
) -> None:
    with proxy_beside(server_url, *[swapped()] * 10_000) as between:
        start = gspo(folder, tmp_path, between.url, "--publish.mismatch_action", "drop")
        done = in_parallel(ranks, 2)(*start)
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "metrics.jsonl")[1:]
    assert [line["mismatch/dropped"] for line in lines] == [2.0 * EACH] * 3
    assert [(line["samples"], line["aborted"]) for line in lines] == [((PROMPTS - 2) * EACH, 0)] * 3
    assert all(line["mismatch/p999"] <= 2e-5 for line in lines), "what is left is the trainer's"
    said = [line for line in done.stderr.splitlines() if "warning: step" in line]
    assert [line.split(":")[2] for line in said] == [" step 1", " step 2"], "the next is the fourth"
    assert "8 of 32 samples dropped" in said[0]


def test_other_tokens_end_the_run_before_they_are_trained(
    ranks: Ranks, folder: Path, server_url: str, tmp_path: Path
) -> None:
    """Also beside training, where only tokens of equal weights are compared."""
    with wrong(server_url, threes) as url:
        stop = gspo(folder, tmp_path, url, *ASYNC, "--publish.mismatch_action", "stop")
        done = in_parallel(ranks, 1)(*stop)
    assert done.returncode == 75, done.stderr
    assert done.stderr.count("MismatchError: step 1: the servers' log-probs differ") == 1
    assert "Traceback" not in done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0]


def test_a_wrong_server_is_said_on_the_terminal_and_a_sound_one_is_not(
    ranks: Ranks, folder: Path, server_url: str, tmp_path: Path
) -> None:
    with wrong(server_url, threes) as url:
        done = in_parallel(ranks, 1)(*gspo(folder, tmp_path / "wrong", url))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("mcore-rl: warning: step 1: the servers' log-probs differ") == 1
    assert done.stderr.count("warning: step") == 2, "in the 1st and the 2nd of three steps"
    events = [e for e in read_metrics(tmp_path / "wrong" / "events.jsonl") if e["kind"] == "mismatch"]
    assert [event["step"] for event in events] == [1, 2, 3]
    done = in_parallel(ranks, 1)(*gspo(folder, tmp_path / "sound", server_url))
    assert done.returncode == 0, done.stderr
    assert "warning: step" not in done.stderr


def test_what_a_server_refuses_is_asked_once_and_ends_the_run_with_the_servers_reason(
    ranks: Ranks, folder: Path, tmp_path: Path
) -> None:
    """The server itself says 400: no sequence so long fits its cache."""
    flags = gspo(folder, tmp_path / "run", "URL", "--parallel.tensor", "1")
    flags[flags.index("--rollout.max_new_tokens") + 1] = "40"
    with embedded(folder / "policy", kv_tokens=32) as (url, _), proxy_beside(url) as between:
        done = ranks.run(*(flag.replace("URL", between.url) for flag in flags))
    assert done.returncode == 2, done.stderr
    reason = "context length of 32 tokens: 6 of the prompt and 40 of max_new_tokens"
    assert re.search(rf"RejectedError: {between.url}/generate: HTTP 400: .*{reason}", done.stderr)
    refused = [str(body) for body in between.bodies("/generate") if "40" in str(body["sampling_params"])]
    assert len(set(refused)) == len(refused) > 0, "the evaluation before the first step"
    assert read_metrics(tmp_path / "run" / "metrics.jsonl") == []
