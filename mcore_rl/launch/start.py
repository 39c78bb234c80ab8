"""Starting a run: as one rank under torchrun, or as all ranks of this node."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from types import FrameType

from mcore_rl.config import Config, notes, warnings
from mcore_rl.errors import (
    EXIT_DONE,
    EXIT_RETRYABLE,
    AskedToLeave,
    NothingToDo,
    StorageError,
    requests_to_leave,
)
from mcore_rl.imports import python_module, uncollected
from mcore_rl.launch.asked import finish_although_asked, leave_an_import
from mcore_rl.launch.environment import check_environment
from mcore_rl.launch.stopped import ending_stopped
from mcore_rl.launch.verdict import Left, exit_code_of_launch
from mcore_rl.log import append_event, tell
from mcore_rl.training.dump_directories import check_directory, check_source, doubts_of_source
from mcore_rl.training.faults.deadline import ExitTimer
from mcore_rl.training.faults.exits import (
    append,
    end_of_events,
    end_with_parent,
    keep_a_file,
    last_words,
    launch_name,
    leaving,
    not_worth_a_restart,
    say,
    typed,
)
from mcore_rl.training.faults.leftovers import end_descendants, end_launched
from mcore_rl.training.faults.watchdog import GRACE_SECONDS, collective_timeout
from mcore_rl.training.rundir import check_no_run, held, restarts, root_of, warn_of_others
from mcore_rl.weight_files import unread

_RANK_0_SECONDS = 30.0
"""for which other ranks stay, where the first end ends all and rank 0 has something to say"""


def under_torchrun() -> bool:
    """torchrun has started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@dataclass(frozen=True)
class Source:
    """What a launch does besides to train by its config from the beginning."""

    resume: str | None = None
    """the checkpoint that it continues after, or `overwrite`, to begin where a run is"""
    replay: Path | None = None
    """a recorded micro-batch that is run alone"""
    rollouts: Path | None = None
    """dumps that it trains on, without servers"""

    @property
    def begins(self) -> bool:
        """It begins a run, where none may be yet."""
        return self.resume is None and self.replay is None

    def publishes(self, config: Config) -> bool:
        """Whether weights are written for servers."""
        return self.replay is None and self.rollouts is None and config.samples_responses


def run_rank(config: Config, source: Source) -> int:
    """Train as this rank, or replay a micro-batch; every rank's exit code is also in RUN_DIR/events.jsonl.

    Raises:
        ConfigError: the environment is not that of a rank.
        ConfigError, StorageError: on the first rank, which holds the run's directories: they are not ours, or
            another run has them. Nothing is written then.
    """
    check_environment()
    end_with_parent()
    catch_signals()
    keep_a_file()
    faulthandler.enable(all_threads=False)  # a crash in native code leaves the Python stack that led there
    if int(os.environ["RANK"]) != 0:
        return _run_recorded(config, partial(_run, config, source))
    with held(config, publishes=source.publishes(config)):  # before a line is written in another run's
        doubts = doubts_of_source(config) if source.rollouts is not None else []
        _warn(config, doubts)
        return _run_recorded(config, partial(_run, config, source))


def run_alone(config: Config) -> int:
    """Sample rollouts in this one process, which ends as a rank does.

    Raises:
        ConfigError, StorageError: the run directory is not ours to sample into, or another run has it.
    """
    from mcore_rl.launch.preflight import check_open_files

    catch_signals()
    keep_a_file()
    faulthandler.enable(all_threads=False)
    check_directory(config)
    check_open_files()
    with held(config, publishes=False, dumps="sampled"):
        _warn(config, trains=False)
        return _run_recorded(config, partial(_sample, config))


def _warn(config: Config, doubts: Sequence[str] = (), *, trains: bool = True) -> None:
    warn_of_others(config)
    models = [] if config.model.random_init else [config.model.path]
    models += [] if config.reward.model is None else [config.reward.model]
    for what in notes(config):
        say(f"note: {what}")
    for what in [*warnings(config, trains=trains), *filter(None, map(unread, models)), *doubts]:
        say(f"warning: {what}")
        append_event(config.run.dir, "warning", what=what)


