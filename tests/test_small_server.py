"""A small server beside a run keeps answering: silent and slow clients, and more than it has room for."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mcore_rl import small_server
from mcore_rl.report.follow import serving
from mcore_rl.trackers.prometheus import Prometheus
from mcore_rl.trackers.services import TrackedRun

ROOM = 2


@pytest.fixture(params=["report", "prometheus"])
def port(request: pytest.FixtureRequest, monkeypatch, tmp_path: Path) -> Iterator[int]:
    """Of either server, with room for two."""
    monkeypatch.setattr(small_server.SmallHandler, "timeout", 0.5)
    monkeypatch.setattr(small_server, "MOST_CONNECTIONS", ROOM)
    with ExitStack() as stack:
        if request.param == "report":
            yield urlsplit(stack.enter_context(serving([tmp_path]))).port or 0
        else:
            service = Prometheus(TrackedRun(tmp_path, "0123456789ab", {}, 0, "127.0.0.1:0"))
            stack.callback(service.close, failed=False)
            yield service.port


def ask(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/metrics", headers={"Host": f"127.0.0.1:{port}"})
        return connection.getresponse().status
    finally:
        connection.close()


def answered(port: int, seconds: float = 10.0) -> bool:
    """Whether it answers again, within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            return ask(port) in (200, 404)
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
    return False


def test_silent_clients_are_left_and_others_are_answered(port: int) -> None:
    threads = threading.active_count()
    with ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 5)) for _ in range(ROOM + 10)
        ]
        time.sleep(0.2)
        assert threading.active_count() <= threads + ROOM, "no thread without room for it"
        with pytest.raises((OSError, http.client.HTTPException)):
            ask(port)
        for client in silent:
            assert client.recv(1) == b"", "ended by the deadline, or for want of room"
    assert answered(port)


def test_who_says_a_letter_now_and_then_is_ended_where_the_place_is_wanted(port: int, monkeypatch) -> None:
    monkeypatch.setattr(small_server, "WHOLE_SECONDS", 1.0)
    ended = threading.Event()

    def dribble(client: socket.socket) -> None:
        with client:
            try:
                while not ended.wait(0.1):
                    client.sendall(b"G")
            except OSError:
                return

    clients = [
        threading.Thread(target=dribble, args=(socket.create_connection(("127.0.0.1", port), 5),))
        for _ in range(ROOM)
    ]
    for client in clients:
        client.start()
    try:
        time.sleep(0.2)
        with pytest.raises((OSError, http.client.HTTPException)):
            ask(port)
        assert answered(port)
    finally:
        ended.set()
        for client in clients:
            client.join(10)
