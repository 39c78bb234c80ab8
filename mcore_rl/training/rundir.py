"""The directories of a run: held by one run at a time, marked as ours, and named after the run in them.

RUN_DIR/.mcore_rl has the id of the run that wrote the directory, and every checkpoint has it in its document.
So a resume knows whether what it finds is its own history or that of another run. Megatron is not imported
here but for a directory of an earlier version: the first rank asks before it asks the machine.
"""

from __future__ import annotations

import os
import re
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mcore_rl.config import Config, to_toml
from mcore_rl.directories import (
    MARK,
    VERSION,
    Kind,
    is_free,
    is_ours,
    kind_of,
    locked,
    mark,
    read_mark,
    storage_error,
    write_whole,
)
from mcore_rl.dumps.directory import FILES, NAME
from mcore_rl.errors import ConfigError, McoreRLError
from mcore_rl.log import EVENTS, METRICS, append_event, read_metrics
from mcore_rl.terminal import quoted
from mcore_rl.training.faults.exits import say

if TYPE_CHECKING:
    from mcore_rl.checkpoint import Saved

RESOLVED = "resolved.toml"
OVERWRITE = "overwrite"
"""in the place of a checkpoint to continue from: begin, and the run that is in the directory goes"""
RUN_LOCK = ".mcore_rl.lock"
"""besides LOCK, which is that of the checkpoints: they may lie in the run directory itself"""
WEIGHTS_LOCK = ".mcore_rl.weights.lock"
"""lock of the directory that weights are published to, which may be a run directory too"""
_REPLACED = (METRICS, EVENTS, RESOLVED, "server.log")
"""files of a run directory that a run cuts, replaces or appends to"""
_SAMPLES = re.compile(r"step_\d+\.([\w.-]+\.)?jsonl")
SAMPLES = ("samples", "eval")
"""directories of a run with samples for people: of training, and of evaluations"""
_INDEX = "model.safetensors.index.json"
_RUN_REMEDY = "set run.dir to another directory"
_WEIGHTS_REMEDY = "set publish.dir to another directory"
_WHOLE = ("weights", "model", "checkpoint")
"""kinds of directories that are removed with all they hold"""
_held: set[Path] = set()
"""run directories that this process holds"""


@dataclass(frozen=True)
class Identity:
    """Which run it is."""

    run: str
    """an id of its own"""
    source: str = ""
    """the checkpoint of another run that it began with"""


def root_of(config: Config) -> Path:
    """Where the run's checkpoints are."""
    return config.checkpoint.dir or config.run.dir / "checkpoints"


def published_to(config: Config) -> Path:
    """Where the versions of the weights are that servers read."""
    return config.publish.dir or config.run.dir / "weights"


# --- held and ours --------------------------------------------------------------------------------------


@contextmanager
def held(config: Config, *, publishes: bool, dumps: Kind = "rollouts") -> Iterator[None]:
    """Hold the run's directories, for its first rank, before anything is written to them.

    The directory of the checkpoints has a lock of its own, which is taken when it is opened.

    Args:
        publishes: the run writes weights for servers.
        dumps: the kind of RUN_DIR/rollouts that it writes.

    Raises:
        ConfigError: they hold what mcore_rl did not write, or what the run reads and would remove, or are no
            directories; nothing was touched.
        StorageError: another run holds them, or they cannot be read or written.
    """
    run_dir, weights = config.run.dir, published_to(config)
    with ExitStack() as stack:
        try:
            if not (run_dir / RUN_LOCK).exists():  # else it may be that of a run which is writing
                _check_ours(config, publishes=publishes, dumps=dumps)
            stack.enter_context(locked(run_dir, _RUN_REMEDY, name=RUN_LOCK))
            if publishes:
                stack.enter_context(locked(weights, _WEIGHTS_REMEDY, name=WEIGHTS_LOCK))
            _check_ours(config, publishes=publishes, dumps=dumps)
            _claim(config)
        except OSError as error:
            raise storage_error(run_dir, error, remedy=_RUN_REMEDY) from error
        _held.add(_real(run_dir))
        stack.callback(_held.discard, _real(run_dir))
        yield


@contextmanager
def held_once(config: Config, *, publishes: bool) -> Iterator[None]:
    """Do what `held` does, unless this process holds the run directory already, as one of a launcher does."""
    if _real(config.run.dir) in _held:
        yield
        return
    with held(config, publishes=publishes):
        yield