def _sample(config: Config) -> None:
    with uncollected():
        from mcore_rl.training.sample_only import sample_rollouts

    sample_rollouts(config)


def _run_recorded(config: Config, work: Callable[[], None]) -> int:
    rank, run_dir = int(os.environ.get("RANK", "0")), config.run.dir
    if (last := not_worth_a_restart(run_dir)) is not None:
        _let_rank_0_say(f"a restart would meet it again: {last['type']}: {last['message']}", rank)
        return int(last["exit_code"])
    since = end_of_events(run_dir)
    try:
        if rank == 0:
            append_event(run_dir, "start", world_size=int(os.environ.get("WORLD_SIZE", "1")))
        work()
        code = EXIT_DONE
    except NothingToDo as done:
        code = done.exit_code
        if rank == 0:
            say(str(done))
    except BaseException as error:  # of user code too: whatever it is, not every step is done
        code = last_words(run_dir, typed(error), since)
        if isinstance(error, StorageError | AskedToLeave) and rank == 0:
            _say_where_it_goes_on(config)
    _end_with(code, config)
    return code


def _let_rank_0_say(what: str, rank: int) -> None:
    """Rank 0 says it and ends. The others stay until torchrun ends them for that: the first end ends all."""
    if rank == 0:
        say(what)
        return
    with suppress(AskedToLeave):
        time.sleep(_RANK_0_SECONDS)


def _say_where_it_goes_on(config: Config) -> None:
    """After what a retry may mend, and after Ctrl-C: what is saved, so that a retry need not begin anew."""
    from mcore_rl.checkpoint import committed

    with suppress(OSError):  # of a disk that is broken, not full
        if saved := committed(root_of(config)):
            say(f"--resume goes on after step {saved[-1][0]}, the newest that is saved")
        else:
            why = "before its first checkpoint" if config.checkpoint.saves else "checkpoint.every is 0"
            say(f"no step of this run is saved: {why}")


def _end_with(code: int, config: Config) -> None:
    """Say in events.jsonl that this rank ends with `code`, after which nothing ends it with another one."""

    def leave(number: int, frame: FrameType | None) -> None:
        os._exit(code)

    asking = requests_to_leave()
    for number in asking:
        signal.signal(number, signal.SIG_IGN)
    end_descendants()
    append(config.run.dir, "end", exit_code=code)
    for number in asking:
        signal.signal(number, leave)
    faulthandler.dump_traceback_later(config.train.step_timeout)  # a thread may never let it leave
    ExitTimer(code).start(config.train.step_timeout + GRACE_SECONDS)


def catch_signals() -> None:
    """Requests to leave raise AskedToLeave here, so that servers and groups are closed on the way out.

    What this process forks is ended by them at once: a pool of processes ends its workers so.
    """
    for number in requests_to_leave():
        signal.signal(number, _leave)
    os.register_at_fork(after_in_child=_forget_signals)


def _leave(number: int, frame: FrameType | None) -> None:
    """torch's agent sends SIGTERM to all when one has failed; a rank that is leaving for that goes on."""
    if number in (signal.SIGTERM, signal.SIGHUP) and leaving.is_set():
        return
    leave_an_import(number, frame)
    raise AskedToLeave(number)


def _forget_signals() -> None:
    for number in set(requests_to_leave()) - {signal.SIGINT}:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(config: Config, source: Source) -> None:
    from mcore_rl.launch.preflight import check_rank

    check_rank(config)
    if source.replay is not None:
        with uncollected():
            from mcore_rl.launch.replay import replay_dump

        replay_dump(config, source.replay)
    elif source.rollouts is not None:
        with uncollected():
            from mcore_rl.training.from_dumps import train_from_dumps

        train_from_dumps(config, source.rollouts, source.resume)
    else:
        train_of(config)(config, source.resume)


