"""Starting a run: as one rank under torchrun, or as all ranks of this node."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from types import FrameType

from mcore_rl.config import Config
from mcore_rl.errors import EXIT_DONE, EXIT_RETRYABLE
from mcore_rl.metrics import append_event
from mcore_rl.train.ending import (
    append,
    end_of_events,
    end_with_parent,
    last_words,
    not_worth_a_restart,
    say,
)
from mcore_rl.train.rundir import held, warn_of_others


def under_torchrun() -> bool:
    """torchrun has started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_rank(config: Config, resume: str | None = None, replay: Path | None = None) -> int:
    """Train as this rank, or replay a dump; the exit code is also the last line of RUN_DIR/events.jsonl.

    Raises:
        ConfigError, StorageError: on the first rank, which holds the run's directories: they are not ours, or
            another run has them. Nothing is written then.
    """
    end_with_parent()
    signal.signal(signal.SIGTERM, _leave)  # so that servers and process groups are closed on the way out
    if int(os.environ["RANK"]) != 0:
        return _run_recorded(config, resume, replay)
    publishes = replay is None and not config.supervised_only
    with held(config, publishes=publishes):  # before a line is written to what may be another run's
        warn_of_others(config)
        return _run_recorded(config, resume, replay)


def _run_recorded(config: Config, resume: str | None, replay: Path | None) -> int:
    rank, run_dir = int(os.environ["RANK"]), config.run.dir
    if (last := not_worth_a_restart(run_dir)) is not None:
        if rank == 0:
            say(f"a restart would meet it again: {last['type']}: {last['message']}")
        return int(last["exit_code"])
    since = end_of_events(run_dir)
    try:
        if rank == 0:
            append_event(run_dir, "start", world_size=int(os.environ["WORLD_SIZE"]))
        _run(config, resume, replay)
        code = EXIT_DONE
    except Exception as error:
        code = last_words(run_dir, error, since)
    if rank == 0 or code != EXIT_DONE:
        append(run_dir, "end", exit_code=code)
    return code


def _run(config: Config, resume: str | None, replay: Path | None) -> None:
    from mcore_rl.train.machine import check_rank

    check_rank(config)
    if replay is not None:
        from mcore_rl.train.replay import replay_dump

        replay_dump(config, replay)
    elif config.supervised_only:
        from mcore_rl.train.supervised import train_supervised

        train_supervised(config, resume)
    else:
        from mcore_rl.train.loop import train

        train(config, resume)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def launch_node(config: Config, arguments: Sequence[str]) -> int:
    """Start every rank of the config's layout on this node, by torch's elastic agent; their first exit code.

    The rendezvous port is chosen by the system. SIGTERM and Ctrl-C are passed on to the ranks, which finish
    and save their step where checkpoints are kept; a second one ends them and what they started.

    Raises:
        ConfigError, LayoutError: this node cannot run it; nothing was started.
    """
    from mcore_rl.train.machine import check_node

    check_node(config)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    ranks = processes(config)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(ceil(config.train.step_timeout)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each rank says its own error
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="mcore_rl",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(agent, sys.executable)("-m", "mcore_rl", *arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode < 0:
            print(f"mcore-rl: rank {first.local_rank} was ended by signal {-first.exitcode}", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else EXIT_RETRYABLE
    except SignalException as error:
        return EXIT_RETRYABLE if error.sigval == signal.SIGTERM else 128 + error.sigval
    return EXIT_DONE


def processes(config: Config) -> int:
    """Ranks that the layout needs, one replica unless parallel.data says more."""
    p = config.parallel
    return p.tensor * p.pipeline * p.context * (p.data or 1)
