"""What SGLang does that a trainer must know: each test fails without the handling that it names.

Numbers are those of the hazards in docs/rollout.md.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from mcore_rl.errors import ConfigError, RolloutError, WeightSyncError
from mcore_rl.rollout.client import RejectedError, Reply, RolloutClient, call
from mcore_rl.rollout.dispatch import Dispatch, Request
from mcore_rl.rollout.fleet import Fleet, check_server, check_server_info
from mcore_rl.rollout.processes import LocalServer
from mcore_rl.rollout.reply import ANY_VOCABULARY
from mcore_rl.weights.disk import load_from_disk, publish_directory
from mcore_rl.weights.transport import server_log_probs
from tests.rollout.support import (
    VOCAB,
    build_moe_model,
    http,
    largest_error,
    log_probs_of,
    running,
    wait_until,
)
from tests.sglang.conftest import processes_of_sglang

T = TypeVar("T")
PROMPT = [3, 1, 4, 1, 5]
LONG = {"max_new_tokens": 450, "ignore_eos": True}


def use(url: str, work: Callable[[RolloutClient], Awaitable[T]]) -> T:
    return call(RolloutClient(url, timeout=60.0), work)


def generate(url: str, **params: Any) -> Reply:
    sampling = {"max_new_tokens": 24, "ignore_eos": True} | params
    return use(url, lambda client: client.generate([PROMPT], [sampling], ["one"]))[0]


async def during_generation(url: str, act: Callable[[RolloutClient], Awaitable[object]]) -> Reply:
    """The reply to a long request, `act` being awaited while it is decoded."""
    async with RolloutClient(url, timeout=60.0) as client:
        asked = asyncio.create_task(client.generate([PROMPT], [LONG], ["long"]))
        await asyncio.to_thread(wait_until, lambda: running(url) == 1, "it generates")
        await act(client)
        return (await asked)[0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_h1_log_probs_are_those_of_the_tempered_distribution(moe_url: str, temperature: float) -> None:
    """The launcher removes the variable that the surroundings set (conftest), which returns others."""
    reply = generate(moe_url, temperature=temperature)
    model = build_moe_model(0)
    assert (
        largest_error(list(reply.log_probs), log_probs_of(model, PROMPT, list(reply.token_ids), temperature))
        < 2e-5
    )
    if temperature != 1.0:
        untempered = log_probs_of(model, PROMPT, list(reply.token_ids))
        assert largest_error(list(reply.log_probs), untempered) > 1e-2


def test_h1_a_server_that_changes_requests_is_refused(moe_url: str) -> None:
    info = use(moe_url, lambda client: client.server_info())
    check_server_info(moe_url, info)
    with pytest.raises(ConfigError, match="preferred-sampling-params"):
        check_server_info(moe_url, info | {"preferred_sampling_params": {"top_k": 4}})


def renamed(source: Path, target: Path) -> Path:
    """The checkpoint with one tensor under a name that no model has."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    tensors["model.layers.1.self_attn.o_project.weight"] = tensors.pop(
        "model.layers.1.self_attn.o_proj.weight"
    )
    save_file(tensors, target / "model.safetensors")
    return target


def test_h2_unknown_names_are_accepted_and_only_log_probs_tell(
    moe_url: str, moe_dirs: tuple[Path, Path], tmp_path: Path
) -> None:
    """SGLang says 200 and the version advances; the comparison after a publish sees the old tensor."""
    broken = renamed(moe_dirs[1], tmp_path / "broken")
    use(moe_url, lambda client: load_from_disk(client, broken, "5"))
    assert generate(moe_url).versions[0].version == "5", "SGLang refuses it now: tell the docs"
    tokens = [5, 9, 200, 17, 3, 44, 8, 101]
    scores, _ = server_log_probs([RolloutClient(moe_url)], [tokens], "h2")
    want = log_probs_of(build_moe_model(1), tokens[:1], tokens[1:])
    assert largest_error(scores[moe_url][0], want) > 2e-4


def test_h2_h3_wrong_names_and_shapes_are_seen_before_a_server_is_told(
    moe_url: str, moe_dirs: tuple[Path, Path], tmp_path: Path
) -> None:
    """A wrong shape ends the whole server, by disk too; an update that it refuses leaves it as it was."""
    good = load_file(moe_dirs[1] / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in good.items()}
    shutil.copytree(moe_dirs[1], tmp_path / "shape")
    save_file(good | {"model.norm.weight": torch.ones(7)}, tmp_path / "shape" / "model.safetensors")
    fleet = Fleet([moe_url], vocabulary=ANY_VOCABULARY, timeout=60.0)
    for bad in (tmp_path / "shape", renamed(moe_dirs[1], tmp_path / "name")):
        with pytest.raises(WeightSyncError, match="no server was told"):
            publish_directory(fleet, bad, "6", shapes)
    with pytest.raises(WeightSyncError, match=r"did not load version 6.*publish\.dir"):
        use(moe_url, lambda client: load_from_disk(client, tmp_path / "absent", "6"))
    reply = generate(moe_url)
    want = log_probs_of(build_moe_model(0), PROMPT, list(reply.token_ids))
    assert largest_error(list(reply.log_probs), want) < 2e-5
    assert publish_directory(fleet, moe_dirs[1], "6", shapes) == {}
    assert generate(moe_url).versions[0].version == "6"


