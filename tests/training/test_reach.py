"""Servers that not every machine reaches."""

from __future__ import annotations

import pytest

from mcore_rl.errors import ConfigError
from mcore_rl.training.assemble_servers import check_reach


def test_servers_of_one_machine_are_refused_where_others_ask() -> None:
    with pytest.raises(
        ConfigError, match=r"servers that a run starts are .* a and b ask; start them yourself"
    ):
        check_reach([], ["a", "b", "a"])
    with pytest.raises(
        ConfigError, match=r"rollout.urls: http://127.0.0.1:1 is reached from one machine"
    ) as caught:
        check_reach(["http://c:1", "http://127.0.0.1:1"], ["a", "b"])
    assert caught.value.shared
    check_reach(["http://c:1", "http://d:1"], ["a", "b"])
    check_reach([], ["a", "a"])
    check_reach(["http://127.0.0.1:1"], ["a"])
