"""Builds the parts of a run from its config: what supervised and reinforcement training share."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mcore_rl.checkpoint import Checkpoints, Saved, seed_rng
from mcore_rl.config import Config
from mcore_rl.data.balance import forward_flops, model_shape
from mcore_rl.data.cursor import PromptCursor
from mcore_rl.data.prompts import PromptSet, load_prompts
from mcore_rl.errors import ConfigError
from mcore_rl.metrics import Progress, StepLog, Timers
from mcore_rl.model import platform
from mcore_rl.model.architecture import read_architecture, read_hf_config
from mcore_rl.model.build import Model, build_policy
from mcore_rl.model.hf_files import check_side_files
from mcore_rl.model.optimizer import Optimizer, build_optimizer, ddp_config
from mcore_rl.model.probe import check_gradient_scale
from mcore_rl.model.residency import Offloaded, Residency, state_of
from mcore_rl.model.spec import check_layout
from mcore_rl.parallel.attempt import attempt_store
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.mesh import Layout, Mesh, build_mesh, destroy_mesh
from mcore_rl.precision import Fp8, token_multiple
from mcore_rl.terminal import printable
from mcore_rl.train.batch import Shape, align_of
from mcore_rl.train.checkpoint import (
    Stateful,
    check_what_is_left,
    find_start,
    leave_when_asked,
    open_checkpoints,
)
from mcore_rl.train.data import check_batch, count_dropped, response_of
from mcore_rl.train.ending import recorded
from mcore_rl.train.rundir import Identity, identity_of
from mcore_rl.train.watchdog import Watchdog, collective_timeout

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""a tokenizer has one of them"""


@dataclass
class Trainer:
    """A model in training on this rank, and where its run is written."""

    config: Config
    mesh: Mesh
    policy: Model
    optimizer: Optimizer
    shape: Shape
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptSet
    """training prompts"""
    cursor: PromptCursor
    """walks them; the same position on every rank"""
    timers: Timers
    step_log: StepLog
    progress: Progress
    optimizers: dict[str, Optimizer]
    """prefix of its tensors in a checkpoint -> the optimizer of each model in training"""
    frozen: dict[str, Model]
    """prefix -> a model that only scores"""
    stateful: dict[str, Stateful]
    """what else a checkpoint holds, by name"""
    checkpoints: Checkpoints | None
    """None where nothing is saved or resumed"""
    saved: Saved | None
    """what the run continues from"""
    identity: Identity
    """which run it is; the main rank's counts"""
    leave: threading.Event
    """set when this rank is asked to leave"""
    residency: Residency
    """what of it is on the device, and when"""
    watchdog: Watchdog | None
    """ends the process when no step is finished; None where nobody waits for this run"""
    counted: dict[str, float] = field(default_factory=dict, kw_only=True)
    """metrics of the prompt files, which the first step is logged with"""

    @property
    def step(self) -> int:
        """The step that the run continues after; 0 at the beginning."""
        return self.saved.step if self.saved is not None else 0

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Write a step to metrics.jsonl and say it on the main rank."""
        record = {**metrics, **self.timers.collect()}
        on_main(self.mesh, lambda: self.step_log.write(step, record))  # a full disk ends all ranks alike
        if self.mesh.is_main:
            print(printable(self.progress.line(step, record)), file=sys.stderr, flush=True)
        self.reached(f"step {step}")

    def reached(self, what: str) -> None:
        """The run goes on: the watchdog's clock starts again."""
        if self.watchdog is not None:
            self.watchdog.progress(what)


@contextmanager
def start_trainer(config: Config, *, optimizer_steps: int, resume: str | None) -> Iterator[Trainer]:
    """Join the process group, build the model at the config's layout, open the run directory; undone on exit.

    The caller adds what it trains besides to `optimizers` and `stateful`, then calls `checkpoint.restore`.

    Args:
        optimizer_steps: of the whole run; a decaying learning rate reaches 0 there.
        resume: `latest`, `previous` or the path of a checkpoint; None starts at the beginning.

    Raises:
        ConfigError, LayoutError, DataError: before any weight is built, where the cause allows it.
    """
    layout = layout_of(config, world_size())
    layout.check(world_size())
    check_layout(read_architecture(config.model.path), layout)
    timeout = collective_timeout(config.train.step_timeout)
    with process_group(timeout):
        mesh = build_mesh(layout, timeout=timeout)
        try:
            with (
                recorded(config.run.dir),
                watched(config, mesh) as watchdog,
                open_checkpoints(config, mesh, resume) as checkpoints,
            ):
                saved = find_start(config, mesh, resume)
                check_what_is_left(config, saved)
                trainer = build_trainer(config, mesh, optimizer_steps, keep_log=saved is not None)
                trainer.checkpoints, trainer.saved, trainer.watchdog = checkpoints, saved, watchdog
                trainer.identity = on_main(mesh, lambda: identity_of(config, saved))
                trainer.reached("the model was built")
                with leave_when_asked(active=bool(config.checkpoint.every)) as trainer.leave:
                    yield trainer
        finally:
            destroy_mesh()