def _real(directory: Path) -> Path:
    """The directory itself: run.dir may be a link to it, and only what is removed may not."""
    return Path(os.path.realpath(directory))


def _is_marked(run_dir: Path) -> bool:
    return is_ours(_real(run_dir), "run")


def _check_ours(config: Config, *, publishes: bool, dumps: Kind) -> None:
    """Raises ConfigError for what a run would replace and mcore_rl did not write, or the run reads itself."""
    _check_kinds(config)
    _check_read(config, publishes=publishes)
    if _is_of_an_earlier_version(config):
        return  # to be marked
    run_dir, weights = config.run.dir, published_to(config)
    found = [] if _is_marked(run_dir) else [name for name in _REPLACED if os.path.lexists(run_dir / name)]
    found += [name for name in SAMPLES if _holds_foreign(run_dir / name, "samples", _SAMPLES)]
    found += [NAME] if _holds_foreign(run_dir / NAME, dumps, FILES) else []
    if config.run.kind != "rl" and not is_free(run_dir / "model", "model"):
        found.append("model")
    _refuse(run_dir, found, _RUN_REMEDY)
    if publishes:
        foreign = [path.name for path in _versions(weights) if not is_free(path, "weights")]
        _refuse(weights, foreign, _WEIGHTS_REMEDY)


def _check_kinds(config: Config) -> None:
    """Raises ConfigError for a run in what is another kind of directory, or in one that goes as a whole."""
    if kind_of(config.run.dir) not in (None, "run"):
        raise ConfigError(
            f"{config.run.dir} is marked as of the kind {quoted(kind_of(config.run.dir))} ({MARK}), and no "
            f"run directory: who wrote it may remove it. {_RUN_REMEDY.capitalize()}"
        )
    for place in (config.run.dir, root_of(config), published_to(config)):
        for parent in (_real(place), *_real(place).parents):
            if kind_of(parent) in _WHOLE:
                raise ConfigError(
                    f"{place}: {parent} is marked as of the kind {kind_of(parent)!r} ({MARK}), which is "
                    "removed with all it holds. Set run.dir, checkpoint.dir or publish.dir elsewhere"
                )


def _check_read(config: Config, *, publishes: bool) -> None:
    """Raises ConfigError for what the run reads where it would remove it: neither it nor a resume had it."""
    run_dir, weights = _real(config.run.dir), _real(published_to(config))
    for key, path in _models(config).items():
        for place in (_real(path), *_real(path).parents):
            version = publishes and place.parent == weights and VERSION.fullmatch(place.name)
            if version or (config.run.kind != "rl" and place == run_dir / "model"):
                raise _is_read(key, path, f"{place}, which this run replaces with weights of its own")
    for key, path in _rows(config).items():
        for directory in (run_dir / name for name in SAMPLES):
            inside = _real(path) == directory or _real(path).parent == directory
            if inside and (
                _SAMPLES.fullmatch(path.name) or not path.is_file()
            ):  # a folder, a glob, PATH@[0:9]
                raise _is_read(key, path, f"{directory}, whose files of steps go when a run begins")


def _is_read(key: str, path: Path, place: str) -> ConfigError:
    return ConfigError(f"{key}: {path} lies in {place}. Copy it elsewhere, or {_RUN_REMEDY}")


def _models(config: Config) -> dict[str, Path]:
    """Key -> the directory of a model, or of adapters, that the run starts from or asks."""
    found = {
        "model.path": config.model.path,
        "reward.model": config.reward.model,
        "critic.path": config.critic.path,
        "lora.path": config.lora.path,
        **{f"distill.teachers.{name}": path for name, path in config.distill.teachers.items()},
    }
    return {key: path for key, path in found.items() if path is not None}


def _rows(config: Config) -> dict[str, Path]:
    """Key -> rows that the run reads."""
    found = {"data.train": list(config.data.train)}
    found |= {"data.eval": [config.data.eval], "data.validation": [config.data.validation]}
    found |= {f"eval.sets.{name}.path": [one.path] for name, one in config.eval.sets.items()}
    return {key: path for key, paths in found.items() for path in paths if path is not None}


