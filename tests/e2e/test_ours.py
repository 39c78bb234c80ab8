"""A run touches what is its own: real commands beside other programs, other runs, full disks, other data."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from mcore_rl.__main__ import main
from mcore_rl.checkpoint import committed, find
from mcore_rl.directories import MARK, is_ours, read_mark
from mcore_rl.dumps.directory import read_step
from mcore_rl.log import read_metrics
from mcore_rl.talk.weights import model_of
from tests.e2e.conftest import ROOT
from tests.e2e.ranks import Ranks, Started

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.slow, pytest.mark.timeout(400)]


def sft(folder: Path, directory: Path, *flags: str) -> list[str]:
    """A supervised run of two steps, a checkpoint after each."""
    return _train(folder, directory, "sft_tiny", "--supervised.batch_size", "8", *_saved(flags), *flags)


def grpo(folder: Path, directory: Path, *flags: str, url: str = "") -> list[str]:
    """A run of two steps, a checkpoint after each, with the server at `url` or else an embedded one."""
    sizes = {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 4}
    rollout = [word for key, value in sizes.items() for word in (f"--rollout.{key}", str(value))]
    held_out = ("--data.eval", str(folder / "eval.jsonl"))
    server = ["--rollout.threads", "1"]
    if url:
        server = ["--rollout.urls", f'["{url}"]', "--model.path", f"{folder}/policy"]
        server += ["--model.random_init", "false"]
    return _train(folder, directory, "grpo_tiny", *held_out, *rollout, *server, *_saved(flags), *flags)


def _saved(flags: tuple[str, ...]) -> list[str]:
    defaults = {"--train.steps": "2", "--checkpoint.every": "1"}
    return [word for key, value in defaults.items() if key not in flags for word in (key, value)]


def _train(folder: Path, directory: Path, recipe: str, *flags: str) -> list[str]:
    base = {
        "--model.path": folder / "model",
        "--model.random_init": "true",
        "--data.train": folder / "train.jsonl",
        "--run.dir": directory,
        "--parallel.tensor": 1,
        "--optimizer.warmup_steps": 0,
        "--train.eval_every": 0,
    }
    own = [word for key, value in base.items() if key not in flags for word in (key, str(value))]
    return ["train", f"examples/{recipe}.toml", *own, *flags]


def plant(*files: Path) -> Callable[[], bool]:
    """Somebody else's files; whether they are still as they were."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("precious")
    return lambda: all(file.is_file() and file.read_text() == "precious" for file in files)


# --- what something else wrote --------------------------------------------------------------------------


def test_a_file_in_the_place_of_the_checkpoints_ends_the_run_before_it_samples(
    ranks, folder, tmp_path, server_url
):
    kept = plant(tmp_path / "saved")
    flags = grpo(folder, tmp_path / "run", "--checkpoint.dir", str(tmp_path / "saved"), url=server_url)
    done = ranks.run(*flags)
    assert done.returncode == 2, done.stderr
    assert f"ConfigError: {tmp_path}/saved cannot be a directory: a file" in done.stderr
    assert "Move that away, or set checkpoint.dir to another place" in done.stderr
    assert kept()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("file", ["metrics.jsonl", "weights/1/mine"])
def test_what_another_program_wrote_stops_the_command_and_stays(folder, tmp_path, file, capsys, monkeypatch):
    """The launcher refuses it; no rank starts."""
    monkeypatch.chdir(ROOT)
    kept = plant(tmp_path / "run" / file, tmp_path / "run" / "samples" / "mine.txt")
    assert main(grpo(folder, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert f" holds {file.removeprefix('weights/').removesuffix('/mine')}" in said
    assert "dir to another" in said
    assert kept()
    assert not (tmp_path / "run" / "events.jsonl").exists(), "not a word of it"


def test_what_another_program_wrote_among_the_checkpoints_stops_the_run_and_stays(ranks, folder, tmp_path):
    """The rank refuses it, which holds their lock; the launcher passes its exit code on."""
    kept = plant(
        tmp_path / "run" / "checkpoints" / "step_7" / "mine", tmp_path / "run" / "samples" / "mine.txt"
    )
    done = ranks.launch(*sft(folder, tmp_path / "run"))
    assert done.returncode == 2, done.stderr
    assert " holds step_7" in done.stderr
    assert "Traceback" not in done.stderr
    assert "dir to another" in done.stderr
    assert kept()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_goes_on_beside_files_that_are_not_in_its_way(ranks, folder, server_url, tmp_path):
    """One is where a tracker keeps its own: it raises, and the run has all of its steps."""
    names = ("notes.txt", "samples/mine.txt", "weights/mine/x", "checkpoints/mine/x", "publish/LATEST")
    kept = plant(*(tmp_path / "run" / name for name in (*names, "tensorboard")))
    short = ("--checkpoint.every", "0", "--train.steps", "1", "--run.trackers", '["tensorboard"]')
    for runs, more in enumerate(((), ("--overwrite",)), 1):
        done = ranks.run(*grpo(folder, tmp_path / "run", *short, *more, url=server_url))
        assert done.returncode == 0, done.stderr
        assert kept()
        assert done.stderr.count("mcore-rl: tensorboard gets no more of this run: ") == 1, done.stderr
        events = read_metrics(tmp_path / "run" / "events.jsonl")
        assert [event["name"] for event in events if event["kind"] == "tracker"] == ["tensorboard"] * runs
        assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1]
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        MARK,
        "mine.txt",
        "step_1.jsonl",
    ]
    assert is_ours(tmp_path / "run" / "weights" / "1", "weights")


