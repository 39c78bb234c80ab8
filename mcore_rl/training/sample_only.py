"""`mcore-rl rollout CONFIG.toml`: samples and rewards of `train.steps` steps as dumps, without a trainer.

One process asks the servers, which serve model.path as it is, for the prompts of a new run, with its seeds.
Every step is one dump. Where the command is started again, it goes on after the last of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist

from mcore_rl.checkpoint import seed_rng
from mcore_rl.config import Config
from mcore_rl.dumps.directory import NAME, read_step
from mcore_rl.errors import ConfigError, NothingToDo, RolloutError
from mcore_rl.log import Progress, StepLog, Timers, tell
from mcore_rl.model import platform
from mcore_rl.model.residency import Residency
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh, build_mesh, destroy_mesh
from mcore_rl.rewards import load_rewards
from mcore_rl.rollout.client import RolloutClient
from mcore_rl.rollout.fleet import Fleet, on_each
from mcore_rl.screen import SCREEN
from mcore_rl.training.assemble import build_frozen_reward_model
from mcore_rl.training.assemble_rollouts import connect, replayed_experts, reward_pool, sampling_of, sizes_of
from mcore_rl.training.assemble_servers import open_fleet
from mcore_rl.training.bad_rows import noting_bad_rows
from mcore_rl.training.batch import build_batch
from mcore_rl.training.data import passed_over, say_beginning, say_dropped
from mcore_rl.training.dump_directories import begin, check_directory
from mcore_rl.training.environment import check_environment
from mcore_rl.training.faults.exits import recorded, say
from mcore_rl.training.faults.watchdog import collective_timeout
from mcore_rl.training.generation import Generation
from mcore_rl.training.keep_rollouts import DumpWriter, words_of
from mcore_rl.training.metrics import sample_metrics
from mcore_rl.training.prompt_source import PromptSource
from mcore_rl.training.rewards import RewardSource, reward_functions, reward_title
from mcore_rl.training.servers import Servers
from mcore_rl.training.setup import batching_of, cursor_of, load_tokenizer, read_prompts, watched
from mcore_rl.training.trainer import decode_with
from mcore_rl.types import Group, VersionSpan
from mcore_rl.weights.transport import wait_for_servers

INITIAL = "0"
"""the weight version of a dump whose servers name none: the weights that a run begins with"""


def sample_rollouts(config: Config) -> None:
    """Sample `train.steps` steps into RUN_DIR/rollouts.

    Raises:
        NothingToDo: all of them are there.
        ConfigError: the directory holds what another config sampled.
        McoreRLError: with the remedy in its message; the dumps that were written stay.
    """
    done = check_directory(config)
    load_rewards(reward_functions(config))
    check_environment(config)
    replayed_experts(config)
    if done >= config.train.steps:
        raise NothingToDo(f"nothing to do: {config.run.dir} has all {done} steps; raise train.steps for more")
    with (
        SCREEN.showing(active=True),
        process_alone(config) as mesh,
        recorded(config.run.dir),
        watched(config, mesh) as watchdog,
        ExitStack() as stack,
    ):
        source = build_source(config, mesh, stack, done, watchdog.progress)
        for step in range(done + 1, config.train.steps + 1):
            watchdog.progress(f"step {step} began")
            source.sample(step)
    where = f"{config.run.dir / NAME}"
    tell(f"the rollouts are in {where}; `mcore-rl samples {config.run.dir}` shows them", is_main=True)


class RolloutSource:
    """Samples step after step, and writes what came back."""

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        generation: Generation,
        rewards: RewardSource,
        dumps: DumpWriter,
        log: StepLog,
        timers: Timers,
    ) -> None:
        self._config, self._fleet, self._generation, self._rewards = config, fleet, generation, rewards
        self._dumps, self._log, self._timers = dumps, log, timers
        self._progress = Progress(config.train.steps)

    def sample(self, step: int) -> None:
        """The dump of `step`, and a line of metrics."""
        self._take_back()
        groups = [_named(group) for group in self._generation.collect(step)]
        self._dumps.write(step, groups)
        batch = build_batch(groups)
        asked = self._config.rollout.prompts_per_step * self._config.rollout.samples_per_prompt
        metrics = {**(sample_metrics(batch, asked) if batch.samples else {}), **self._timers.collect()}
        metrics |= self._generation.metrics | self._rewards.take_metrics() | passed_over(self._dumps.cursor)
        self._log.write(step, metrics)
        SCREEN.say(self._progress.line(step, metrics))
        SCREEN.progress(self._progress.share, self._progress.left)

    def _take_back(self) -> None:
        """Lost servers that answer again serve again: their weights are those that they were started on."""
        if self._fleet.status.lost:
            back = {client.url for client in self._fleet.returning()}
            self._fleet.status = self._fleet.mark_published(back)
            self._generation.serve()


@contextmanager
def process_alone(config: Config) -> Iterator[Mesh]:
    """This process as the only rank."""
    timeout = collective_timeout(config.train.step_timeout)
    platform.install()
    dist.init_process_group(
        platform.backend(),
        store=dist.HashStore(),  # pyright: ignore[reportPrivateImportUsage]
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=timeout),
    )
    try:
        mesh = build_mesh(Layout(), timeout=timeout)
        try:
            yield mesh
        finally:
            destroy_mesh()
    finally:
        dist.destroy_process_group()


def build_source(
    config: Config, mesh: Mesh, stack: ExitStack, done: int, reached: Callable[[str], None]
) -> RolloutSource:
    """What samples, after `done` steps; servers that it starts are ended by `stack`."""
    if config.model.random_init and not config.rollout.urls:
        raise ConfigError(
            "model.random_init: servers need weights in model.path; save some there, or name servers that "
            "run in rollout.urls"
        )
    seed_rng(config.run.seed)
    SCREEN.doing("reading the prompts")
    tokenizer = load_tokenizer(config.model.path)
    prompts = read_prompts(config, config.data.train, tokenizer)
    stack.enter_context(noting_bad_rows(config.run.dir, prompts, is_main=True))
    cursor = cursor_of(config, prompts)
    if done:
        cursor.restore(read_step(config.run.dir / NAME, done).cursor)
        say(f"goes on after step {done} in {config.run.dir}")
    SCREEN.doing("waiting for the servers" if config.rollout.urls else "starting servers")
    fleet = open_fleet(config, mesh, config.model.path, stack)
    experts = replayed_experts(config)
    wait_for_servers(fleet.serving, config.rollout.start_timeout, experts=experts is not None)
    fleet.version = version_of(fleet)
    begin(config, done)
    log = StepLog(config.run.dir, resume_step=done)
    say_dropped(config, log, "data.train", prompts)
    say_beginning(log, prompts)
    reward_model = build_frozen_reward_model(config, mesh)
    shape = batching_of(config, mesh)
    pool = stack.enter_context(reward_pool(config))
    most = config.reward.max_void
    rewards = RewardSource(
        mesh,
        pool,
        reward_title(config),
        most,
        reward_model,
        shape,
        Residency({}),
        weights=config.reward.weights,
        names=config.reward.functions,
    )
    timers = Timers()
    words = words_of(tokenizer)
    turns = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_staleness": 0})})
    servers = Servers(mesh, fleet, log, timers, shared=False)
    generation = Generation(
        mesh,
        servers,
        connect(turns, mesh, servers, tokenizer, stack),
        source=PromptSource(mesh, cursor, curriculum=None),
        rewards=rewards,
        sizes=sizes_of(turns),
        sampling=sampling_of(turns, lambda ids: decode_with(tokenizer, ids)),
        timers=timers,
        reached=reached,
    )
    writer = DumpWriter(
        run_dir=config.run.dir,
        every=1,
        keep=None,
        mesh=mesh,
        temperature=config.rollout.temperature,
        cursor=cursor,
        words=words,
    )
    return RolloutSource(config, fleet, generation, rewards, writer, log, timers)


def version_of(fleet: Fleet) -> str:
    """The weight version that all servers name.

    Raises:
        RolloutError: a server does not say, or two hold different ones.
    """

    async def ask(client: RolloutClient) -> str:
        return str((await client.model_info()).get("weight_version"))

    found, failed = asyncio.run(on_each(fleet.serving, ask))
    if failed or len(set(found.values())) != 1:
        what = {**found, **failed}
        raise RolloutError(f"the servers do not hold one version of the weights ({what}); start them anew")
    return next(iter(found.values()))


def _named(group: Group) -> Group:
    """With a number in the place of a version that is none, such as SGLang's `default`."""
    return replace(
        group,
        samples=tuple(
            replace(s, segments=tuple(replace(x, versions=_numbered(x.versions)) for x in s.segments))
            for s in group.samples
        ),
    )


def _numbered(versions: Sequence[VersionSpan]) -> tuple[VersionSpan, ...]:
    return tuple(v if v.version.isdecimal() else v._replace(version=INITIAL) for v in versions)
