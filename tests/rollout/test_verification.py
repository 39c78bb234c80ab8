"""What is concluded from the servers' answers after a publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from mcore_rl.errors import RolloutError, WeightSyncError
from mcore_rl.rollout.client import RolloutClient, call
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.training.publish import check_close, probe_of
from mcore_rl.weights.broadcast import ServerGroup, _broadcast
from mcore_rl.weights.disk import publish_directory
from mcore_rl.weights.transport import nobody, server_log_probs
from tests.rollout.proxy import body, damaged, proxy_beside
from tests.rollout.support import VOCAB

SEQUENCES = [[5, 3, 8], [1, 2]]


def test_what_is_compared_is_bounded_and_leaves_a_server_room_for_a_token() -> None:
    sequences = [[1], [1, 2], [1, 2, 3], list(range(9000)), [4, 5, 6]]
    assert [len(s) for s in probe_of(sequences, 3)] == [2, 2, 4096]
    assert probe_of(iter(sequences), 1) == [[1, 2]]
    assert [len(s) for s in probe_of(sequences, 3, room=64)] == [2, 2, 60], "a part of a short step"
    assert [len(s) for s in probe_of(sequences, 3, room=5)] == [2, 2], "and no sequence of one token"


def test_a_sequence_that_a_server_aborted_is_not_scored(url: str) -> None:
    """Or fewer numbers than tokens would be compared, on the one replica that holds the sequence."""

    def abort(reply: dict[str, Any]) -> None:
        reply["output_ids"] = []
        reply["meta_info"] |= {
            "finish_reason": {"type": "abort", "message": "Aborted"},
            "output_token_logprobs": [],
            "weight_versions": [{"version": "default", "start": 0, "end": 0}],
        }

    with proxy_beside(url, damaged(abort)) as between:
        clients = [RolloutClient(at) for at in (url, between.url)]
        scores, failed = server_log_probs(clients, SEQUENCES, "1-after")
    assert [len(score) for score in scores[url]] == [2, 1]
    assert "aborted a sequence" in failed[between.url]
    assert between.url not in scores


def test_a_server_that_refuses_a_version_is_lost_and_the_other_serves_it(fresh_url: str, dir_b: Path) -> None:
    """HTTP 200 and success false, of one of two: its disk may be full. Where all refuse, the run ends."""
    with safe_open(dir_b / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    no = body(lambda raw: b'{"success": false, "message": "scripted"}')
    with proxy_beside(fresh_url, no, no, path="/update_weights_from_disk") as seen:
        both = Fleet([fresh_url, seen.url], vocabulary=VOCAB, timeout=60.0)
        failed = publish_directory(both, dir_b, "7", shapes)
        assert list(failed) == [seen.url]
        assert "did not load version 7" in failed[seen.url]
        assert "scripted" in failed[seen.url]
        assert seen.calls[-1][0] == "/continue_generation", "it would stay paused"
        with pytest.raises(WeightSyncError, match=r"no server has loaded version 7:\n.*scripted"):
            publish_directory(Fleet([seen.url], vocabulary=VOCAB, timeout=60.0), dir_b, "7", shapes)
        assert not seen.script, "the fault did not fire"


def test_what_all_ranks_conclude_alike_is_said_by_one_before_it_closes_servers() -> None:
    with pytest.raises(WeightSyncError, match="log-probs differ") as caught:
        check_close("1", {"http://a:1": 1.0}, 0.0, 0.5)
    assert caught.value.shared
    assert nobody(Fleet(["http://a:1"], vocabulary=VOCAB), "1", {}).shared
    assert not RolloutError("of one rank").shared
    for broken in (float("nan"), -float("inf")):
        with pytest.raises(WeightSyncError):
            check_close("1", {"http://a:1": broken}, 0.0, 0.5)
    check_close("1", {"http://a:1": 0.5}, 0.0, 0.5)


def test_a_broadcast_that_fails_after_the_server_has_answered_costs_the_server_not_the_run(url: str) -> None:
    """One of its ranks has died: the first one has the weights, and we a broken group."""
    path = "/update_weights_from_distributed"
    group = ServerGroup(2, "gloo", 5.0)
    group.abandon()
    with (
        proxy_beside(url, body(lambda _: b'{"success": true, "message": ""}'), path=path) as server,
        pytest.raises(RolloutError, match=rf"{server.url}: a broadcast did not reach .*abandoned"),
    ):
        call(RolloutClient(server.url), lambda client: _broadcast(group, client, {}, torch.zeros(4)))
