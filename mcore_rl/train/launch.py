"""Starting a run: as one rank under torchrun, or as all ranks of this node."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

from mcore_rl.config import Config
from mcore_rl.errors import EXIT_DONE, EXIT_RETRYABLE, ConfigError, DataError, McoreRLError
from mcore_rl.metrics import append_event


def under_torchrun() -> bool:
    """torchrun has started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_rank(config: Config, resume: str | None = None) -> int:
    """Train as this rank; the exit code is also the last line of RUN_DIR/events.jsonl."""
    signal.signal(signal.SIGTERM, _leave)  # so that servers and process groups are closed on the way out
    rank = int(os.environ["RANK"])
    if rank == 0:
        append_event(config.run.dir, "start", world_size=int(os.environ["WORLD_SIZE"]))
    try:
        _train(config, resume)
        code = EXIT_DONE
    except McoreRLError as error:
        code = error.exit_code
        if rank == 0 or not _same_on_all_ranks(error):
            print(f"mcore-rl: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            append_event(config.run.dir, "error", rank=rank, type=type(error).__name__, message=str(error))
    except (
        OSError,
        RuntimeError,
    ) as error:  # a full disk, a peer that is gone, a collective past its deadline
        code = EXIT_RETRYABLE
        traceback.print_exc()
        append_event(config.run.dir, "error", rank=rank, type=type(error).__name__, message=str(error))
    if rank == 0 or code != EXIT_DONE:
        append_event(config.run.dir, "end", rank=rank, exit_code=code)
    return code


def _train(config: Config, resume: str | None) -> None:
    from mcore_rl.train.machine import check_rank

    check_rank(config)
    if config.supervised_only:
        from mcore_rl.train.supervised import train_supervised

        train_supervised(config, resume)
    else:
        from mcore_rl.train.loop import train

        train(config, resume)


def _same_on_all_ranks(error: McoreRLError) -> bool:
    """Read from the same files by every rank, or handed round by parallel.control: rank 0 says it once."""
    return isinstance(error, ConfigError | DataError) or error.shared


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def launch_node(config: Config, arguments: Sequence[str]) -> int:
    """Start every rank of the config's layout on this node, by torch's elastic agent; their first exit code.

    The rendezvous port is chosen by the system. Ctrl-C ends all ranks and what they started.

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
