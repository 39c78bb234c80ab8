"""Builds the parts of a run from its config: what supervised and reinforcement training share."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mcore_rl.checkpoint import Saved, seed_rng
from mcore_rl.config import Config
from mcore_rl.data.balance import forward_flops
from mcore_rl.data.cursor import PromptCursor
from mcore_rl.data.prompts import PromptSet, open_prompts
from mcore_rl.errors import ConfigError
from mcore_rl.log import Progress, StepLog, Timers, append_event, tell
from mcore_rl.model import platform
from mcore_rl.model.build import Model, build_critic, build_policy
from mcore_rl.model.hf.architecture import Architecture, read_architecture
from mcore_rl.model.hf.files import check_side_files
from mcore_rl.model.hf.peft_files import begun_anew
from mcore_rl.model.optimizer import Optimizer, build_optimizer, ddp_config
from mcore_rl.model.probe import check_gradient_scale
from mcore_rl.model.residency import Offloaded, ResidentPart, state_of
from mcore_rl.parallel.attempt import attempt_store
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh, build_mesh, destroy_mesh
from mcore_rl.precision import token_multiple
from mcore_rl.screen import SCREEN
from mcore_rl.spans import listening
from mcore_rl.terminal import joined, listed
from mcore_rl.timeline import TimelineFile
from mcore_rl.trackers.sender import Send, tracked
from mcore_rl.trackers.services import TrackedRun
from mcore_rl.training.bad_rows import noting_bad_rows, read_bad_rows
from mcore_rl.training.batch import Batching, align_of
from mcore_rl.training.checkpoint import (
    check_what_is_left,
    find_start,
    leave_when_asked,
    open_checkpoints,
)
from mcore_rl.training.data import (
    check_batch,
    check_template,
    response_of,
    row_format,
    say_beginning,
    say_dropped,
)
from mcore_rl.training.faults.exits import recorded, say
from mcore_rl.training.faults.watchdog import Watchdog, collective_timeout
from mcore_rl.training.inputs import Inputs, check_inputs, inputs_of
from mcore_rl.training.layout import check_models, fp8_of, layout_of, lora_of, tuning_of
from mcore_rl.training.profile import ProfiledSteps, check_profile
from mcore_rl.training.rewards import held_out_words
from mcore_rl.training.rundir import held_once, identity_of
from mcore_rl.training.shape import shape_of
from mcore_rl.training.stacked import check_transport
from mcore_rl.training.trainer import Attempt, Trainer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""a tokenizer has one of them"""


@contextmanager
def start_trainer(config: Config, *, optimizer_steps: int, resume: str | None) -> Iterator[Trainer]:
    """Join the process group, build the model at the config's layout, open the run directory; undone on exit.

    The caller builds what it trains besides, then calls `training.checkpoint.restore`.

    Args:
        optimizer_steps: of the whole run; a decaying learning rate reaches 0 there.
        resume: `latest`, `previous` or the path of a checkpoint; None starts at the beginning, and so does
            `overwrite`, before which a run that is in the run directory is removed.

    Raises:
        ConfigError, LayoutError, DataError: before any weight is built, where the cause allows it.
    """
    layout = layout_of(config, world_size())
    layout.check(world_size())
    arch = check_models(config, layout)
    if config.samples_responses:
        check_transport(arch, config)
    timeout = collective_timeout(config.train.step_timeout)
    with process_group(timeout):
        mesh = build_mesh(layout, timeout=timeout)
        try:
            with (
                _holding(config, mesh),
                recorded(config.run.dir),
                watched(config, mesh) as watchdog,
                open_checkpoints(config, mesh, resume) as checkpoints,
            ):
                saved, leave = find_start(config, mesh, resume), threading.Event()
                check_what_is_left(config, saved)
                identity = on_main(mesh, lambda: identity_of(config, saved))
                inputs = {} if checkpoints is None else on_main(mesh, lambda: _inputs(config, saved))
                attempt = Attempt(saved, checkpoints, leave, watchdog.progress, identity, inputs)
                with (
                    _tracked(config, mesh, attempt) as send,
                    _seen(config, mesh, attempt) as timeline,
                    _profiled(config, mesh) as profiled,
                    leave_when_asked(leave, active=config.checkpoint.saves),
                ):
                    say_header(config, mesh)
                    trainer = build_trainer(config, mesh, attempt, optimizer_steps, send)
                    trainer = replace(trainer, ended=(profiled.reached, *_flushed(timeline)))
                    attempt.reached("the model was built")
                    profiled.reached(attempt.step)
                    with noting_bad_rows(config.run.dir, trainer.prompts, is_main=mesh.is_main):
                        yield trainer
        finally:
            destroy_mesh()