def test_a_run_of_a_version_without_marks_goes_on(ranks, folder, tmp_path):
    directory = tmp_path / "run"
    assert ranks.run(*sft(folder, directory)).returncode == 0
    forget(directory)
    done = ranks.run(*sft(folder, directory, "--resume", "latest", "--train.steps", "3"))
    assert done.returncode == 0, done.stderr
    assert "only the ids of the training prompts could be compared" in done.stderr
    assert [line["step"] for line in read_metrics(directory / "metrics.jsonl")] == [1, 2, 3]
    assert is_ours(directory / "model", "model")
    again = ranks.run(*sft(folder, directory, "--resume", "latest", "--train.steps", "4"))
    assert again.returncode == 0, again.stderr
    assert "could be compared" not in again.stderr


def forget(directory: Path) -> None:
    """Make a run directory what an earlier version would have left."""
    from mcore_rl.checkpoint import manifest

    for found in [*directory.rglob(MARK), directory / ".mcore_rl.lock"]:
        found.unlink()
    for _, path in committed(directory / "checkpoints"):
        saved = find(path.parent, str(path))
        document = json.loads(json.dumps(saved.document))
        del document["run_id"]
        (train,) = map(Path, document["config"]["data"]["train"])
        document["config"]["data"]["train"] = str(train)
        ids = [json.loads(line)["id"] for line in train.read_text().splitlines()]
        position = {key: document["state"]["cursor"][key] for key in ("seed", "epoch", "position", "last")}
        digest = hashlib.sha256("\0".join(ids).encode()).hexdigest()[:16]
        document["state"]["cursor"] = {**position, "fingerprint": digest}
        files = [manifest.checksum(path, name) for name in saved.files]
        for name in (manifest.MANIFEST, manifest.COMMITTED):
            (path / name).unlink()
        manifest.commit(path, files, step=saved.step, run=document)


# --- another run ------------------------------------------------------------------------------------------