@pytest.mark.parametrize(
    ("info", "remedy"),
    [
        ({"version": "0.5.20"}, r"0\.5\.20; SGLang 0\.5\.21 or newer"),
        ({"version": "main"}, r"SGLang 0\.5\.21 or newer"),
        ({"dp_size": 2}, "several servers without --dp-size"),
    ],
)
def test_h4_h6_servers_that_cannot_take_part_are_refused(
    moe_url: str, info: dict[str, Any], remedy: str
) -> None:
    real = use(moe_url, lambda client: client.server_info())
    use(moe_url, check_server)
    with pytest.raises(ConfigError, match=remedy):
        check_server_info(moe_url, real | info)


def test_h5_an_update_in_mid_generation_has_its_cache_flushed_and_its_versions_told_apart(
    moe_url: str, moe_dirs: tuple[Path, Path]
) -> None:
    """With pause in place it would be a 400 although the weights changed: publishing retracts instead."""
    reply = asyncio.run(during_generation(moe_url, lambda client: load_from_disk(client, moe_dirs[1], "7")))
    old, new = reply.versions
    assert (old.version, new.version, new.end) == ("default", "7", 450)
    log_probs, output = list(reply.log_probs), list(reply.token_ids)
    assert (
        largest_error(log_probs[: old.end], log_probs_of(build_moe_model(0), PROMPT, output)[: old.end])
        < 1e-4
    )
    tail = log_probs_of(build_moe_model(1), PROMPT, output)[new.start :]
    assert largest_error(log_probs[new.start :], tail) < 1e-4, "the old weights' cache was kept"


def test_h5_tokens_of_another_version_are_not_taken(moe_url: str) -> None:
    """/model_info may lag: what counts is the version of every span of tokens."""

    async def ask() -> None:
        async with Dispatch([RolloutClient(moe_url)], version="8", health_timeout=60) as servers:
            await servers.ask(Request([PROMPT], [{"max_new_tokens": 2}], ["x"]))

    with pytest.raises(RolloutError, match=r"weight version \['default'\], not '8'"):
        asyncio.run(ask())


def test_h5b_nothing_is_sampled_while_weights_load(moe_url: str, moe_dirs: tuple[Path, Path]) -> None:
    """A request sent during the pause waits for its end, and comes from the new weights alone."""

    async def use_paused(client: RolloutClient) -> Reply:
        await client.pause("retract")
        asked = asyncio.create_task(client.generate([PROMPT], [{"max_new_tokens": 4}], ["late"]))
        await asyncio.sleep(1.0)
        assert not asked.done()
        await client.update_weights_from_disk(str(moe_dirs[1]), "9")
        assert not asked.done()
        await client.resume()
        return (await asked)[0]

    assert {span.version for span in use(moe_url, use_paused).versions} == {"9"}


def test_h7_a_publish_pauses_at_once_and_loads_are_our_own_count(moe_url: str) -> None:
    """A pause that aborts polls each second, one that retracts does not; the load it leaves is not true."""

    async def pause(client: RolloutClient, mode: Any) -> tuple[float, int]:
        """Seconds until it has paused, and how many requests run then, as it says."""
        asked = asyncio.create_task(client.generate([PROMPT], [LONG], ["long"]))
        await asyncio.to_thread(wait_until, lambda: running(moe_url) == 1, "it generates")
        began = time.monotonic()
        await client.pause(mode)
        took, load = time.monotonic() - began, running(moe_url)
        await client.resume()
        await asked
        return took, load

    async def paused(client: RolloutClient) -> tuple[tuple[float, int], list[tuple[float, int]]]:
        return await pause(client, "abort"), [await pause(client, "retract") for _ in range(3)]

    (aborting, _), retracted = use(moe_url, paused)
    assert min(retracted)[0] < 0.5 < 0.9 < aborting
    assert {load for _, load in retracted} == {1}, "none runs, and Dispatch counts what it has asked itself"


def test_h9_moe_weights_have_the_names_of_the_checkpoint(moe_dirs: tuple[Path, Path]) -> None:
    """transformers' fused names would be ignored (hazard 2); test_publish compares the log-probs."""
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in load_file(moe_dirs[0] / "model.safetensors")


def test_h10_every_request_has_an_id_of_its_own_that_is_echoed(moe_url: str) -> None:
    """One id with n > 1 comes back as fresh uuids; the client sends a list."""
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1, "n": 2}, "rid": "z"}
    assert "z" not in [reply["meta_info"]["id"] for reply in http(moe_url, "/generate", body).body]
    params = [{"max_new_tokens": 1}] * 3
    replies = use(moe_url, lambda client: client.generate([PROMPT] * 3, params, ["a", "b", "c"]))
    assert [reply.rid for reply in replies] == ["a", "b", "c"]


