"""Routed experts in replies: what the server's model chose, and replies that are no choice."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcore_rl.config import load_config
from mcore_rl.errors import ConfigError, RolloutError
from mcore_rl.rollout import client as client_module
from mcore_rl.rollout.client import RejectedError, Reply, RolloutClient, call
from mcore_rl.rollout.columns import pack_groups, unpack_groups
from mcore_rl.rollout.experts import encode_experts, parse_experts
from mcore_rl.rollout.fleet import check_server_info
from mcore_rl.rollout.sampler import build_group, group_request
from mcore_rl.rollout.saved import kept_replies, reply_from_json, reply_to_json
from mcore_rl.training.assemble_rollouts import replayed_experts
from mcore_rl.training.assemble_servers import local_servers
from mcore_rl.types import ExpertLayers, Prompt
from tests.environments.served import embedded
from tests.rollout.proxy import damaged, proxy
from tests.rollout.support import build_moe_model, save_model
from tests.rollout.test_conformance import RECORDED

OF_MODEL = ExpertLayers(experts=4, per_token=2, sparse=(True, True))
PROMPT = Prompt("p", "", (3, 1, 4, 1, 5), "")


def choice(tokens: int = 3, layers: int = 2) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.random((tokens, layers, 4)).argsort(-1)[..., :2]


def test_what_is_written_is_read() -> None:
    experts = parse_experts(encode_experts(choice()), OF_MODEL, 3)
    assert experts.dtype == np.uint8
    assert np.array_equal(experts, choice())
    many = ExpertLayers(experts=300, per_token=2, sparse=(True, True))
    assert parse_experts(encode_experts(choice() + 296), many, 3).max() == 299


def test_the_numbers_of_a_dense_layer_mean_nothing() -> None:
    raw = choice()
    raw[:, 1] = -7
    experts = parse_experts(encode_experts(raw), ExpertLayers(4, 2, (True, False)), 3)
    assert np.array_equal(experts[:, 0], raw[:, 0])
    assert not experts[:, 1].any()


def test_sglangs_recorded_reply_is_read() -> None:
    meta = RECORDED["generate_routed"]["response"]["meta_info"]
    read = meta["prompt_tokens"] + meta["completion_tokens"] - 1
    experts = parse_experts(meta["routed_experts"], ExpertLayers(8, 2, (True, True)), read)
    assert experts.shape == (8, 2, 2)
    assert experts[0].tolist() == [[0, 3], [3, 4]]


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (choice(tokens=4), r"64 bytes, not those of int32 \[3, 2, 2\]"),
        (choice(layers=1), "24 bytes"),
        (choice() + 1, "1 to 4, of 4 experts"),
        (choice() - 1, "-1 to 2, of 4 experts"),
        (np.zeros((3, 2, 2), int), "an expert twice"),
    ],
)
def test_what_is_no_choice_is_refused(experts: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_experts(encode_experts(experts), OF_MODEL, 3)
    with pytest.raises(ValueError, match=r"[Bb]ase64|padding|characters"):
        parse_experts("!" + encode_experts(choice()), OF_MODEL, 3)


# --- a server -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moe_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a Qwen3-MoE."""
    with embedded(save_model(tmp_path_factory.mktemp("moe"), build_moe_model(0))) as (url, _):
        yield url


async def ask(client: RolloutClient, experts: ExpertLayers | None = OF_MODEL) -> list[Reply]:
    params = {"max_new_tokens": 12, "ignore_eos": True}
    request = group_request(PROMPT, "p@1", 3, params, seed=0, experts=experts)
    rids = [f"{rid}-{id(client)}" for rid in request.rids]
    return await client.generate(request.prompts, request.sampling_params, rids, experts=request.experts)


def chosen_by_transformers(reply: Reply) -> np.ndarray:
    """[P+n-1, layers, K], each token's in ascending order."""
    model = build_moe_model(0)
    tokens = torch.tensor([[*PROMPT.token_ids, *reply.token_ids]])
    logits = model(tokens, output_router_logits=True).router_logits
    return np.stack([one.topk(2).indices.sort(-1).values[:-1].numpy() for one in logits], axis=1)


def kept(*replies: dict[str, Any]) -> list[Reply] | None:
    """What a run with routing replay keeps of a saved group."""
    saved = {"id": "p@1", "version": 0, "replies": replies}
    return kept_replies(saved, version=0, max_staleness=1, max_new_tokens=12, routed=True)