@contextmanager
def _tracked(config: Config, mesh: Mesh, attempt: Attempt) -> Iterator[Send]:
    """What hands the main rank's steps to the services of `run.trackers`."""
    names = list(config.run.trackers) if mesh.is_main else []
    endpoint = config.watch.prometheus if mesh.is_main else None
    settings = config.model_dump(mode="json", exclude_none=True)
    run = TrackedRun(config.run.dir, attempt.identity.run, settings, attempt.step, endpoint or "")
    note = lambda name, why: append_event(config.run.dir, "tracker", name=name, why=why)  # noqa: E731
    with tracked([*names, *(["prometheus"] if endpoint else [])], run, note) as send:
        yield send


@contextmanager
def _seen(config: Config, mesh: Mesh, attempt: Attempt) -> Iterator[TimelineFile | None]:
    """What is done is shown on the main rank, and written down where [watch] says so."""
    with SCREEN.showing(active=mesh.is_main), ExitStack() as stack:
        timeline = None
        if config.watch.timeline:
            timeline = TimelineFile(config.run.dir, attempt.identity.run, mesh.rank, say)
            stack.callback(timeline.flush)
            stack.enter_context(listening(timeline))
        yield timeline


def _flushed(timeline: TimelineFile | None) -> tuple[Callable[[int], None], ...]:
    return () if timeline is None else (lambda _: timeline.flush(),)


@contextmanager
def _profiled(config: Config, mesh: Mesh) -> Iterator[ProfiledSteps]:
    """Profilers over the steps of watch.profile_steps."""
    watch = config.watch
    if watch.profile_steps is not None:
        check_profile(watch.profile)
    profiled = ProfiledSteps(config.run.dir, mesh.rank, watch.profile_steps, watch.profile)
    try:
        yield profiled
    finally:
        profiled.close()


def say_header(config: Config, mesh: Mesh) -> None:
    """Say what is trained, how, and where it can be seen."""
    kind = config.run.kind if config.run.kind != "rl" else config.algorithm.name
    layout = mesh.layout
    degrees = {"tensor": layout.tensor, "pipeline": layout.pipeline, "context": layout.context}
    degrees |= {"expert": layout.expert, "data": layout.data}
    cut = ", ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)
    ranks = f"{layout.world_size} ranks ({cut})" if cut else "1 rank"
    rows = f"{config.supervised.batch_size} rows"
    if config.run.kind == "rl":
        rows = f"{config.rollout.prompts_per_step} prompts x {config.rollout.samples_per_prompt} samples"
    steps = f"{config.train.steps} steps of {rows}"
    trained = f"adapters of rank {config.lora.rank} on " if config.lora.rank else ""
    tell(
        f"{kind} on {trained}{config.model.path}, {config.model.precision}, {ranks}: {steps}"
        f"\nall of it is in {config.run.dir}; `mcore-rl report --follow {config.run.dir}` shows it meanwhile",
        is_main=mesh.is_main,
    )


def _inputs(config: Config, saved: Saved | None) -> Inputs:
    found = inputs_of(config)
    if saved is not None:
        check_inputs(saved, found)
    return found


@contextmanager
def _holding(config: Config, mesh: Mesh) -> Iterator[None]:
    """Hold the run's directories on the main rank, where a script of the user's own starts it; collective.

    Raises:
        ConfigError, StorageError: on every rank: they are not ours, or another run has them.
    """
    with ExitStack() as stack:
        publishes = config.samples_responses
        on_main(mesh, lambda: stack.enter_context(held_once(config, publishes=publishes)))
        yield


def build_trainer(
    config: Config, mesh: Mesh, attempt: Attempt, optimizer_steps: int, send: Send = lambda *_: None
) -> Trainer:
    """The parts of a run at `mesh`; every rank calls it. A run that begins replaces an older log.

    `send` is handed every step of the log.
    """
    seed_rng(config.run.seed)
    tell(f"reading {joined(map(str, config.data.train))} ...", is_main=mesh.is_main)
    tokenizer = load_tokenizer(config.model.path)
    prompts = read_prompts(config, config.data.train, tokenizer)
    check_batch(config, prompts)
    tell(f"building the model of {config.model.path} ...", is_main=mesh.is_main)
    policy = build_trained(config, mesh)
    _say_new_adapters(policy)
    check_gradient_scale(policy)
    check_router_biases(policy.arch, config.optimizer.router_bias_rate)
    resume_step = None if attempt.saved is None else sys.maxsize
    step_log = StepLog(config.run.dir, rank=mesh.rank, resume_step=resume_step, send=send)
    if mesh.is_main:
        say_dropped(config, step_log, "data.train", prompts)
        say_beginning(step_log, prompts)
    return Trainer(
        config=config,
        mesh=mesh,
        attempt=attempt,
        policy=policy,
        optimizer=optimizer_of(config, policy, optimizer_steps),
        shape=batching_of(config, mesh),
        tokenizer=tokenizer,
        prompts=prompts,
        cursor=cursor_of(config, prompts),
        timers=Timers(),
        step_log=step_log,
        progress=Progress(config.train.steps, config.train.eval_every, held_out_words(config)),
    )