def train_of(config: Config) -> Callable[[Config, str | None], None]:
    """The loop of the config's kind of training."""
    with uncollected():
        match config.run.kind:
            case "rl":
                from mcore_rl.training.loop import train
            case "sft":
                from mcore_rl.training.supervised import train_supervised as train
            case "preference":
                from mcore_rl.training.preference import train_preference as train
            case "reward_model":
                from mcore_rl.training.reward_model import train_reward_model as train
            case "distill":
                from mcore_rl.training.distill import train_distillation as train
    return train


def launch_node(config: Config, source: Source, arguments: Sequence[str]) -> int:
    """Start every rank of the config's layout on this node, by torch's elastic agent; the exit code of all.

    Args:
        arguments: of the command that every rank runs.

    It is 0 only when every rank has written in events.jsonl that it ended with 0.

    The rendezvous port is chosen by the system. SIGTERM and Ctrl-C are passed on to the ranks, which finish
    and save their step where checkpoints are kept; a second one ends them and what they started.

    Raises:
        ConfigError, LayoutError: this node cannot run it; nothing was started.
        DataError: there are no dumps to train on.
        ConfigError, StorageError: the run's directories are not ours, or another run has them.
    """
    from mcore_rl.launch.preflight import check_node

    check_node(config)
    if source.rollouts is not None:
        check_source(config, source.rollouts)
    with held(config, publishes=source.publishes(config)):
        # the first rank holds them; a run that cannot is refused in a second, and nothing reads its end
        if source.begins and not restarts():
            check_no_run(config)
    ranks, since, launch = processes(config), end_of_events(config.run.dir), launch_name()
    tell(f"starting {ranks} {'rank' if ranks == 1 else 'ranks'} ...", is_main=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(ceil(config.train.step_timeout)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each rank says its own error
    patience = collective_timeout(config.train.step_timeout)
    try:
        with ending_stopped(launch, config.run.dir, patience):
            left = _start_ranks(launch, ranks, arguments)
    finally:
        finish_although_asked()
        end_launched(launch)
    if isinstance(left, int):
        return left
    return exit_code_of_launch(config.run.dir, since, ranks, left)


def _start_ranks(launch: str, ranks: int, arguments: Sequence[str]) -> dict[int, Left] | int:
    """Rank -> how it left, of those that left otherwise than with 0; an exit code where a signal came."""
    with uncollected():
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # its import set a level of its own: a signal is said by the ranks
    logging.getLogger("torch.distributed.elastic.agent.server.api").setLevel(logging.CRITICAL)
    _hide_timer()
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=launch,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    if signal.SIGHUP not in requests_to_leave():  # torch's agent would handle what `nohup` has it ignore
        vars(agent)["signals_to_handle"] = "SIGTERM,SIGINT,SIGQUIT"  # an older torch does not know it
    try:
        python, *module = python_module("mcore_rl")
        elastic_launch(agent, python)(*module, *arguments)
    except ChildFailedError as error:
        return {rank: Left(failure.exitcode, failure.timestamp) for rank, failure in error.failures.items()}
    except SignalException as error:
        return EXIT_RETRYABLE if error.sigval in (signal.SIGTERM, signal.SIGHUP) else 128 + error.sigval
    return {}


def _hide_timer() -> None:
    """After a signal torch's timer may be collected in its own thread; Python would print a traceback."""
    others = sys.unraisablehook

    def hook(what: sys.UnraisableHookArgs) -> None:
        if not (isinstance(what.exc_value, RuntimeError) and "join current thread" in str(what.exc_value)):
            others(what)

    sys.unraisablehook = hook


def processes(config: Config) -> int:
    """Ranks that the layout needs, one replica unless parallel.data says more."""
    p = config.parallel
    return p.tensor * p.pipeline * p.context * (p.data or 1)