def test_experts_are_those_of_the_model_and_reach_the_trainer(moe_url: str) -> None:
    replies = call(RolloutClient(moe_url), ask)
    group = build_group("p@1", PROMPT, replies, str)
    (shared,) = unpack_groups(pack_groups([group]), {"p": PROMPT})
    for reply, sample in zip(replies, shared.samples, strict=True):
        wanted = chosen_by_transformers(reply)
        assert wanted.shape == (5 + 12 - 1, 2, 2)
        experts = sample.segments[0].experts
        assert experts is not None
        assert np.array_equal(np.sort(experts, -1), wanted)
        assert not np.array_equal(np.sort(experts, -1)[1:], wanted[:-1]), "the control: a token late"
        saved = json.loads(json.dumps(reply_to_json(reply)))
        restored = reply_from_json(saved, routed=True)
        assert restored.experts is not None
        assert (restored.experts.dtype, restored.token_ids) == (np.uint8, reply.token_ids)
        assert np.array_equal(restored.experts, experts)
        assert reply_from_json(saved, routed=False).experts is None
        assert kept(saved) is not None
        assert kept(saved, saved | {"experts": None}) is None, "sampled before routing was replayed"
    plain = call(RolloutClient(moe_url), lambda client: ask(client, None))
    assert all(reply.experts is None for reply in plain)


def without(meta: dict[str, Any]) -> None:
    del meta["routed_experts"]


def shorter(meta: dict[str, Any]) -> None:
    raw = base64.b64decode(meta["routed_experts"])
    meta["routed_experts"] = base64.b64encode(raw[:-4]).decode()


def out_of_range(meta: dict[str, Any]) -> None:
    raw = np.frombuffer(base64.b64decode(meta["routed_experts"]), "<i4").copy()
    raw[5] = 4
    meta["routed_experts"] = encode_experts(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, "routed_experts: absent.*start the server with --enable-return-routed-experts"),
        (shorter, "252 bytes, not those of int32"),
        (out_of_range, "of 4 experts"),
    ],
)
def test_a_reply_without_a_choice_is_retried_then_an_error(
    moe_url: str, change: Callable[[dict[str, Any]], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_BACKOFF_SECONDS", 0.005)
    fault = damaged(lambda first: change(first["meta_info"]))

    async def through(*script: Any) -> list[Reply]:
        async with proxy(moe_url, *script) as state, RolloutClient(state.url, retries=1) as client:
            return await ask(client)

    with pytest.raises(RolloutError, match=message):
        asyncio.run(through(fault, fault))
    assert len(asyncio.run(through(fault))) == 3, "the second attempt brings it"


def test_a_model_without_experts_says_so(url: str) -> None:
    with pytest.raises(RejectedError, match="the model has no experts"):
        call(RolloutClient(url), ask)
    info = {"version": "0.5.23"}
    check_server_info(url, info)
    check_server_info(url, info | {"enable_return_routed_experts": True}, experts=True)
    with pytest.raises(ConfigError, match=r"start it with --enable-return-routed-experts, or set rollout"):
        check_server_info(url, info, experts=True)


def test_a_policy_without_experts_is_refused(dir_a: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'run.dir = "{tmp_path}"\nmodel.path = "{dir_a}"\ndata.train = "d"\ntrain.steps = 1\n')
    assert replayed_experts(load_config(file)) is None
    moe = save_model(tmp_path / "moe", build_moe_model(0))
    flags = ["--rollout.routing_replay=true"]
    assert replayed_experts(load_config(file, [*flags, f"--model.path={moe}"])) == OF_MODEL
    with pytest.raises(ConfigError, match=r"rollout\.routing_replay: a qwen3 model has no experts"):
        replayed_experts(load_config(file, flags))


def test_a_launched_server_is_told_to_return_them(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    text = f'run.dir = "{tmp_path}"\nmodel.path = "m"\ndata.train = "d"\ntrain.steps = 1\n'
    file.write_text(text + '[rollout]\nserver = "sglang"\npython = "p"\noptions = ["--tp", "2"]\n')

    def command(*flags: str) -> list[str]:
        (server,) = local_servers(load_config(file, flags), tmp_path)
        return server.program.command(tmp_path, 1, tmp_path)

    assert command("--rollout.routing_replay=true")[-3:] == ["--enable-return-routed-experts", "--tp", "2"]
    assert "--enable-return-routed-experts" not in command()