def build_trained(config: Config, mesh: Mesh) -> Model:
    """The model that a run trains, with its starting weights; collective."""
    tuning, ddp = tuning_of(config, trained=True), trained_ddp(config, mesh.layout)
    settings = model_settings(config) | {"tuning": tuning, "ddp": ddp}
    if config.run.kind == "reward_model":
        return build_critic(config.model.path, mesh, **settings)
    return build_policy(config.model.path, mesh, **settings, lora=lora_of(config))


def _say_new_adapters(policy: Model) -> None:
    """Say of which matrices lora.path has no adapter."""
    if policy.adapters is None or policy.adapters.lora.path is None or not policy.mesh.is_main:
        return
    path = policy.adapters.lora.path
    if new := begun_anew(policy.adapters, path):
        tell(f"{path} has no adapters of {listed(new)}: new ones, which change nothing yet", is_main=True)


def check_router_biases(arch: Architecture, rate: float) -> None:
    """Raises ConfigError where optimizer.router_bias_rate would move biases that the model does not have."""
    if rate and not (arch.experts and arch.experts.sigmoid):
        raise ConfigError(
            f"optimizer.router_bias_rate = {rate}: a {arch.family} model has no router biases; set it to 0"
        )


def cursor_of(config: Config, prompts: PromptSet) -> PromptCursor:
    """What walks the training prompts."""
    seed, weights, mended = config.run.seed, config.data.weights, read_bad_rows(config.run.dir)
    return PromptCursor(prompts, seed, weights, mended=mended)


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


def read_prompts(
    config: Config,
    path: Path | Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    *,
    needs_label: bool | None = None,
    sampled: int | None = None,
    whole: bool = False,
) -> PromptSet:
    """The prompts of one path or several, in the format that [data] describes.

    Args:
        needs_label: a prompt without a label is refused; unset, as what trains on it needs one.
        sampled: longest response of a held-out set, which is sampled whatever is trained.
        whole: examine every row, and not the beginning of a large file alone.
    """
    check_template(config, tokenizer)
    return open_prompts(
        [path] if isinstance(path, Path) else path,
        tokenizer,
        row_format(config, needs_label=needs_label, trained=sampled is None),
        max_prompt_tokens=config.data.max_prompt_tokens,
        response=response_of(config, sampled),
        whole=whole,
    )


def model_settings(config: Config) -> dict[str, Any]:
    """How policy, reference and critic are built alike; what is trained has a `tuning` of its own."""
    return {
        "precision": config.model.precision,
        "fp8": fp8_of(config),
        "random_seed": config.run.seed if config.model.random_init else None,
    }


def trained_ddp(config: Config, layout: Layout) -> DistributedDataParallelConfig:
    """Megatron's DDP around a model in training; with one replica there is nothing to exchange."""
    return ddp_config(
        distributed=config.optimizer.distributed,
        overlap=layout.data * layout.context > 1,
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
        router_bias_rate=o.router_bias_rate,
        cpu_fraction=o.cpu_fraction,
    )


def offloaded_optimizers(config: Config, optimizers: Mapping[str, Optimizer]) -> dict[str, ResidentPart]:
    """After `restore`: their state waits in host memory from now on, where [residency] says so."""
    if config.residency.optimizer == "resident":
        return {}
    return {
        "critic_optimizer" if prefix else "optimizer": Offloaded(partial(state_of, optimizer))
        for prefix, optimizer in optimizers.items()
    }


def batching_of(config: Config, mesh: Mesh) -> Batching:
    """How this run's samples become micro-batches."""
    return Batching(
        mini_batches=config.algorithm.mini_batches,
        tokens_per_micro_batch=config.train.tokens_per_micro_batch,
        max_new_tokens=config.longest_response,
        cost=partial(forward_flops, shape=shape_of(config.model.path)),
        align=align_of(mesh, token_multiple(config.model.precision, config.model.fp8_recipe)),
        overlong_filter=config.algorithm.overlong_filter,
        share_prompts=shares_prompts(config, mesh),
    )


def shares_prompts(config: Config, mesh: Mesh) -> bool:
    """Whether samples of a micro-batch can have the tokens of their prompt once.

    A router's balance counts tokens, and only the portable attention knows of prompts that lie elsewhere. It
    waits for no length on a GPU, and so would pad answers of all lengths to the longest there.
    """
    dense = read_architecture(config.model.path).experts is None
    return dense and platform.device().type == "cpu" and mesh.layout.context == 1
