"""The embedded server over HTTP: what only a running process can show."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mcore_rl.errors import CheckpointError
from mcore_rl.model.hf.parameters import HF_DTYPES
from mcore_rl.server.weights import TYPES, load_model, replace_weights, weight_checksums
from tests.rollout.support import (
    EOS,
    VOCAB,
    Answer,
    build_model,
    http,
    largest_error,
    log_probs_of,
    log_probs_on_old_cache,
    save_model,
    wait_until,
)

PROMPT = [3, 1, 4, 1, 5]
LONG = {"max_new_tokens": 480, "ignore_eos": True}


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def generate(url: str, params: dict[str, Any], **fields: Any) -> Answer:
    body = {"input_ids": PROMPT, "sampling_params": params, "return_logprob": True}
    return http(url, "/generate", body | fields)


def scores(reply: dict[str, Any]) -> list[float]:
    return [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]


def load(url: str) -> dict[str, Any]:
    return http(url, "/v1/loads", method="GET").body["loads"][0]


def start_long(url: str, threads: ThreadPoolExecutor, rid: str = "long") -> Future[Answer]:
    """A generation that is running, and far from its end, when this returns."""
    future = threads.submit(generate, url, LONG, rid=rid)
    wait_until(lambda: load(url)["num_used_tokens"] > len(PROMPT) + 3, "the request decodes")
    return future


def update(url: str, directory: Path, **fields: Any) -> Answer:
    return http(url, "/update_weights_from_disk", {"model_path": str(directory)} | fields)


# -- generation -------------------------------------------------------------------------------------------


def test_seeded_replies_are_the_same_in_a_batch_and_one_by_one(url: str, model_a: PreTrainedModel) -> None:
    params = [{"max_new_tokens": 6, "sampling_seed": i, "temperature": 0.8} for i in range(16)]
    prompts = [[*PROMPT, i % 4] for i in range(16)]
    batch = http(
        url, "/generate", {"input_ids": prompts, "sampling_params": params, "return_logprob": True}
    ).body
    single = [generate(url, p, input_ids=prompt).body for p, prompt in zip(params, prompts, strict=True)]
    assert [r["output_ids"] for r in batch] == [r["output_ids"] for r in single]
    assert len({tuple(r["output_ids"]) for r in batch}) > 12
    for prompt, reply in zip(prompts, batch, strict=True):
        want = log_probs_of(model_a, prompt, reply["output_ids"], 0.8)
        assert largest_error(scores(reply), want) < 2e-5


def test_copies_are_prompt_major_and_seeded_once(url: str) -> None:
    params = {"max_new_tokens": 8, "sampling_seed": 11, "n": 3}
    prompts = [PROMPT, [7, 7]]
    first, again = (
        http(url, "/generate", {"input_ids": prompts, "sampling_params": params}).body for _ in range(2)
    )
    assert [r["meta_info"]["prompt_tokens"] for r in first] == [5, 5, 5, 2, 2, 2]
    assert [r["output_ids"] for r in first] == [r["output_ids"] for r in again]
    assert len({tuple(r["output_ids"]) for r in first}) == 6
    assert "output_token_logprobs" not in first[0]["meta_info"]


def test_eos_stops_unless_ignored_and_is_not_in_the_text(url: str) -> None:
    params = {"max_new_tokens": 100, "stop_token_ids": list(range(160))}
    replies = [generate(url, params | {"sampling_seed": seed}).body for seed in range(8)]
    for reply in replies:
        matched = reply["meta_info"]["finish_reason"]["matched"]
        assert matched == reply["output_ids"][-1]
        assert matched < 160 or matched == EOS
        assert all(160 <= token < VOCAB for token in reply["output_ids"][:-1])
        assert reply["text"] == "".join(f"w{token}" for token in reply["output_ids"][:-1])
    ignoring = generate(
        url, {"max_new_tokens": 30, "stop_token_ids": list(range(160)), "ignore_eos": True}
    ).body
    assert len(ignoring["output_ids"]) == 30


def test_text_goes_through_the_tokenizer(url: str) -> None:
    greedy = {"max_new_tokens": 3, "temperature": 0}
    by_text = http(url, "/generate", {"text": "w9", "sampling_params": greedy}).body
    assert by_text["output_ids"] == generate(url, greedy, input_ids=[9]).body["output_ids"]


def test_extra_log_probs_belong_to_their_tokens(url: str, model_a: PreTrainedModel) -> None:
    extras = {"logprob_start_len": 2, "top_logprobs_num": 3, "token_ids_logprob": [8, 9]}
    reply = generate(url, {"max_new_tokens": 4}, **extras).body
    meta, output = reply["meta_info"], reply["output_ids"]
    table = model_a(torch.tensor([PROMPT + output])).logits[0].log_softmax(-1)
    assert [entry[1] for entry in meta["input_token_logprobs"]] == PROMPT[2:]
    assert [entry[0] is None for entry in meta["input_token_logprobs"]] == [True, False, False]
    for kind, rows in (("input", table[2:4]), ("output", table[4:-1])):
        top, ids = meta[f"{kind}_top_logprobs"], meta[f"{kind}_token_ids_logprobs"]
        start = 1 if kind == "input" else 0
        assert top[:start] == ids[:start] == [None] * start
        for row, top_row, id_row in zip(rows, top[start:], ids[start:], strict=True):
            assert [e[1] for e in top_row] == row.topk(3).indices.tolist()
            assert largest_error([e[0] for e in top_row], row.topk(3).values) < 2e-5
            assert largest_error([e[0] for e in id_row], row[[8, 9]]) < 2e-5


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sampling_params": {"stream_interval": 0}}, "stream_interval"),
        ({"lora_path": "x"}, "lora_path"),
        ({"sampling_params": {"logit_bias": {"1": 5}}}, "sampling_params.logit_bias"),
        ({"sampling_params": {"regex": "a*"}}, "sampling_params.regex"),
        ({"sampling_params": {"stop": "."}}, "sampling_params.stop"),
        ({"sampling_params": {"frequency_penalty": 0.5}}, "sampling_params.frequency_penalty"),
        ({"sampling_params": {"tempurature": 1}}, "sampling_params.tempurature"),
        ({"sampling_params": {"max_new_tokens": "8"}}, "sampling_params.max_new_tokens"),
        ({"sampling_params": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"sampling_params": {"top_p": 0}}, "top_p"),
        ({"sampling_params": {"top_k": 0}}, "top_k"),
        ({"sampling_params": {"n": 0}}, "n must be"),
        ({"sampling_params": {"max_new_tokens": 508}}, "context length of 512"),
        ({"sampling_params": {"stop_token_ids": [VOCAB]}}, "stop_token_ids"),
        ({"sampling_params": [{}, {}]}, "sampling_params has 2 entries for 1 prompts"),
        ({"input_ids": []}, "empty"),
        ({"input_ids": [1, VOCAB]}, f"[0, {VOCAB})"),
        ({"input_ids": [-1]}, "input_ids"),
        ({"input_ids": [[1], []]}, "empty"),
        ({"input_ids": [[1], [2]], "rid": ["a", "a"]}, "different ids"),
        ({"input_ids": [[1], [2]], "rid": "a"}, "rid"),
        ({"unknown_field": 1}, "unknown_field"),
        ({"text": "w1"}, "exactly one"),
        ({"logprob_start_len": 5, "return_logprob": True}, "logprob_start_len"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_with_a_reason(
    url: str, fields: dict[str, Any], reason: str
) -> None:
    good = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 1}, "stream": False, "lora_path": None}
    assert http(url, "/generate", good).status == 200
    answer = http(url, "/generate", good | fields)
    assert answer.status == 400
    assert reason in str(answer.body)


def test_a_body_that_is_not_a_json_object_is_refused(url: str) -> None:
    for body in ([1], "x", 5):
        answer = http(url, "/generate", body)
        assert (answer.status, answer.body["object"]) == (400, "error")


# -- abort, pause, update -----------------------------------------------------------------------------------


def test_abort_ends_one_request_and_keeps_its_output(
    url: str, threads: ThreadPoolExecutor, model_a: PreTrainedModel
) -> None:
    future = start_long(url, threads)
    assert generate(url, LONG, rid="long").status == 400, "a rid in flight was accepted twice"
    assert http(url, "/abort_request", {"rid": "lon"}).status == 200
    assert load(url)["num_running_reqs"] == 1, "a prefix of the rid aborted it"
    assert http(url, "/abort_request", {"rid": "long"}).status == 200
    answer = future.result(30)
    reply, meta = answer.body, answer.body["meta_info"]
    assert answer.status == 200
    assert meta["finish_reason"] | {"message": "Aborted", "type": "abort"} == meta["finish_reason"]
    assert 0 < len(reply["output_ids"]) == meta["completion_tokens"] < LONG["max_new_tokens"]
    assert largest_error(scores(reply), log_probs_of(model_a, PROMPT, reply["output_ids"])) < 2e-5


def test_a_client_that_goes_away_is_not_served_further(url: str, threads: ThreadPoolExecutor) -> None:
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"input_ids": PROMPT, "sampling_params": LONG | {"n": 8}}).encode()
    head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        wait_until(lambda: load(url)["num_running_reqs"] == 8, "the requests run")
    before = load(url)["num_used_tokens"]
    wait_until(lambda: load(url)["num_running_reqs"] == 0, "they were aborted")
    assert before < 8 * 300, "they may have ended by themselves: the test shows nothing"


def test_paused_in_place_and_updated_has_two_version_spans(
    fresh_url: str,
    threads: ThreadPoolExecutor,
    model_a: PreTrainedModel,
    model_b: PreTrainedModel,
    dir_b: Path,
) -> None:
    future = start_long(fresh_url, threads)
    http(fresh_url, "/pause_generation", {"mode": "in_place"})
    refused = update(fresh_url, dir_b, weight_version="2")
    assert refused.status == 400
    assert "flush_cache" in refused.body["message"]
    assert update(fresh_url, dir_b, weight_version="2", flush_cache=False).status == 200
    used = load(fresh_url)["num_used_tokens"]
    assert http(fresh_url, "/flush_cache", {}).status == 400
    assert load(fresh_url)["num_used_tokens"] == used, "it decodes while paused"
    http(fresh_url, "/continue_generation", {})
    reply = future.result(30).body
    old, new = reply["meta_info"]["weight_versions"]
    switch, output = old["end"], reply["output_ids"]
    assert (old["version"], new["version"], new["start"], new["end"]) == ("default", "2", switch, 480)
    assert reply["meta_info"]["weight_version"] == "2"
    assert largest_error(scores(reply)[:switch], log_probs_of(model_a, PROMPT, output)[:switch]) < 1e-4
    tail = log_probs_on_old_cache(model_a, model_b, PROMPT, output, switch)
    assert largest_error(scores(reply)[switch:], tail) < 1e-4


def test_retract_starts_over_on_the_new_weights(
    fresh_url: str, threads: ThreadPoolExecutor, model_b: PreTrainedModel, dir_b: Path
) -> None:
    future = start_long(fresh_url, threads)
    http(fresh_url, "/pause_generation", {"mode": "retract"})
    late = threads.submit(generate, fresh_url, {"max_new_tokens": 2}, input_ids=[1])
    wait_until(lambda: load(fresh_url)["num_waiting_reqs"] == 2, "both wait")
    assert update(fresh_url, dir_b, weight_version="2").status == 200
    http(fresh_url, "/continue_generation", {})
    reply = future.result(30).body
    switch = reply["meta_info"]["weight_versions"][1]["start"]
    assert reply["meta_info"]["num_retractions"] == 1
    want = log_probs_of(model_b, PROMPT, reply["output_ids"])[switch:]
    assert largest_error(scores(reply)[switch:], want) < 1e-4
    assert late.result(30).body["meta_info"]["weight_version"] == "2"


def test_pause_with_abort_ends_everything(fresh_url: str, threads: ThreadPoolExecutor) -> None:
    future = start_long(fresh_url, threads)
    http(fresh_url, "/pause_generation", {})
    assert future.result(30).body["meta_info"]["finish_reason"]["type"] == "abort"
    waiting = threads.submit(generate, fresh_url, {"max_new_tokens": 1})
    wait_until(lambda: load(fresh_url)["num_waiting_reqs"] == 1, "a new request waits")
    assert not waiting.done()
    assert http(fresh_url, "/ready", method="GET").status == 503
    http(fresh_url, "/continue_generation", {})
    assert http(fresh_url, "/ready", method="GET").status == 200
    assert waiting.result(30).status == 200


def test_an_update_without_pause_waits_for_running_requests(
    fresh_url: str, threads: ThreadPoolExecutor, dir_b: Path
) -> None:
    future = start_long(fresh_url, threads)
    assert update(fresh_url, dir_b, weight_version="2").status == 200
    reply = future.result(30).body
    assert [span["version"] for span in reply["meta_info"]["weight_versions"]] == ["default"]
    assert len(reply["output_ids"]) == 480
    assert generate(fresh_url, {"max_new_tokens": 1}).body["meta_info"]["weight_version"] == "2"


def test_checksums_are_those_of_the_weights(
    fresh_url: str, model_a: PreTrainedModel, model_b: PreTrainedModel, dir_b: Path
) -> None:
    def served() -> dict[str, str]:
        return http(fresh_url, "/weights_checker", {"action": "checksum"}).body["ranks"][0]["checksums"]

    assert served() == weight_checksums(model_a)
    assert update(fresh_url, dir_b).status == 200
    assert served() == weight_checksums(model_b)


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.down_proj.weight"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.down_proj.weight"] = torch.ones(2)


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_project.weight"] = tensors.pop("model.layers.1.mlp.down_proj.weight")


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"][2, 3] = torch.nan


def overflow(tensors: dict[str, torch.Tensor]) -> None:
    """Finite in the file, infinite in the model."""
    tensors["lm_head.weight"] = tensors["lm_head.weight"].double() * 1e300


def to(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], None]:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)

    return convert


OTHERS = [to(t) for t in (torch.int64, torch.bool, torch.uint16, torch.complex64, torch.float8_e4m3fn)]


@pytest.mark.parametrize("damage", [drop, add, rename, reshape, poison, overflow, *OTHERS])
def test_a_bad_checkpoint_is_refused_and_changes_nothing(
    url: str, tmp_path: Path, dir_b: Path, damage: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    directory = tmp_path / "bad"
    shutil.copytree(dir_b, directory)
    tensors = load_file(directory / "model.safetensors")
    damage(tensors)
    save_file(tensors, directory / "model.safetensors")
    greedy = {"max_new_tokens": 20, "temperature": 0}
    before = generate(url, greedy).body
    answer = update(url, directory, weight_version="bad")
    assert (answer.status, answer.body["success"]) == (400, False)
    assert "old weights stay" in answer.body["message"] or "no weight of this model" in answer.body["message"]
    after = generate(url, greedy).body
    assert (after["output_ids"], scores(after)) == (before["output_ids"], scores(before))
    assert after["meta_info"]["weight_version"] == "default"


@pytest.mark.parametrize("content", [b"", b"\x10" + b"\0" * 40, None], ids=["empty", "garbage", "absent"])
def test_an_unreadable_checkpoint_is_refused(url: str, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "model.safetensors").write_bytes(content)
    answer = update(url, tmp_path)
    assert (answer.status, answer.body["success"]) == (400, False)
    assert str(tmp_path) in answer.body["message"]


def test_a_type_of_weights_is_one_that_training_writes() -> None:
    assert set(TYPES) == set(HF_DTYPES)


def test_an_index_may_not_leave_its_directory(url: str, tmp_path: Path, dir_b: Path) -> None:
    index = {"weight_map": {"lm_head.weight": f"../{dir_b.name}/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert update(url, tmp_path).status == 400


def test_tied_embeddings_may_come_once_or_twice_but_equal(tmp_path: Path) -> None:
    one, other = (save_model(tmp_path / str(seed), build_model(seed, tied=True)) for seed in (0, 1))
    model, shapes = load_model(one, "cpu")
    replace_weights(model, other, shapes)
    assert torch.equal(model.lm_head.weight, build_model(1, tied=True).lm_head.weight)
    tensors = load_file(one / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, one / "model.safetensors")
    replace_weights(model, one, shapes)
    assert weight_checksums(model) == weight_checksums(build_model(0, tied=True))
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, one / "model.safetensors")
    with pytest.raises(CheckpointError, match="tied"):
        replace_weights(model, one, shapes)
