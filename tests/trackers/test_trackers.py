"""A run's metrics reach each service, by its real package and without a network."""

from __future__ import annotations

import json
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, get_args

import pytest

from mcore_rl.config.sections import TrackerName
from mcore_rl.errors import ConfigError
from mcore_rl.log import append_event
from mcore_rl.trackers import sender
from mcore_rl.trackers.prometheus import Prometheus
from mcore_rl.trackers.sender import numbers_of, tracked
from mcore_rl.trackers.services import SERVICES, TrackedRun, check_trackers
from tests.sources import ROOT

STEPS = {1: 0.25, 2: 0.5, 3: 0.75}

OPEN = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
from importlib import import_module
from pathlib import Path
from mcore_rl.trackers.sender import tracked
from mcore_rl.trackers.services import TrackedRun
name, directory = sys.argv[1], Path(sys.argv[2])
"""
SEND = """
run = TrackedRun(directory, "0123456789ab", {"rollout": {"temperature": 0.7, "urls": []}}, begun)
with tracked([name], run, lambda *why: sys.exit(str(why))) as send:
    for step, value in values.items():
        send(int(step), {"reward/mean": value, "step/words": "text"})
"""


PROCESSES = f"""{OPEN}
import_module({{"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow.tracking"}}.get(name, name))
assert len(os.listdir("/proc/self/task")) == 1, "a thread would not be in what is forked"
for begun, values in json.loads(sys.argv[3]):  # a process for each, which need not import it all again
    if os.fork() == 0:
        break
    if code := os.waitstatus_to_exitcode(os.wait()[1]):
        os._exit(code)
else:
    os._exit(0)
{SEND}"""


def wandb_records(file: Path) -> Iterator[bytes]:
    """The records of an offline run: LevelDB's log, of which a short one has whole records in one block."""
    data, at = file.read_bytes(), 7  # behind the file's own header
    while at + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        assert kind == 1, "a record in parts"
        yield data[at + 7 : at + 7 + length]
        at += 7 + length


def read_wandb(directory: Path) -> dict[int, float]:
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for file in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
        for data in wandb_records(file):
            items = Record.FromString(data).history.item
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            if "reward/mean" in values:
                found[int(values["step"])] = values["reward/mean"]
    return found


