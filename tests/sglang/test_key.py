"""A key that SGLang asks for is on no command line, in no log, and not left on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import psutil
import pytest

from mcore_rl.rollout.client import RejectedError, RolloutClient, call
from mcore_rl.rollout.processes import LocalServer
from tests.rollout.support import http
from tests.sglang.conftest import KEY, KEY_ENV


def test_the_server_asks_for_its_key(dense_server: LocalServer) -> None:
    for wrong in (None, "wrong", KEY[:-1]):
        answer = http(dense_server.url, "/generate", {"input_ids": [1]}, key=wrong)
        assert (answer.status, answer.body) == (401, {"error": "Unauthorized"})
    with pytest.raises(RejectedError, match="HTTP 401; set api_key_env"):
        call(RolloutClient(dense_server.url), lambda client: client.model_info())
    client = RolloutClient(dense_server.url, api_key_env=KEY_ENV)
    assert "weight_version" in call(client, lambda opened: opened.model_info())


def test_the_key_is_nowhere_to_be_read(dense_server: LocalServer) -> None:
    assert dense_server.process is not None
    family = psutil.Process(dense_server.process.pid)
    for process in [family, *family.children(recursive=True)]:
        assert KEY not in " ".join(process.cmdline())
    assert KEY not in dense_server.log_file.read_text(errors="replace")
    left = Path(tempfile.gettempdir()).glob("mcore_rl_server_*/key.yaml")
    mine = [file for file in left if file.stat().st_mtime > family.create_time() - 60]
    assert not [file for file in mine if KEY in file.read_text()]