def test_h19_a_request_that_is_asked_again_is_no_duplicate_of_itself(moe_url: str) -> None:
    """A dispatcher that gave up an address, or a trainer that was restarted, asks under the same ids."""

    async def twice(client: RolloutClient) -> list[list[Reply]]:
        return await asyncio.gather(*(client.generate([PROMPT], [LONG], ["again"]) for _ in range(2)))

    for (reply,) in use(moe_url, twice):
        assert (reply.rid, len(reply.token_ids)) == ("again", LONG["max_new_tokens"])
    body = {"input_ids": [PROMPT] * 2, "sampling_params": LONG, "rid": ["again", "again"]}
    refused = http(moe_url, "/generate", body)
    assert refused.status == 400
    assert "uplicate" in str(refused.body)


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [([1] * 600, {}, "context length"), (PROMPT, {"temperature": -1}, "temperature")],
)
def test_h11_a_refusal_arrives_with_its_reason_and_is_not_retried(
    moe_url: str, prompt: list[int], params: dict[str, Any], says: str
) -> None:
    began = time.monotonic()
    with pytest.raises(RejectedError, match=says) as refused:
        use(moe_url, lambda client: client.generate([prompt], [params], ["x"]))
    assert refused.value.status == 400
    assert time.monotonic() - began < 20


def test_h12_a_server_holds_none_of_our_streams(moe_server: LocalServer) -> None:
    """A daemon of torch inherits stdout, and a runner that reads a pipe to its end would hang."""
    assert moe_server.process is not None
    for pid in processes_of_sglang():
        for number in (0, 1, 2):
            target = Path(f"/proc/{pid}/fd/{number}")
            if target.exists():
                assert (
                    str(target.resolve()) in ("/dev/null", str(moe_server.log_file.resolve()))
                    or "log" in target.resolve().name
                )


def test_h13_weights_are_not_read_back(moe_url: str, moe_dirs: tuple[Path, Path]) -> None:
    """No tensor is given by name; after a publish log-probs are compared."""
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert http(moe_url, "/get_weights_by_name", {"name": name}).status == 400
    scores, _ = server_log_probs([RolloutClient(moe_url)], [PROMPT], "h13")
    assert largest_error(scores[moe_url][0], log_probs_of(build_moe_model(0), PROMPT[:1], PROMPT[1:])) < 2e-5


def test_h15_seeds_do_not_act_here(moe_url: str) -> None:
    """Samples do not repeat, so nothing may rest on their repeating; the embedded server honours seeds."""
    info = use(moe_url, lambda client: client.server_info())
    assert info["enable_deterministic_inference"] is False
    outputs = {generate(moe_url, sampling_seed=5).token_ids for _ in range(3)}
    assert len(outputs) > 1, "seeds act: resume may be exact with SGLang too, tell the docs"


def test_h16_the_last_id_of_the_vocabulary_is_echoed_as_0(moe_url: str) -> None:
    """In the log-probs of a prompt only; a reply that differs from the prompt is otherwise refused."""
    tokens = [5, VOCAB - 1, 3, VOCAB - 1, 8]
    body = {"input_ids": tokens, "sampling_params": {"max_new_tokens": 1}, "return_logprob": True}
    raw = http(moe_url, "/generate", body | {"logprob_start_len": 0}).body["meta_info"][
        "input_token_logprobs"
    ]
    assert [entry[1] for entry in raw] == [5, 0, 3, 0, 8], "SGLang echoes it now: tell the docs"
    scores, failed = server_log_probs([RolloutClient(moe_url)], [tokens], "h16")
    assert not failed
    want = log_probs_of(build_moe_model(0), tokens[:1], tokens[1:])
    assert largest_error(scores[moe_url][0], want) < 2e-5


@pytest.mark.parametrize("publishing", [True, False])
def test_h20_a_paused_server_does_not_answer_health_checks(moe_url: str, publishing: bool) -> None:
    """And is not given up for it while it takes weights, however long that takes."""

    async def go() -> dict[str, str]:
        client = RolloutClient(moe_url, timeout=60.0)
        async with Dispatch([client], version="default", health_timeout=2.0) as servers:
            if publishing:
                servers.expect([client], "1")
            asked = asyncio.create_task(servers.ask(Request([PROMPT], [LONG], ["long"])))
            await asyncio.to_thread(wait_until, lambda: running(moe_url) == 1, "it generates")
            await client.pause("retract")
            await asyncio.sleep(5.0)
            await client.resume()
            if publishing:
                await servers.serve([client], "default")
            await asyncio.gather(asked, return_exceptions=True)
            return servers.lost

    lost = asyncio.run(go())
    assert (lost == {}) is publishing
    assert publishing or "health check" in lost[moe_url]


def test_launch_settings_name_no_key(moe_server: LocalServer) -> None:
    assert json.dumps(use(moe_server.url, lambda client: client.server_info())["api_key"]) == "null"