def read_tensorboard(directory: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tensorboard" / "01234567")).Reload()
    return {event.step: event.value for event in events.Scalars("reward/mean")}


def read_trackio(directory: Path) -> dict[int, float]:
    (database,) = directory.glob("trackio/*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics ORDER BY rowid").fetchall()
    connection.close()
    return {step: json.loads(text)["reward/mean"] for step, text in rows}


def read_mlflow(directory: Path) -> dict[int, float]:
    (file,) = directory.glob("mlruns/*/*/metrics/reward/mean")
    lines = (line.split() for line in file.read_text().splitlines())
    return {int(step): float(value) for _, value, step in lines}


READ: dict[str, Callable[[Path], dict[int, float]]] = {
    "wandb": read_wandb,
    "tensorboard": read_tensorboard,
    "trackio": read_trackio,
    "mlflow": read_mlflow,
}


def send(name: str, directory: Path, *runs: tuple[int, dict[int, float]]) -> None:
    """Each is a process that continues after a step, and has values of some steps."""
    store = {"MLFLOW_TRACKING_URI": (directory / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    offline = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(directory / "trackio"), "HOME": str(directory)}
    path = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    path |= {"JE_ARROW_MALLOC_CONF": "background_thread:false"}  # of pyarrow, which mlflow imports
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES, name, str(directory), json.dumps(runs)],
        env=store | offline | path,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr


TORCH = {"tensorboard": pytest.mark.slow}
"""which it imports"""


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=TORCH.get(name, ())) for name in READ])
def test_steps_arrive_and_a_resumed_run_goes_on_in_the_same_curve(name: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    send(name, run, (0, {1: 0.25, 2: 9.0}), (1, {2: 0.5, 3: 0.75}))  # from the checkpoint of step 1
    assert READ[name](run) == pytest.approx(STEPS)


def test_every_service_has_a_name_and_is_read_above() -> None:
    assert set(SERVICES) == set(get_args(TrackerName)) == set(READ)


# --- a service that fails ---------------------------------------------------------------------------------


HANGS = f"""{OPEN}
from mcore_rl.trackers import sender
sender.CLOSE_SECONDS = 1.0
begun, values = 0, json.loads(sys.argv[3])
{SEND.replace("sys.exit(str(why))", "print(*why, flush=True)")}
    sys.stdin.readline()
"""


@pytest.mark.slow
def test_a_server_that_never_answers_is_left_behind_and_the_process_ends(tmp_path: Path) -> None:
    """It has taken the connection of the real package, and says nothing."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent.settimeout(60)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            [sys.executable, "-c", HANGS, "mlflow", str(tmp_path), json.dumps(STEPS)],
            env={**environment, "HOME": str(tmp_path), "MLFLOW_TRACKING_URI": url}, cwd=tmp_path,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            try:
                asked, _ = silent.accept()
                with asked:
                    said, errors = process.communicate("\n", timeout=20)
            finally:
                process.kill()
    assert process.returncode == 0, errors
    assert said == "mlflow has not taken everything within 1 s\n"
    assert errors.count("mcore-rl: mlflow gets no more of this run: has not taken everything") == 1


class Broken:
    def __init__(self, run: TrackedRun) -> None: ...

    def log(self, step: int, metrics) -> None:
        raise ConnectionError(f"away\nat step {step}")

    def close(self, *, failed: bool) -> None: ...


class Hanging(Broken):
    ends = threading.Event()

    def log(self, step: int, metrics) -> None:
        self.ends.wait(60)


class Recording(Broken):
    seen: ClassVar[list] = []

    def log(self, step: int, metrics) -> None:
        self.seen.append((step, metrics))

    def close(self, *, failed: bool) -> None:
        self.seen.append(failed)


def run_in(directory: Path) -> TrackedRun:
    return TrackedRun(directory, "0123456789ab", {}, 0)


def test_one_that_raises_is_said_once_and_the_others_go_on(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(sender, "SERVICES", {"wandb": Broken, "trackio": Recording})
    Recording.seen = []
    notes: list[tuple[str, str]] = []
    with tracked(["wandb", "trackio"], run_in(tmp_path), lambda *note: notes.append(note)) as send:
        send(1, {"loss": 1.0})
        send(2, {"loss": 2.0})
    assert notes == [("wandb", "ConnectionError: away")]
    assert Recording.seen == [(1, {"loss": 1.0}), (2, {"loss": 2.0}), False]
    assert capsys.readouterr().err == "mcore-rl: wandb gets no more of this run: ConnectionError: away\n"


def test_one_that_hangs_is_left_behind(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sender, "SERVICES", {"mlflow": Hanging})
    monkeypatch.setattr(sender, "CLOSE_SECONDS", 0.2)
    notes: list[tuple[str, str]] = []
    with tracked(["mlflow"], run_in(tmp_path), lambda *note: notes.append(note)) as send:
        send(1, {"loss": 1.0})
    Hanging.ends.set()
    assert notes == [("mlflow", "has not taken everything within 0.2 s")]


def test_a_run_that_fails_is_told_as_failed(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sender, "SERVICES", {"wandb": Recording})
    Recording.seen = []
    with pytest.raises(KeyError), tracked(["wandb"], run_in(tmp_path), lambda *_: None):
        raise KeyError
    assert Recording.seen == [True]


def test_only_finite_numbers_are_sent() -> None:
    assert numbers_of({"a": 1, "b": float("nan"), "c": "text", "d": True, "e": 10**400}) == {
        "a": 1.0,
        "d": 1.0,
    }


def test_what_is_missing_is_said_with_its_remedy(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        check_trackers(("mlflow",))
    monkeypatch.setattr("mcore_rl.trackers.services.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb not installed here; pip install 'mcore-rl\[wandb\]'"):
        check_trackers(("wandb",))


def test_a_directory_of_the_name_is_no_package(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="wandb not installed here"):
        check_trackers(("wandb",))


def test_the_project_of_an_odd_directory_is_one_that_wandb_takes(tmp_path: Path) -> None:
    from wandb.sdk.wandb_settings import Settings

    for odd in ("100%: a#b?", "\\", "x" * 200):
        project = run_in(tmp_path / odd / "mine").project
        assert Settings(project=project).project == project


# --- a note that cannot be kept ---------------------------------------------------------------------------


def test_a_note_on_a_full_disk_is_said_and_no_traceback(monkeypatch, tmp_path: Path, capsys) -> None:
    """/dev/full takes no byte; the service hangs and raises, so that both threads note."""
    monkeypatch.setattr(sender, "SERVICES", {"wandb": Broken, "mlflow": Hanging})
    monkeypatch.setattr(sender, "CLOSE_SECONDS", 0.2)
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    Hanging.ends.clear()
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    note = lambda name, why: append_event(tmp_path, "tracker", name=name, why=why)  # noqa: E731
    with tracked(["wandb", "mlflow"], run_in(tmp_path), note) as send:
        send(1, {"loss": 1.0})
    Hanging.ends.set()
    said = capsys.readouterr().err
    assert said.count("it could not be noted:") == 2
    assert said.count("events.jsonl") == 2
    assert "Traceback" not in said
    assert raised == []


# --- Prometheus -------------------------------------------------------------------------------------------


def test_prometheus_reads_the_newest_step_by_its_own_parser(tmp_path: Path) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = TrackedRun(tmp_path / 'a "name"\\', "0123456789ab", {}, 0, f"127.0.0.1:{port}")
    notes: list[tuple[str, str]] = []
    with tracked(["prometheus"], run, lambda *note: notes.append(note)) as send:
        for step in (1, 2):
            send(step, {"reward/mean": step / 4, "eval/a-b/pass@4": 1e-7, "words": "text"})
        deadline, found = time.monotonic() + 10, {}
        while found.get("mcore_rl_step") != 2 and time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                families = list(parser.text_string_to_metric_families(answer.read().decode()))
                found = {s.name: s.value for family in families for s in family.samples}
                labels = [s.labels for family in families for s in family.samples]
        assert found == {"mcore_rl_step": 2, "mcore_rl_reward_mean": 0.5, "mcore_rl_eval_a_b_pass_4": 1e-7}
        assert labels[0] == {"run": 'a "name"\\', "id": "01234567"}
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics/../etc")
    assert notes == []
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")


def test_prometheus_listens_at_an_address_of_ipv6_too(tmp_path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as free:
            free.bind(("::1", 0))
            port = free.getsockname()[1]
    except OSError as error:
        pytest.skip(f"this machine has no loopback of IPv6: {error}")
    service = Prometheus(TrackedRun(tmp_path, "0123456789ab", {}, 0, f"[::1]:{port}"))
    try:
        service.log(1, {"loss": 0.5})
        with urllib.request.urlopen(f"http://[::1]:{port}/metrics", timeout=10) as answer:
            assert b"mcore_rl_loss" in answer.read()
    finally:
        service.close(failed=False)


def test_a_port_that_is_taken_costs_the_run_its_endpoint_alone(tmp_path: Path, capsys) -> None:
    notes: list[tuple[str, str]] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = TrackedRun(tmp_path, "0123456789ab", {}, 0, f"127.0.0.1:{taken.getsockname()[1]}")
        with tracked(["prometheus"], run, lambda *note: notes.append(note)) as send:
            send(1, {"loss": 1.0})
    ((name, why),) = notes
    assert name == "prometheus"
    assert "Address already in use" in why
    assert "prometheus gets no more of this run" in capsys.readouterr().err