def _holds_foreign(directory: Path, kind: Kind, files: re.Pattern[str]) -> bool:
    """Whether it is no directory of this kind, and has `files` that one of this kind would replace."""
    if is_ours(directory, kind) or not os.path.lexists(directory):
        return False
    if directory.is_symlink() or not directory.is_dir() or kind_of(directory) is not None:
        return not is_ours(directory, kind)  # a run may have put it there since the first look
    return any(files.fullmatch(path.name) for path in directory.iterdir())


def _refuse(directory: Path, names: Sequence[str], remedy: str) -> None:
    if names:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ConfigError(
            f"{directory} holds {shown} without the mark of mcore_rl for it ({MARK}): something else wrote "
            "it, another run, or one of an earlier version that kept no checkpoints. Nothing was touched. "
            f"Move it away, or {remedy}"
        )


def _versions(weights: Path) -> list[Path]:
    if not weights.is_dir():
        return []
    return sorted(path for path in weights.iterdir() if VERSION.fullmatch(path.name))


def _is_of_an_earlier_version(config: Config) -> bool:
    """Whether checkpoints say that the run directory is ours: earlier versions marked nothing."""
    if _is_marked(config.run.dir):
        return False
    return any(_belongs(config, saved) for saved in _intact(root_of(config)))


def _intact(root: Path) -> Iterator[Saved]:
    if not root.is_dir():
        return
    from mcore_rl.checkpoint import committed, manifest

    for _, path in reversed(committed(root)):
        with suppress(McoreRLError):  # damaged, which a resume says
            yield manifest.read(path)


def _belongs(config: Config, saved: Saved) -> bool:
    """Whether a checkpoint was written by a run in this run directory: it lies there, or says so."""
    run_dir = config.run.dir.resolve()
    if saved.path.resolve().is_relative_to(run_dir):
        return True
    return Path(saved.document.get("config", {}).get("run", {}).get("dir", "/")).resolve() == run_dir


def _claim(config: Config) -> None:
    """Mark the run directory; of an earlier version's, all that this one would replace. Raises OSError."""
    run_dir = config.run.dir
    if _is_marked(run_dir):
        return
    if _is_of_an_earlier_version(config):
        whole: list[tuple[Path, Kind]] = [(path, "weights") for path in _versions(published_to(config))]
        whole.append((run_dir / "model", "model"))
        whole = [(path, kind) for path, kind in whole if (path / _INDEX).is_file()]
        for path, kind in [*whole, *((run_dir / name, "samples") for name in SAMPLES)]:
            if path.is_dir() and not path.is_symlink() and kind_of(path) is None:
                mark(path, kind)
    mark(run_dir, "run")


def warn_of_others(config: Config) -> None:
    """Say, and write down, that everybody on this machine may change what the run writes."""
    before = os.umask(0o077)
    os.umask(before)
    places = {config.run.dir, root_of(config), published_to(config)}
    writable = sorted(str(path) for path in places if path.is_dir() and _is_open_to_all(path))
    if not before & stat.S_IWOTH:
        why = f"the umask is {before:03o}"
    elif writable:
        why = f"everybody may write to {', '.join(writable)}"
    else:
        return
    say(
        f"warning: {why}: everybody on this machine may change the results in {config.run.dir}. Set umask "
        f"022 before the run, and `chmod -R o-w {' '.join(writable) or config.run.dir}`"
    )
    append_event(config.run.dir, "world_writable", umask=f"{before:03o}", directories=", ".join(writable))


def _is_open_to_all(directory: Path) -> bool:
    """Whether others may write to it; in one like /tmp only to files of their own."""
    mode = directory.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


# --- which run it is --------------------------------------------------------------------------------------


def check_history(config: Config, saved: Saved, known: Sequence[tuple[int, Path]]) -> None:
    """Raises ConfigError where the run's directories hold another run than that of `saved`.

    Args:
        known: committed checkpoints of the run's own directory.

    A checkpoint of another run is where a branch begins, in directories that hold nothing yet, or no more
    than an earlier attempt of the same branch.
    """
    own, its = read_mark(config.run.dir), saved.document.get("run_id")
    run, source = own.get("run"), own.get("source", "")
    if its is not None and its == run:
        return
    if is_inside(config, saved.path):
        if run is None or (its is None and _belongs(config, saved)):
            return
    elif not known and (run is None or source == _source(saved)):
        return
    up_to = f" up to step {known[-1][0]}" if known else ""
    raise ConfigError(
        f"{config.run.dir} holds another run{up_to} than {saved.path} is of: it would be cut and "
        "overwritten. Continue the one that is there with --resume latest, or give this run another run.dir "
        "(and checkpoint.dir)"
    )


