"""What a server says is checked against what the model can say: ids, lengths, log-probs, versions."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_rl.errors import EXIT_RETRYABLE, RolloutError
from mcore_rl.rollout import client as client_module
from mcore_rl.rollout.client import RolloutClient
from mcore_rl.rollout.dispatch import Dispatch, Request
from mcore_rl.rollout.reply import LARGEST_LOG_PROB, Asked, MalformedReplyError, Reply, parse_reply
from tests.rollout.proxy import damaged, proxy
from tests.rollout.support import EOS, VOCAB

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "sglang_recorded.json").read_text())
OF_SGLANG = RECORDED["generate_prompt_lp"]
"""4 tokens, with the log-probs of the prompt, of a model with 320 ids"""
ASKED = Asked(
    "p@1/0",
    OF_SGLANG["response"]["meta_info"]["id"],
    OF_SGLANG["request"]["json"]["input_ids"],
    most=4,
    vocabulary=VOCAB,
    scored=True,
)
META = "meta_info"


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """The recorded reply after `change` in place."""
    reply = copy.deepcopy(OF_SGLANG["response"])
    change(reply)
    return reply


def token(value: object) -> Callable[[dict[str, Any]], None]:
    """The second token is `value`, in both places."""

    def change(reply: dict[str, Any]) -> None:
        reply["output_ids"][1] = reply[META]["output_token_logprobs"][1][1] = value

    return change


def log_prob(value: object) -> Callable[[dict[str, Any]], None]:
    return lambda reply: reply[META]["output_token_logprobs"][1].__setitem__(0, value)


def prompt_log_prob(value: object) -> Callable[[dict[str, Any]], None]:
    return lambda reply: reply[META]["input_token_logprobs"][2].__setitem__(0, value)


def span(**fields: object) -> Callable[[dict[str, Any]], None]:
    return lambda reply: reply[META]["weight_versions"][0].update(fields)


def longer(tokens: int) -> Callable[[dict[str, Any]], None]:
    """So many tokens, everything agreeing."""

    def change(reply: dict[str, Any]) -> None:
        count = len(reply["output_ids"])
        for entries in (reply["output_ids"], reply[META]["output_token_logprobs"]):
            entries[:] = [entries[i % count] for i in range(tokens)]
        reply[META]["weight_versions"][0].update(end=tokens)

    return change


def silent(finish: str) -> Callable[[dict[str, Any]], None]:
    """No token, everything agreeing."""

    def change(reply: dict[str, Any]) -> None:
        reply["output_ids"] = reply[META]["output_token_logprobs"] = reply[META]["weight_versions"] = []
        reply[META]["finish_reason"] = {"type": finish}

    return change


BROKEN = [
    *((token(value), "output_ids") for value in (9999, VOCAB, -1, 2**40, 10**400, 8.5, 8.0, True, "3", None)),
    (longer(60), "output_ids: 60 tokens, 4 were asked for"),
    (silent("stop"), "output_ids: no token of a response that ended by 'stop'"),
    (silent("length"), "output_ids: no token of a response that ended by 'length'"),
    (lambda r: r["output_ids"].__setitem__(1, {}), "output_ids: an object (token 1) is no id"),
    *(
        (log_prob(value), "meta_info.output_token_logprobs")
        for value in (0.5, 1e39, -1e39, -(10**400), float("-inf"), float("nan"), True, "-1", None, [])
    ),
    *(
        (prompt_log_prob(value), "meta_info.input_token_logprobs")
        for value in (0.5, -1e39, float("nan"), True, "-1", None)
    ),
    (lambda r: r[META]["input_token_logprobs"][2].__setitem__(1, 30.0), "meta_info.input_token_logprobs"),
    (lambda r: r[META]["output_token_logprobs"][1].__setitem__(1, 180), "meta_info.output_token_logprobs"),
    (lambda r: r[META]["output_token_logprobs"].pop(), "meta_info.output_token_logprobs"),
    (lambda r: r["output_ids"].pop(), "meta_info.output_token_logprobs"),
    (span(version=1), "meta_info.weight_versions"),
    (span(version=None), "meta_info.weight_versions"),
    (span(end=4.0), "meta_info.weight_versions"),
    (span(start=False), "meta_info.weight_versions"),
    (span(end=3), "meta_info.weight_versions"),
    (lambda r: r[META].pop("weight_versions"), "weight_versions"),
    (lambda r: r.update(output_ids={"0": 1}), "output_ids"),
    (lambda r: r.update(output_ids="abcd"), "output_ids"),
]


def test_what_sglang_sends_is_a_reply() -> None:
    for name in ("generate_basic", "generate_prompt_lp", "generate_stop"):
        sent, got = RECORDED[name]["request"]["json"], RECORDED[name]["response"]
        most = sent["sampling_params"]["max_new_tokens"]
        scored = sent.get("logprob_start_len") == 0
        asked = Asked("x", got[META]["id"], sent["input_ids"], most, VOCAB, scored)
        assert parse_reply(got, asked).token_ids == tuple(got["output_ids"])
    last = parse_reply(changed(token(VOCAB - 1)), ASKED)
    assert last.token_ids[1] == VOCAB - 1, "the last row of the vocabulary is one of the model's"
    rounded = parse_reply(changed(log_prob(LARGEST_LOG_PROB / 100)), ASKED)
    assert rounded.log_probs[1] > 0, "a softmax of 1 may round upwards"
    assert parse_reply(changed(log_prob(0)), ASKED).log_probs[1] == 0, "JSON has 0 for 0.0"


@pytest.mark.parametrize(("change", "field"), BROKEN)
def test_what_the_model_cannot_have_said_is_malformed_and_the_field_is_named(
    change: Callable[[dict[str, Any]], object], field: str
) -> None:
    with pytest.raises(MalformedReplyError) as refused:
        parse_reply(changed(change), ASKED)
    assert field in str(refused.value)
    assert ASKED.rid in str(refused.value)
    assert len(str(refused.value)) < 400, "whatever it quotes"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-3, max_value=VOCAB + 3)
    | st.floats()
    | st.floats(min_value=-20, max_value=1e-3)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside."""
    found = [path]
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(len(value))
        found += [inner for key in keys for inner in places(value[key], (*path, key))]
    return found


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_mutated_reply_is_a_sample_of_the_model_or_a_malformed_reply(data: st.DataObject) -> None:
    """Up to three values are replaced, removed or put in twice; no other exception ever comes out."""
    reply: Any = copy.deepcopy(OF_SGLANG["response"])
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(reply)))
        if not path:
            reply = data.draw(JSON)
            continue
        owner = reply
        for key in path[:-1]:
            owner = owner[key]
        how = data.draw(st.sampled_from(["replace", "replace", "remove", "double"]))
        if how == "remove":
            del owner[path[-1]]
        elif how == "double" and isinstance(owner, list):
            owner.insert(path[-1], copy.deepcopy(owner[path[-1]]))
        else:
            owner[path[-1]] = data.draw(JSON)
    try:
        sample = parse_reply(reply, ASKED)
    except MalformedReplyError:
        return
    check_possible(sample)


