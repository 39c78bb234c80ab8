"""`mcore-rl report --follow`: the page of a run that goes on, on this machine alone."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mcore_rl.__main__ import main
from mcore_rl.report.follow import serving
from tests.sources import ROOT
from tests.test_report import step, write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", [step(n) for n in range(1, 4)])


@pytest.fixture
def address(run_dir: Path) -> Iterator[str]:
    with serving([run_dir]) as address:
        yield address


def ask(address: str, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    try:
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def test_what_is_new_is_shown_and_has_another_version(run_dir: Path, address: str) -> None:
    status, page = ask(address)
    assert status == 200
    (version,) = re.findall('<html data-version="([^"]+)"', page)
    assert ask(address, "/version") == (200, version)
    assert "connect-src 'self'" in page
    assert "<dd>3</dd>" in page
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(4)) + "\n")
    assert ask(address, "/version")[1] != version
    assert "<dd>4</dd>" in ask(address)[1]
    assert not (run_dir / "report.html").exists(), "what is served is not written"


def test_before_the_first_step_it_says_so_and_then_shows_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with serving([run]) as address:
        status, page = ask(address)
        assert (status, "There is no report yet" in page, "fetch(" in page) == (200, True, True)
        (run / "metrics.jsonl").write_text(json.dumps(step(1)) + "\n")
        assert "<h2>Learning</h2>" in ask(address)[1]


@pytest.mark.parametrize(
    "path",
    [
        "/resolved.toml",
        "/../run/resolved.toml",
        "//etc/passwd",
        "/%2e%2e/metrics.jsonl",
        "/?",
        "/version/",
        "*",
    ],
)
def test_nothing_of_a_request_is_a_path(address: str, path: str) -> None:
    status, page = ask(address, path)
    assert status == 404
    assert "tolerance_max" not in page


def test_other_names_and_other_methods_get_nothing(address: str) -> None:
    port = urlsplit(address).port
    assert ask(address, Host=f"localhost:{port}")[0] == 200
    assert ask(address, method="HEAD") == (200, "")
    for foreign in ("evil.example", f"evil.example:{port}", ""):
        assert ask(address, Host=foreign)[0] == 403
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask(address, method=method)[0] == 501


def test_it_listens_on_this_machine_alone(address: str) -> None:
    assert urlsplit(address).hostname == "127.0.0.1"
    with socket.create_connection(("127.0.0.1", urlsplit(address).port), timeout=5) as client:
        assert client.getpeername()[0] == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):  # another address of this machine
        socket.create_connection(("127.0.0.2", urlsplit(address).port), timeout=5)


def test_what_cannot_be_served_is_said(run_dir: Path, tmp_path: Path, capsys, address: str) -> None:
    taken = str(urlsplit(address).port)
    for command, why in {
        (str(run_dir), "--port", taken): f"--port {taken}: Address already in use; give another",
        (str(run_dir), "--port", "70000"): "from 1 to 65535",
        (str(tmp_path / "none"),): "no such directory",
    }.items():
        assert main(["report", "--follow", *command]) == 2
        assert why in capsys.readouterr().err


def test_the_command_prints_its_address_and_ends_when_asked(run_dir: Path) -> None:
    command = [sys.executable, "-m", "mcore_rl", "report", "--follow", str(run_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            (address,) = re.findall(r"^(http://127\.0\.0\.1:\d+/): open it in a browser", line)
            assert ask(address)[0] == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