def restarts() -> bool:
    """torchrun or Slurm has restarted this process: it is to go on, whatever it was asked at first."""
    counts = [os.environ.get(f"{starter}_RESTART_COUNT", "0") for starter in ("TORCHELASTIC", "SLURM")]
    return any(int(count) for count in counts)


def check_no_run(config: Config) -> None:
    """Raises ConfigError where a run of one step or more is in the run directory: it would be overwritten."""
    metrics = config.run.dir / METRICS
    steps = [record.get("step") for record in read_metrics(metrics)] if metrics.is_file() else []
    done = max((step for step in steps if type(step) is int), default=0)
    if done:
        saved = "continue it with --resume latest, " if any(root_of(config).glob("step_*")) else ""
        raise ConfigError(
            f"{config.run.dir} holds a run up to step {done}: {saved}give this run another run.dir, or say "
            "--overwrite, and that one goes"
        )


def forget_run(config: Config, known: Sequence[tuple[int, Path]]) -> None:
    """Remove the `known` checkpoints of the run that is in the run directory, which another takes over.

    Raises:
        ConfigError: they are those of a run in another directory; nothing was touched.
        StorageError: they cannot be removed.
    """
    from mcore_rl.checkpoint import manifest
    from mcore_rl.checkpoint.directory import discard

    inside = config.run.dir.resolve()
    for _, path in known:
        if not path.resolve().is_relative_to(inside) and not _belongs(config, manifest.read(path)):
            raise ConfigError(
                f"--overwrite: {path} is of a run in another directory than {config.run.dir}; set "
                "checkpoint.dir to another place"
            )
    for _, path in known:
        discard(path)


def identity_of(config: Config, saved: Saved | None) -> Identity:
    """The identity of a run that `check_history` has let pass; a new one for a new run and for a branch."""
    own = read_mark(config.run.dir)
    if saved is None:
        return Identity(uuid.uuid4().hex)
    its, run, source = saved.document.get("run_id"), own.get("run"), own.get("source", "")
    if is_inside(config, saved.path) or (its is not None and its == run):
        return Identity(its or run or uuid.uuid4().hex, source)
    return Identity(run if run and source == _source(saved) else uuid.uuid4().hex, _source(saved))


def is_inside(config: Config, checkpoint: Path) -> bool:
    """Whether a checkpoint lies in the run's own directory of checkpoints."""
    return checkpoint.resolve().parent == root_of(config).resolve()


def _source(saved: Saved) -> str:
    return f"{saved.document.get('run_id') or saved.path.resolve()} step {saved.step}"


def begin(config: Config, identity: Identity) -> None:
    """From here on the run directory is this run's: its name, its settings."""
    try:
        config.run.dir.mkdir(parents=True, exist_ok=True)
        mark(config.run.dir, "run", run=identity.run, source=identity.source)
    except OSError as error:
        raise storage_error(config.run.dir, error, remedy=_RUN_REMEDY) from error
    write_whole(config.run.dir / RESOLVED, to_toml(config))


def open_samples(run_dir: Path, *, keep: bool) -> None:
    """RUN_DIR/samples, marked. Samples of an earlier run go, unless `keep`. Other files stay."""
    try:
        for name in SAMPLES:
            directory = run_dir / name
            for path in [] if keep or not directory.exists() else list(directory.iterdir()):
                if _SAMPLES.fullmatch(path.name):
                    path.unlink()
        _make_samples(run_dir / "samples")
    except OSError as error:
        raise storage_error(run_dir / "samples", error, remedy=_RUN_REMEDY) from error


def _make_samples(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    if not is_ours(directory, "samples"):
        mark(directory, "samples")


def keep_evaluation(run_dir: Path, step: int, name: str, lines: str) -> None:
    """Write every sample of a set, evaluated after `step`, to RUN_DIR/eval/step_N.NAME.jsonl."""
    path = run_dir / "eval" / f"step_{step}.{name}.jsonl"
    try:
        _make_samples(path.parent)
    except OSError as error:
        raise storage_error(path.parent, error, remedy=_RUN_REMEDY) from error
    write_whole(path, lines)