def check_possible(sample: Reply) -> None:
    n = len(sample.token_ids)
    assert n <= ASKED.most
    assert len(sample.log_probs) == n
    assert all(type(x) is int and 0 <= x < VOCAB for x in sample.token_ids)
    scores = np.array([*sample.log_probs, *sample.prompt_log_probs], np.float32)
    assert np.isfinite(scores).all()
    assert (scores <= np.float32(LARGEST_LOG_PROB)).all()
    assert len(sample.prompt_log_probs) in (0, len(ASKED.prompt) - 1)
    assert sample.finish_reason in ("stop", "length", "abort")
    edges = [0, *(one.end for one in sample.versions)]
    assert [one.start for one in sample.versions] == edges[:-1]
    assert edges[-1] == n


def asked_of_two(url: str, change: Callable[[dict[str, Any]], object], times: int) -> tuple[Any, list[str]]:
    """(replies, why servers were lost) of two servers, of which one replies so `times` times."""

    async def go() -> tuple[Any, list[str]]:
        async with proxy(url, *[damaged(change)] * times) as bad, proxy(url) as good:
            clients = [
                RolloutClient(at, timeout=60.0, retries=1, vocabulary=VOCAB) for at in (bad.url, good.url)
            ]
            async with Dispatch(clients, version="default", health_timeout=30) as servers:
                params = {"max_new_tokens": 6, "sampling_seed": 3}
                asked = [Request([[i, 3]], [params], [f"{i}/0"]) for i in range(4)]
                replies = await asyncio.gather(*map(servers.ask, asked))
                return replies, [why.replace(bad.url, "BAD") for why in servers.lost.values()]

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (token(9999), "output_ids: 9999"),
        (token(-4), "output_ids: -4"),
        (token(2**40), "output_ids: 1099511627776"),
        (token(8.5), "output_ids: 8.5"),
        (token(True), "output_ids: True"),
        (token("3"), "output_ids: '3'"),
        (longer(60), "output_ids: 60 tokens, 6 were asked for"),
        (log_prob(0.5), "output_token_logprobs: 0.5"),
        (log_prob(1e39), "output_token_logprobs: 1e+39"),
        (log_prob(float("-inf")), "output_token_logprobs: -inf"),
        (log_prob(float("nan")), "output_token_logprobs: nan"),
    ],
)
def test_a_server_of_impossible_samples_is_asked_again_then_lost_and_costs_no_sample(
    url: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], object], field: str
) -> None:
    monkeypatch.setattr(client_module, "_BACKOFF_SECONDS", 0.005)
    replies, lost = asked_of_two(url, change, 1000)
    assert [reply.rid for part in replies for reply in part] == [f"{i}/0" for i in range(4)]
    assert len(lost) == 1
    assert lost[0].startswith("BAD/generate: no usable reply after 2 attempts")
    assert field in lost[0]
    assert all(0 <= x <= EOS for part in replies for reply in part for x in reply.token_ids)
    _, lost = asked_of_two(url, change, 1)
    assert lost == [], "once is retried"


def test_where_every_server_says_the_impossible_the_run_is_worth_a_retry(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_BACKOFF_SECONDS", 0.005)

    async def go() -> str:
        async with proxy(url, *[damaged(token(9999))] * 9) as bad:
            client = RolloutClient(bad.url, timeout=60.0, retries=1, vocabulary=VOCAB)
            async with Dispatch([client], version="default", health_timeout=30) as servers:
                with pytest.raises(RolloutError, match="output_ids: 9999") as refused:
                    await servers.ask(Request([[1, 2]], [{"max_new_tokens": 6}], ["x"]))
                assert refused.value.exit_code == EXIT_RETRYABLE
                assert f"\n  {bad.url}: {bad.url}/generate" in str(refused.value)
                return bad.url

    asyncio.run(go())
