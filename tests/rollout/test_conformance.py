"""One suite for the embedded server and for SGLang: replies have the form that SGLang 0.5.23 gave.

golden/sglang_recorded.json holds requests and replies of a real server. MCORE_RL_CONFORMANCE_URL runs the
same tests against another server, with MCORE_RL_CONFORMANCE_MODEL a checkpoint directory of its model, as
that server sees it. The model needs a context of 512 tokens, 320 ids or more and a tokenizer.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mcore_rl.rollout.processes import LocalServer
from tests.rollout.support import Answer, http

RECORDED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "golden" / "sglang_recorded.json").read_text()
)
URL = os.environ.get("MCORE_RL_CONFORMANCE_URL")

CONTROL = ("pause", "flush", "begin", "begin_twice", "end", "end_twice", "update_nosession", "continue")
"""in this order"""
WEIGHTS = ("update_disk", "update_disk_bad", "checker", "update_weight_version", "missing_field")
STATELESS = tuple(name for name in RECORDED if name not in CONTROL + WEIGHTS)

REFUSED = {
    "generate_mask": "return_sampling_mask",
    "generate_routed": "return_routed_experts",
    "release": "release_memory_occupation",
    "resume": "resume_memory_occupation",
}
"""what the embedded server lacks: 400, and the reason names it"""
PARTIAL = {
    "model_info": {"model_path", "weight_version", "model_type", "architectures", "is_generation"},
    "server_info": {
        "version",
        "weight_version",
        "max_total_num_tokens",
        "max_running_requests",
        "max_req_input_len",
    },
    "loads": {"version", "loads", "timestamp"},
}
"""replies of which the embedded server gives a part, with at least these fields"""
EXTRACTS = ("model_info", "server_info")
"""of these, hundreds of settings of one machine, the recording keeps the fields that mean something here"""
SAME_BODY = {"pause", "continue", "begin", "begin_twice", "end", "end_twice", "get_weight_version",
             "generate_too_long", "generate_bad_param", "update_weight_version", "update_disk"}  # fmt: skip
"""replies that are equal, not only of the same form"""


@pytest.fixture
def target(request: pytest.FixtureRequest) -> str:
    """URL of the server under test."""
    if URL:
        return URL
    server: LocalServer = request.getfixturevalue("server")
    return server.url


@pytest.fixture
def weights_target(request: pytest.FixtureRequest) -> str:
    return URL or request.getfixturevalue("fresh_url")


def other_weights(request: pytest.FixtureRequest) -> str:
    return os.environ["MCORE_RL_CONFORMANCE_MODEL"] if URL else str(request.getfixturevalue("dir_b"))


def ask(url: str, name: str) -> Answer:
    sent = RECORDED[name]["request"]
    return http(url, sent["path"], sent["json"], method=sent["method"])


def form(value: Any) -> Any:
    """The structure of JSON: fields and types; a list is the set of the forms of its elements."""
    if isinstance(value, dict):
        return {key: form(item) for key, item in value.items()}
    if isinstance(value, list):
        return sorted({json.dumps(form(item), sort_keys=True) for item in value})
    return type(value).__name__


def comparable(name: str, body: Any) -> Any:
    """Without what depends on the server's state: cache hits, names of tensors."""
    body = copy.deepcopy(body)
    for item in body if isinstance(body, list) else [body]:
        if isinstance(item, dict) and "meta_info" in item:
            details = item["meta_info"].pop("cached_tokens_details")
            assert details is None or form(details) == {"device": "int", "host": "int"}
    if name == "checker":
        for rank in body["ranks"]:
            assert all(isinstance(value, str) for value in rank["checksums"].values())
            rank["checksums"] = {}
    return body


def check(name: str, answer: Answer) -> None:
    recorded = RECORDED[name]
    if not URL and name in REFUSED:
        assert answer.status == 400
        assert REFUSED[name] in json.dumps(answer.body)
        return
    assert answer.status == recorded["status"], answer.body
    want, got = form(comparable(name, recorded["response"])), form(comparable(name, answer.body))
    if URL and name in EXTRACTS:
        got = {key: got.get(key) for key in want}
    if not URL and name in PARTIAL:
        assert PARTIAL[name] <= got.keys()
        want, got = ({key: f[key] for key in got.keys() & want.keys()} for f in (want, got))
        want, got = ({k: v for k, v in f.items() if k != "loads"} for f in (want, got))
    assert got == want
    if name in SAME_BODY:
        assert answer.body == recorded["response"]


@pytest.mark.parametrize("name", STATELESS)
def test_reply_has_the_recorded_form(target: str, name: str) -> None:
    check(name, ask(target, name))


def test_control_replies_have_the_recorded_form(target: str) -> None:
    for name in CONTROL:
        check(name, ask(target, name))


def test_weight_replies_have_the_recorded_form(weights_target: str, request: pytest.FixtureRequest) -> None:
    for name in WEIGHTS:
        sent = copy.deepcopy(RECORDED[name]["request"])
        if name == "update_disk":
            sent["json"]["model_path"] = other_weights(request)
        check(name, http(weights_target, sent["path"], sent["json"]))


def test_loads_have_the_recorded_fields(target: str) -> None:
    load, recorded = ask(target, "loads").body["loads"][0], RECORDED["loads"]["response"]["loads"][0]
    assert {"num_running_reqs", "num_waiting_reqs", "num_used_tokens", "max_total_num_tokens"} <= load.keys()
    assert form(load) == {key: value for key, value in form(recorded).items() if key in load}


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: body["meta_info"].pop("weight_versions"),
        lambda body: body["meta_info"]["output_token_logprobs"].append([1, 2, None]),
        lambda body: body.update(output_ids=[]),
        lambda body: body["meta_info"].update(extra=1),
    ],
    ids=["missing", "type", "empty", "extra"],
)
def test_the_comparison_sees_a_damaged_reply(damage: Any) -> None:
    body = copy.deepcopy(RECORDED["generate_basic"]["response"])
    check("generate_basic", Answer(200, copy.deepcopy(body)))
    damage(body)
    with pytest.raises(AssertionError):
        check("generate_basic", Answer(200, body))
