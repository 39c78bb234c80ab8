"""Adapters beside the frozen model, as clients know them; what servers do is in tests/sglang."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from mcore_rl.errors import ConfigError, RolloutError
from mcore_rl.lora import Lora
from mcore_rl.model.hf.adapters import AdapterMap, matrices_with_adapters
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.rollout.adapters import AdapterNeeds, ServedAdapter, check_adapters, under
from mcore_rl.rollout.client import RejectedError, RolloutClient
from mcore_rl.rollout.dispatch import Dispatch, Request
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.rollout.reply import Reply
from mcore_rl.types import VersionSpan
from tests.rollout.proxy import proxy, status

URL = "http://a:1"
NEEDS = AdapterNeeds(8, ("down_proj", "q_proj"), versions=3)
INFO = {"enable_lora": True, "max_lora_rank": 8, "max_loras_per_batch": 4}
INFO |= {"lora_target_modules": ["qkv_proj", "down_proj"]}


def test_a_token_has_the_version_whose_adapter_was_asked_for() -> None:
    whole = Reply("a", (1, 2, 3), (-1.0, -1.0, -1.0), (), "stop", (VersionSpan("default", 0, 3),))
    cut = replace(whole, token_ids=(), log_probs=(), versions=(), finish_reason="abort")
    frozen: dict[str, str] = {}
    found = under(ServedAdapter("x_7", "7"), [whole, cut], URL, frozen)
    assert [reply.versions for reply in found] == [(VersionSpan("7", 0, 3),), ()]
    assert found[0] == replace(whole, versions=(VersionSpan("7", 0, 3),))
    assert frozen == {URL: "default"}
    with pytest.raises(
        RolloutError, match="its model was version 'default', and is '3': somebody else updated"
    ):
        under(ServedAdapter("x_8", "8"), [replace(whole, versions=(VersionSpan("3", 0, 3),))], URL, frozen)


def test_a_version_has_a_name_of_this_process_once_there_is_one() -> None:
    fleet = Fleet([URL], vocabulary=8)
    assert fleet.adapter_of("3") is None
    fleet.adapters = "mcore_rl_ab"
    assert (fleet.adapter_of(""), fleet.adapter_of("3")) == (None, ServedAdapter("mcore_rl_ab_3", "3"))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"enable_lora": None}, "serves no adapters; start it with --enable-lora --max-lora-rank 8"),
        ({"max_lora_rank": 4}, "--max-lora-rank 4 is below lora.rank = 8"),
        ({"max_loras_per_batch": 3}, "--max-loras-per-batch 3, and 4 are needed"),
        ({"lora_target_modules": ["qkv_proj"]}, "no place for adapters of down_proj; start it with"),
    ],
)
def test_a_server_that_cannot_hold_them_is_refused(changed: dict, says: str) -> None:
    check_adapters(URL, INFO, NEEDS)
    check_adapters(URL, INFO | {"lora_target_modules": ["all"]}, NEEDS)
    check_adapters(URL, {"enable_lora": True}, NEEDS)
    with pytest.raises(ConfigError, match=says):
        check_adapters(URL, INFO | changed, NEEDS)


def test_the_options_of_a_server_are_what_the_check_asks_for() -> None:
    options = NEEDS.options()
    assert options[options.index("--max-lora-rank") + 1] == str(INFO["max_lora_rank"])
    assert options[options.index("--max-loras-per-batch") + 1] == str(INFO["max_loras_per_batch"])
    assert options[options.index("--lora-target-modules") + 1 :] == list(NEEDS.matrices)


def test_matrices_are_named_once_for_all_layers(folder: Path) -> None:
    mapping = AdapterMap(read_architecture(folder / "policy"), Lora(2, 4.0, ("qkv", "fc2")))
    assert matrices_with_adapters(mapping) == ("down_proj", "k_proj", "q_proj", "v_proj")


def test_a_request_that_comes_after_its_version_has_gone_asks_for_the_one_that_serves(
    url: str,
) -> None:
    """An attempt may come so late: its server is not at fault. One without the version that serves is."""
    settings = {"max_new_tokens": 1, "temperature": 1.0}
    adapters = {"0": ServedAdapter("x_0", "0"), "default": None}  # the embedded server holds none

    async def ask(published: bool) -> tuple[list[Reply], dict[str, str]]:
        client = RolloutClient(url)
        async with Dispatch([client], version="0", health_timeout=30, adapter_of=adapters.get) as servers:
            asked = asyncio.create_task(servers.ask(Request([[1]], [settings], ["a"])))
            await asyncio.sleep(0)  # it has chosen its version
            if published:
                servers.expect([client], "default")
                await servers.serve([client], "default")
            return await asked, servers.lost

    replies, lost = asyncio.run(ask(published=True))
    assert ([span.version for span in replies[0].versions], lost) == (["default"], {})
    with pytest.raises(RolloutError, match="no rollout server is left"):
        asyncio.run(ask(published=False))


def test_a_refusal_of_a_server_whose_address_has_the_word_is_a_refusal(url: str) -> None:
    async def ask() -> None:
        async with (
            proxy(url, status(400), path="/lora/generate") as before,
            RolloutClient(f"{before.url}/lora") as client,
        ):
            settings = {"max_new_tokens": 1, "temperature": 1.0}
            await client.generate([[1]], [settings], ["a"], adapter=ServedAdapter("x_7", "7"))

    with pytest.raises(RejectedError, match="HTTP 400: scripted"):
        asyncio.run(ask())


def test_a_server_without_the_adapter_is_one_that_is_gone(url: str) -> None:
    """The embedded server holds none: it refuses the field, and the request may go to another server."""

    async def ask() -> None:
        async with RolloutClient(url) as client:
            settings = {"max_new_tokens": 1, "temperature": 1.0}
            await client.generate([[1]], [settings], ["a"], adapter=ServedAdapter("x_7", "7"))

    with pytest.raises(RolloutError, match=r"does not hold the adapter of version '7' \(.*lora_path"):
        asyncio.run(ask())