def build_trainer(config: Config, mesh: Mesh, optimizer_steps: int, *, keep_log: bool = False) -> Trainer:
    """The parts of a run at `mesh`; every rank calls it. An older log is replaced, unless `keep_log`."""
    seed_rng(config.run.seed)
    tokenizer = load_tokenizer(config.model.path)
    prompts = read_prompts(config, config.data.train, tokenizer)
    check_batch(config, prompts)
    policy = build_policy(
        config.model.path,
        mesh,
        **model_settings(config),
        recompute=config.train.recompute,
        ddp=trained_ddp(config),
    )
    check_gradient_scale(policy)
    optimizer = optimizer_of(config, policy, optimizer_steps)
    cursor = PromptCursor(prompts, config.run.seed)
    trainer = Trainer(
        config=config,
        mesh=mesh,
        policy=policy,
        optimizer=optimizer,
        shape=shape_of(config, mesh),
        tokenizer=tokenizer,
        prompts=prompts,
        cursor=cursor,
        timers=Timers(),
        step_log=StepLog(config.run.dir, rank=mesh.rank, resume_step=sys.maxsize if keep_log else None),
        progress=Progress(config.train.steps),
        optimizers={"": optimizer},
        frozen={},
        stateful={"cursor": cursor},
        checkpoints=None,
        saved=None,
        identity=identity_of(config, None),
        leave=threading.Event(),
        residency=Residency(),
        watchdog=None,
    )
    count_dropped(trainer, "train", prompts)
    return trainer


@contextmanager
def watched(config: Config, mesh: Mesh) -> Iterator[Watchdog]:
    """A watchdog over this rank; collective."""
    attempt = on_main(mesh, lambda: time.strftime("%Y-%m-%d_%H-%M-%S"))
    watchdog = Watchdog(config.run.dir, attempt, mesh.layout.world_size, config.train.step_timeout)
    with watchdog.watching():
        yield watchdog


@contextmanager
def process_group(timeout: float) -> Iterator[None]:
    """torch.distributed from torchrun's environment; every collective fails after `timeout` seconds."""
    platform.install()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = attempt_store(timeout)
    dist.init_process_group(
        platform.backend(), store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def world_size() -> int:
    """Ranks that torchrun started."""
    return int(os.environ["WORLD_SIZE"])


def layout_of(config: Config, world_size: int) -> Layout:
    """The layout that [parallel] asks for; `data` unset takes what the world size leaves."""
    p = config.parallel
    replica = p.tensor * p.pipeline * p.context
    return Layout(
        tensor=p.tensor,
        sequence=p.sequence,
        pipeline=p.pipeline,
        virtual_pipeline=p.virtual_pipeline,
        context=p.context,
        expert=p.expert,
        data=p.data or max(1, world_size // replica),
    )


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the model directory `path`, checked against the model's vocabulary.

    Raises:
        ConfigError: there is none, it has no end-of-sequence token, or an id that the model has no row for.
    """
    vocab = read_architecture(path).vocab
    check_side_files(path)
    if not any((path / name).exists() for name in TOKENIZER_FILES):  # transformers would make an empty one
        raise ConfigError(f"{path}: no tokenizer; put tokenizer.json beside config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a missing or damaged tokenizer
        raise ConfigError(
            f"{path}: no usable tokenizer ({error}); put tokenizer.json beside config.json"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{path}: the tokenizer has no eos_token; set it in tokenizer_config.json")
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab:
        raise ConfigError(
            f"{path}: the tokenizer has token id {largest}, the model only {vocab} rows (vocab_size in "
            "config.json); use the tokenizer that belongs to the model"
        )
    return tokenizer


def read_prompts(config: Config, path: Path, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """A prompt file in the format that [data] describes."""
    data = config.data
    return load_prompts(
        path,
        tokenizer,
        prompt_key=data.prompt_key,
        label_key=data.label_key,
        needs_label=config.reward.model is None,  # which alone reads none
        max_prompt_tokens=data.max_prompt_tokens,
        response=response_of(config),
    )


def fp8_of(config: Config) -> Fp8:
    """What [model] says of FP8."""
    m = config.model
    return Fp8(m.fp8_recipe, m.fp8_param_gather, m.fp8_first_last_bf16)


def model_settings(config: Config) -> dict[str, Any]:
    """How policy, reference and critic are built alike."""
    return {
        "precision": config.model.precision,
        "fp8": fp8_of(config),
        "random_seed": config.run.seed if config.model.random_init else None,
    }


def trained_ddp(config: Config) -> DistributedDataParallelConfig:
    """Megatron's DDP around a model in training."""
    return ddp_config(
        distributed=config.optimizer.distributed,
        fp8_param_gather=config.model.precision == "fp8" and config.model.fp8_param_gather,
    )


def optimizer_of(config: Config, model: Model, steps: int, lr: float | None = None) -> Optimizer:
    """Megatron's Adam with the numbers of [optimizer], at another learning rate where `lr` is given."""
    o = config.optimizer
    return build_optimizer(
        model,
        lr=o.lr if lr is None else lr,
        beta1=o.beta1,
        beta2=o.beta2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        clip_grad=o.clip_grad,
        precision=config.model.precision,
        fp8=fp8_of(config),
        warmup_steps=o.warmup_steps,
        decay_steps=steps - o.warmup_steps,
        decay=o.schedule,
        distributed=o.distributed,
    )


def offload_optimizers(trainer: Trainer) -> None:
    """After `restore`: their state waits in host memory from now on, where [residency] says so."""
    if trainer.config.residency.optimizer == "offloaded":
        for prefix, optimizer in trainer.optimizers.items():
            name = "critic_optimizer" if prefix else "optimizer"
            trainer.residency.parts[name] = Offloaded(partial(state_of, optimizer))


def shape_of(config: Config, mesh: Mesh) -> Shape:
    """How this run's samples become micro-batches."""
    return Shape(
        mini_batches=config.algorithm.mini_batches,
        tokens_per_micro_batch=config.train.tokens_per_micro_batch,
        max_new_tokens=config.rollout.max_new_tokens,
        cost=partial(forward_flops, shape=model_shape(read_hf_config(config.model.path))),
        align=align_of(mesh, token_multiple(config.model.precision, config.model.fp8_recipe)),
    )
