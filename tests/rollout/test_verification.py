"""What is concluded from the servers' answers after a publish."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mcore_rl.errors import RolloutError, WeightSyncError
from mcore_rl.rollout.client import RolloutClient, call
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.training.publish import check_close, probe_of
from mcore_rl.weights.broadcast import ServerGroup, _broadcast
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
