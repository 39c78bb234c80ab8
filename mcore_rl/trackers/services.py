"""The services: how each is opened, handed a step and closed. Nothing is imported before it is asked for.

A resumed run goes on in the same curves. Steps that a checkpoint takes back are sent again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mcore_rl.errors import ConfigError
from mcore_rl.terminal import joined


@dataclass(frozen=True)
class TrackedRun:
    """What a service is told of a run."""

    directory: Path
    """the run's own"""
    id: str
    """which run it is; the same after a resume"""
    settings: Mapping[str, Any]
    """the configuration, section by section"""
    step: int
    """the step that it continues after; 0 at its beginning"""
    prometheus: str = ""
    """HOST:PORT of the endpoint, where there is one"""

    @property
    def name(self) -> str:
        """How people call it: the last part of its directory."""
        return self.directory.resolve().name

    @property
    def project(self) -> str:
        """What its curves are beside: the runs of the directory that its own is in, as W&B allows names."""
        return re.sub(r"[/\\#?%:]", "-", self.directory.resolve().parent.name)[:128] or "mcore_rl"


class TrackingService(Protocol):
    """One service that is open."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand over the numbers of a step."""
        ...

    def close(self, *, failed: bool) -> None:
        """Say that the run has ended, and send what is left."""
        ...


class Wandb:
    """Weights & Biases; WANDB_API_KEY, WANDB_MODE and its other variables act, and name the project too."""

    def __init__(self, run: TrackedRun) -> None:
        """Open the run, or go on with it."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", run.project),
            name=run.name,
            id=run.id,
            resume="allow",
            dir=run.directory,
            config=dict(run.settings),
        )
        self._run.define_metric("*", step_metric="step")  # its own counter could not go back at a resume

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See TrackingService."""
        self._run.log({"step": step, **metrics})

    def close(self, *, failed: bool) -> None:
        """See TrackingService."""
        self._run.finish(exit_code=int(failed))


class TensorBoard:
    """Event files in RUN_DIR/tensorboard, in a directory for each run that RUN_DIR has had."""

    def __init__(self, run: TrackedRun) -> None:
        """Open a file; what an earlier one has of later steps is not shown."""
        from torch.utils.tensorboard import SummaryWriter

        purge = run.step + 1 if run.step else None
        self._writer = SummaryWriter(str(run.directory / "tensorboard" / run.id[:8]), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See TrackingService."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """See TrackingService."""
        self._writer.close()


class Trackio:
    """Trackio's files on this machine; its own variables choose another place."""

    def __init__(self, run: TrackedRun) -> None:
        """Open the run, or go on with it."""
        import trackio

        name = f"{run.name}-{run.id[:8]}"  # it knows runs by name alone
        self._run = trackio.init(
            project=run.project, name=name, resume="allow", config=dict(run.settings), embed=False
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See TrackingService."""
        self._run.log(dict(metrics), step=step)

    def close(self, *, failed: bool) -> None:
        """See TrackingService."""
        self._run.finish()


class MLflow:
    """The server or store that MLFLOW_TRACKING_URI names."""

    def __init__(self, run: TrackedRun) -> None:
        """Open the run, or go on with the one that has its id as a tag."""
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.project)
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        earlier = self._client.search_runs([experiment], f"tags.mcore_rl = '{run.id}'", max_results=1)
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(
            experiment, run_name=run.name, tags={"mcore_rl": run.id}
        ).info.run_id
        for section, keys in run.settings.items():
            for key, value in keys.items():
                self._client.log_param(self._id, f"{section}.{key}", str(value)[:500])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See TrackingService."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=values)

    def close(self, *, failed: bool) -> None:
        """See TrackingService."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


SERVICES: Mapping[str, Callable[[TrackedRun], TrackingService]] = {
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError where a package is missing, or an address that a service cannot do without."""
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        raise ConfigError(
            f"run.trackers: {joined(missing)} not installed here; pip install 'mcore-rl[{missing[0]}]', or "
            "take the name out"
        )
    if "mlflow" in names and "MLFLOW_TRACKING_URI" not in os.environ:
        raise ConfigError(
            "run.trackers: mlflow needs the environment variable MLFLOW_TRACKING_URI, such as "
            "http://HOST:5000 or sqlite:///mlflow.db"
        )


def _is_installed(name: str) -> bool:
    """Not where Python finds no more than a directory of that name, such as the `wandb` that W&B leaves."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None