def test_a_resume_into_the_directory_of_another_run_is_refused(ranks, folder, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    assert ranks.run(*sft(folder, a, "--train.steps", "3", "--checkpoint.keep", "9")).returncode == 0
    assert ranks.run(*sft(folder, b, "--train.steps", "1")).returncode == 0
    before = {
        path: path.read_bytes() for path in a.rglob("*") if path.is_file() and path.name != "events.jsonl"
    }
    other = str(b / "checkpoints" / "step_1")
    done = ranks.run(*sft(folder, a, "--resume", other))
    assert done.returncode == 2, done.stderr
    assert f"{a} holds another run up to step 3 than {other} is of" in done.stderr
    now = {path: path.read_bytes() for path in a.rglob("*") if path.is_file() and path.name != "events.jsonl"}
    lock = {a / ".mcore_rl.lock", a / "checkpoints" / "LOCK"}
    assert {p: c for p, c in now.items() if p not in lock} == {
        p: c for p, c in before.items() if p not in lock
    }


def test_a_run_is_spared_unless_it_may_be_overwritten(ranks, folder, tmp_path, capsys, monkeypatch):
    """Checkpoints are kept by time where no steps are named; a run without them is spared as well."""
    plain = _train(folder, tmp_path, "sft_tiny", "--supervised.batch_size", "8", "--train.steps", "2")
    saved = lambda: [step for step, _ in committed(tmp_path / "checkpoints")]  # noqa: E731
    assert ranks.run(*plain).returncode == 0
    assert saved() == [2], "the last step alone, well within checkpoint.minutes"
    done = ranks.run(*plain, "--checkpoint.every", "0")
    assert done.returncode == 2
    assert "holds the checkpoints of a run up to step 2" in done.stderr
    assert "--overwrite" in done.stderr
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    with model_of(tmp_path) as found:
        assert found == tmp_path / "model", "what `mcore-rl chat RUN_DIR` loads"
    before = read_mark(tmp_path)["run"]
    done = ranks.run(*plain, "--train.steps", "3", "--checkpoint.every", "0", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert saved() == [], "those of the run that was there are gone"
    assert read_mark(tmp_path)["run"] != before
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    monkeypatch.chdir(ROOT)
    assert main(plain) == 2, "the launcher says it, and no rank starts"
    assert f"{tmp_path} holds a run up to step 3: give this run another run.dir" in capsys.readouterr().err
    assert ranks.run(*plain).returncode == 2
    often = ("--checkpoint.minutes", "1e-9", "--checkpoint.keep", "3", "--overwrite")
    assert ranks.run(*plain, *often).returncode == 0
    assert saved() == [1, 2]


# --- two runs at once -------------------------------------------------------------------------------------


def test_the_second_run_in_a_directory_is_refused_and_the_first_unharmed(
    ranks, folder, tmp_path, capsys, monkeypatch
):
    """The first keeps no checkpoints, so that their lock is not what saves it from a second that does."""
    monkeypatch.chdir(ROOT)
    directory = tmp_path / "run"
    arguments = sft(folder, directory, "--checkpoint.every", "0", "--train.steps", "100000")
    with started(ranks, tmp_path / "log", *arguments) as first:
        wait_for(lambda: b"step 2/" in (tmp_path / "log").read_bytes(), first)
        events = (directory / "events.jsonl").read_bytes()
        for every in ("0", "1"):
            assert main([*arguments, "--run.seed", "2", "--checkpoint.every", every]) == 75
            said = capsys.readouterr().err
            assert f"{directory} is in use by process " in said
            assert "set run.dir to another directory" in said
            assert (directory / "events.jsonl").read_bytes() == events, "not a word of it"
        assert main(["report", str(directory)]) == 0
        assert (directory / "report.html").exists()
        assert first.poll() is None
        first.send_signal(signal.SIGTERM)
        first.wait(timeout=60)
    assert "no step of this run is saved: checkpoint.every is 0" in (tmp_path / "log").read_text()
    assert read_metrics(directory / "events.jsonl")[-1]["kind"] == "end"
    steps = [line["step"] for line in read_metrics(directory / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)), "each once, in order"


def test_two_runs_with_one_place_for_weights(ranks, folder, server_url, tmp_path, capsys, monkeypatch):
    """A run directory for each; a killed run blocks nobody."""
    monkeypatch.chdir(ROOT)
    publish = ["--publish.dir", str(tmp_path / "publish")]
    arguments = grpo(folder, tmp_path / "a", *publish, "--train.steps", "100000", "--checkpoint.every", "0")
    with started(ranks, tmp_path / "log", *arguments) as first:
        wait_for(lambda: b"step 1/" in (tmp_path / "log").read_bytes(), first)
        assert main(grpo(folder, tmp_path / "b", *publish)) == 75
        said = capsys.readouterr().err
        assert f"{tmp_path / 'publish'} is in use by process " in said
        assert "set publish.dir to another directory" in said
        assert first.poll() is None
        family = psutil.Process(first.pid).children(recursive=True)
        first.kill()
        assert psutil.wait_procs(family, timeout=60)[1] == [], "the kernel ends its rank, and its server"
    third = ranks.run(*grpo(folder, tmp_path / "b", *publish, "--train.steps", "1", url=server_url))
    assert third.returncode == 0, third.stderr


@contextmanager
def started(ranks: Ranks, log: Path, *arguments: str) -> Iterator[Started]:
    """The launcher of the command, which writes to `log` and is killed on the way out."""
    process = ranks.start(*arguments, log=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], process: Started, seconds: float = 200.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < end
        time.sleep(0.1)


# --- full disks, open doors, other data -------------------------------------------------------------------


@pytest.mark.parametrize(("dump", "file"), [(0, "samples/step_2.jsonl"), (1, "rollouts/step_2.npz")])
def test_a_disk_that_fills_up_in_mid_run_is_named_and_the_run_goes_on_with_room(
    ranks, folder, server_url, tmp_path, small_disk, dump, file
):
    """The rewards of step 2 take the last byte, or leave a page, which the samples take before the dump.

    5 rewards of the evaluation and 16 of step 1 come before.
    """
    disk, safe = small_disk("size=4m"), tmp_path / "safe"
    safe.mkdir()
    elsewhere = ["--checkpoint.dir", str(safe / "checkpoints"), "--publish.dir", str(safe / "weights")]
    reward = ["--reward.function", "tests.e2e.rewards:fill", "--reward.workers", "1"]
    places = {"TEST_DISK": str(disk), "TEST_WITNESS": str(safe / "filled"), "TEST_SPARE": str(4096 * dump)}
    arguments = grpo(folder, disk / "run", *elsewhere, *reward, "--rollout.dump", str(dump), url=server_url)
    done = ranks.run(*arguments, **places)
    assert done.returncode == 75, done.stderr
    assert (safe / "filled").exists(), "the fault fired"
    assert "mcore-rl: StorageError: " in done.stderr
    assert f"{file}: No space left on device (" in done.stderr
    assert done.stderr.count("mcore-rl: --resume goes on after step 1") == 1
    assert "bytes are free there" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((disk / "run").rglob("*.partial"))
    (disk / "filler").unlink()
    again = ranks.run(*arguments, "--resume", "latest", **places)
    assert again.returncode == 0, again.stderr
    assert [line["step"] for line in read_metrics(disk / "run" / "metrics.jsonl")] == [0, 1, 2]
    kept = {step: read_step(disk / "run" / "rollouts", step).step for step in range(1, 3) if dump}
    assert kept == ({1: 1, 2: 2} if dump else {})


def test_results_that_everybody_may_change_are_warned_of_once(ranks, folder, tmp_path):
    done = ranks.launch(*sft(folder, tmp_path / "run"), umask=0)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: the umask is 000: everybody on this machine may change") == 1
    assert "chmod -R o-w" in done.stderr
    events = read_metrics(tmp_path / "run" / "events.jsonl")
    assert [event["umask"] for event in events if event["kind"] == "world_writable"] == ["000"]
    quiet = ranks.run(*sft(folder, tmp_path / "other"))
    assert "warning" not in quiet.stderr
    opened = ranks.run(*sft(folder, tmp_path / "run", "--resume", "--train.steps", "3"))
    assert f"everybody may write to {tmp_path / 'run'}" in opened.stderr


def test_other_problems_under_the_same_ids_are_refused(ranks, folder, tmp_path):
    data = tmp_path / "train.jsonl"
    lines = (folder / "train.jsonl").read_text().splitlines()
    data.write_text("\n".join(lines) + "\n")
    arguments = sft(folder, tmp_path / "run", "--data.train", str(data))
    assert ranks.run(*arguments).returncode == 0
    first = json.loads(lines[0])
    data.write_text("\n".join([json.dumps(first | {"label": first["label"] + "1"}), *lines[1:]]) + "\n")
    settings = (tmp_path / "run" / "resolved.toml").read_bytes()
    refused = ranks.run(*arguments, "--resume", "latest", "--run.seed", "0", "--optimizer.lr", "0.5")
    assert refused.returncode == 2, refused.stderr
    assert "as many, 40, but others or with other values: the file was edited or replaced" in refused.stderr
    assert (tmp_path / "run" / "resolved.toml").read_bytes() == settings, "a refused run changes no settings"
    data.write_text("\n".join([*lines, json.dumps(first | {"id": "new"})]) + "\n")
    assert "1 were appended to its 40" in ranks.run(*arguments, "--resume", "latest").stderr


def test_what_ran_ahead_to_its_end_goes_on_in_step(ranks, folder, server_url, tmp_path):
    correct = ["--algorithm.params.correction", "tis-token", "--checkpoint.keep", "9"]
    ahead = grpo(folder, tmp_path / "run", "--rollout.max_staleness", "1", *correct, url=server_url)
    done = ranks.run(*ahead)
    assert done.returncode == 0, done.stderr
    document = find(tmp_path / "run" / "checkpoints", "latest").document
    assert document["state"]["ahead"]["groups"] == []
    more = ["--train.steps", "3", *correct]
    in_flight = ranks.run(*grpo(folder, tmp_path / "run", "--resume", "previous", *more, url=server_url))
    assert in_flight.returncode == 2, "negative control: one that holds groups is refused"
    assert "groups of samples in flight, and their prompts would never be trained" in in_flight.stderr
    in_step = ranks.run(*grpo(folder, tmp_path / "run", "--resume", "latest", *more, url=server_url))
    assert in_step.returncode == 0, in_step.stderr
