"""A model in training on this rank: what supervised and reinforcement training share, as a value."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from mcore_rl.checkpoint import Checkpoints, Saved
from mcore_rl.config import Config
from mcore_rl.data.cursor import PromptCursor
from mcore_rl.data.prompts import PromptSet
from mcore_rl.log import Progress, StepLog, Timers
from mcore_rl.model.build import Model
from mcore_rl.model.optimizer import Optimizer
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.screen import SCREEN
from mcore_rl.training.batch import Batching
from mcore_rl.training.data import passed_over
from mcore_rl.training.inputs import Inputs
from mcore_rl.training.metrics import Work, throughput
from mcore_rl.training.rundir import Identity
from mcore_rl.types import Tokens


@dataclass(frozen=True)
class Attempt:
    """One start of a run: what it continues from, where it saves, and how it ends."""

    saved: Saved | None
    """the checkpoint that it continues from; None at the beginning of a run"""
    checkpoints: Checkpoints | None
    """None where nothing is saved or resumed"""
    leave: threading.Event
    """set when this rank is asked to leave"""
    reached: Callable[[str], None]
    """says what is done: the run goes on, and the watchdog's clock starts again"""
    identity: Identity
    """which run it is"""
    inputs: Inputs = field(default_factory=dict)
    """what it reads, in short; empty where nothing is saved"""

    @property
    def step(self) -> int:
        """The step that the run continues after; 0 at the beginning."""
        return self.saved.step if self.saved is not None else 0


@dataclass(frozen=True)
class Trainer:
    """A model in training on this rank, and where its run is written."""

    config: Config
    mesh: Mesh
    attempt: Attempt
    policy: Model
    optimizer: Optimizer
    shape: Batching
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    """training prompts"""
    cursor: PromptCursor
    """walks them; the same position on every rank"""
    timers: Timers
    step_log: StepLog
    progress: Progress
    ended: tuple[Callable[[int], None], ...] = ()
    """told of every step, when it has been logged"""

    def log(self, step: int, metrics: Mapping[str, float | str], work: Work | None = None) -> None:
        """Write a step, and what its `work` cost, to metrics.jsonl; say it on the main rank. Collective."""
        times = self.timers.collect()
        cost = {} if work is None else throughput(work, times, self.mesh)
        record = {**metrics, **passed_over(self.cursor), **times, **cost}
        on_main(self.mesh, lambda: self.step_log.write(step, record))  # a full disk ends all ranks alike
        if self.mesh.is_main:
            if line := self.progress.line(step, record):
                SCREEN.say(line)
            SCREEN.progress(self.progress.share, self.progress.left)
        self.attempt.reached(f"step {step}")
        for told in self.ended:
            told(step)
        give_back_memory()

    @property
    def temperature(self) -> float:
        """The temperature of sampling, and therefore of every log-prob."""
        return self.config.rollout.temperature

    def decode(self, ids: Sequence[int] | Tokens) -> str:
        """A response as text, for rewards and people."""
        return decode_with(self.tokenizer, ids)

    def probe_prompts(self) -> list[tuple[int, ...]]:
        """Token sequences for the check of the first publish, before anything was sampled."""
        return [prompt.token_ids for prompt in self.prompts.first(self.config.publish.probe_sequences)]


def give_back_memory() -> None:
    """Give the system the pages that malloc has free between what is in use, where the C library can.

    Tensors and messages of other sizes come and go every step. Without this, the gaps between what stays grow
    by a third of a small rank's memory in some thousand steps, while what is in use does not. It takes a
    millisecond or two.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)


def decode_with(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | Tokens) -> str:
    """A response as text, without special tokens."""
    return str(tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True))
