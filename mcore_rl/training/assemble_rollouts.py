"""Builds what samples, for training and for evaluations: servers, requests, generation, held-out sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from mcore_rl.algo.algorithms import configure
from mcore_rl.config import Config
from mcore_rl.data.curriculum import Curriculum, load_curriculum
from mcore_rl.errors import ConfigError
from mcore_rl.log import StepLog, Timers, tell
from mcore_rl.model.build import Model
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.residency import Residency
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rewards import RewardFunction, RewardPool, Task
from mcore_rl.rollout.inflight import InFlight
from mcore_rl.training.assemble_servers import adapter_needs, build_fleet, transport_of
from mcore_rl.training.data import say_dropped
from mcore_rl.training.environment import build_environments, doubts_of_tools
from mcore_rl.training.evaluate import EvalSchedule, Evaluator
from mcore_rl.training.evaluation_sets import held_out_metrics, read_sets
from mcore_rl.training.faults.exits import say
from mcore_rl.training.generation import Generation
from mcore_rl.training.greedy import GreedyAnswers
from mcore_rl.training.prompt_source import PromptSource
from mcore_rl.training.publish import Publisher
from mcore_rl.training.requests import RolloutSizes, Sampling, open_requests
from mcore_rl.training.rewards import RewardCounts, RewardSource, reward_functions, reward_title
from mcore_rl.training.rundir import open_samples, published_to
from mcore_rl.training.servers import Servers
from mcore_rl.training.trainer import Trainer
from mcore_rl.types import ExpertLayers, Group, Tokens
from mcore_rl.weights.transport import Transport, wait_for_servers

_OF_STEP_TIMEOUT = 0.9
"""share of it that a lead may wait: it names the cause before the ranks that wait for it run out of time"""


def start_servers(
    config: Config, policy: Model, step_log: StepLog, timers: Timers, stack: ExitStack
) -> tuple[Servers, Transport]:
    """The servers, ready, and how the policy's weights reach them; ended by `stack`. Collective."""
    weights_dir = published_to(config)
    transport = transport_of(config, weights_dir)
    urls, launched = len(config.rollout.urls), config.rollout.servers
    what = f"waiting for {urls} servers" if urls else f"starting {launched} {config.rollout.server} server"
    tell(what + ("s ..." if not urls and launched > 1 else " ..."), is_main=policy.mesh.is_main)
    fleet = build_fleet(config, policy, weights_dir, stack)
    stack.callback(transport.close, fleet)
    shared = config.residency.servers == "released"
    wait = partial(
        wait_for_servers,
        fleet.serving,
        config.rollout.start_timeout,
        experts=config.rollout.routing_replay,
        releases=shared,
        adapters=adapter_needs(config),
    )
    on_main(policy.mesh, wait)
    return Servers(policy.mesh, fleet, step_log, timers, shared=shared), transport


def build_sampling(
    trainer: Trainer, servers: Servers, rewards: RewardSource, stack: ExitStack
) -> tuple[Generation, Evaluator, GreedyAnswers]:
    """What asks the servers for what is trained, continued where the run is, for what is evaluated, and for
    what ReMax compares with.

    The connections of a replica's lead are those of all; `stack` closes them.
    """
    config, mesh = trainer.config, trainer.mesh
    requests = connect(config, mesh, servers, trainer.tokenizer, stack)
    sampling = sampling_of(config, trainer.decode)
    source = PromptSource(mesh, trainer.cursor, curriculum_of(config))
    generation = Generation(
        mesh,
        servers,
        requests,
        source=source,
        rewards=rewards,
        sizes=sizes_of(config),
        sampling=sampling,
        timers=trainer.timers,
        reached=trainer.attempt.reached,
    )
    saved = trainer.attempt.saved
    if saved is not None and "ahead" in saved.document["state"]:
        generation.restore(saved.document["state"]["ahead"])
    sets = read_sets(config, trainer.tokenizer)
    for one in sets if mesh.is_main else ():
        say_dropped(config, trainer.step_log, one.key, one.found)
    evaluator = Evaluator(
        mesh,
        servers,
        requests,
        sets=sets,
        schedule=EvalSchedule(config.train.steps, config.train.eval_every, config.rollout.max_staleness > 0),
        sources={one.name: _source_of(config, rewards, one.function, stack) for one in sets},
        sampling=sampling,
        run_dir=config.run.dir,
        timers=trainer.timers,
        reached=trainer.attempt.reached,
    )
    greedy = GreedyAnswers(mesh, servers, requests, rewards, sampling, trainer.timers)
    return generation, evaluator, greedy


def reward_pool(config: Config, function: str | None = None) -> RewardPool:
    """The processes of a reward function, by default the run's, none of which runs yet."""
    r = config.reward
    own = function in (None, reward_title(config))
    functions = reward_functions(config) if own else (RewardFunction(str(function)),)
    model = config.model.path.absolute()
    processes = r.workers * (config.parallel.data or 1)
    task = Task(functions, r.weights, r.memory, model, timeout=r.timeout, processes=processes)
    return RewardPool(task, workers=r.workers)


def _source_of(config: Config, rewards: RewardSource, function: str | None, stack: ExitStack) -> RewardSource:
    """What scores a held-out set: the run's own source, or one of the set's `function`."""
    if function is None or (rewards.model is None and function == rewards.function):
        return rewards
    pool = stack.enter_context(reward_pool(config, function))
    return replace(rewards, pool=pool, function=function, model=None, tally=RewardCounts(), weights={})


def connect(
    config: Config, mesh: Mesh, servers: Servers, tokenizer: PreTrainedTokenizerBase, stack: ExitStack
) -> InFlight | None:
    """The connections of this rank to the servers, if it is a replica's lead; `stack` closes them."""
    timeout = _OF_STEP_TIMEOUT * config.train.step_timeout
    environments = build_environments(config, tokenizer) if mesh.is_replica_lead else None
    for what, remedy in doubts_of_tools(config, tokenizer) if mesh.is_main else ():
        say(f"warning: environment: {what}; {remedy}")
    if environments is not None:
        stack.callback(environments.close)
    requests = open_requests(mesh, servers.fleet, sizes_of(config), timeout, environments)
    if requests is not None:
        stack.callback(requests.close)
    return requests


def sampling_of(config: Config, decode: Callable[[Sequence[int] | Tokens], str]) -> Sampling:
    """How [rollout] asks for a sample, and how its text is read."""
    r = config.rollout
    launched = r.server == "embedded" and not r.urls
    plays = config.environment.function is not None
    streams = plays or (config.reward.model is None and not launched)
    return Sampling(r.sampling_params, config.run.seed, replayed_experts(config), decode, plays, streams)


def replayed_experts(config: Config) -> ExpertLayers | None:
    """What replies have to choose from, with rollout.routing_replay.

    Raises:
        ConfigError: the model has no experts.
    """
    if not config.rollout.routing_replay:
        return None
    arch = read_architecture(config.model.path)
    if arch.experts is None:
        raise ConfigError(
            f"rollout.routing_replay: a {arch.family} model has no experts whose choice could be replayed; "
            "set it to false"
        )
    return ExpertLayers(arch.experts.count, arch.experts.per_token, arch.experts.sparse_layers)


def sizes_of(config: Config) -> RolloutSizes:
    """What [rollout] says of how much is generated."""
    r, a = config.rollout, config.algorithm
    return RolloutSizes(
        steps=config.train.steps,
        groups=r.prompts_per_step,
        samples=r.samples_per_prompt,
        extra=r.over_sampling,
        max_staleness=r.max_staleness,
        outlived=config.environment.outlived,
        most_sampled=r.dynamic_sampling * r.prompts_per_step,
        by_parts=config.run.kind == "rl" and configure(a.name, a.params, a.loss).decoupled,
    )


def curriculum_of(config: Config) -> Curriculum | None:
    """What chooses among the prompts, if anything does. Raises ConfigError; see load_curriculum."""
    name = config.data.curriculum
    return None if name is None else Curriculum(name, load_curriculum(name), config.run.seed)


@dataclass(frozen=True)
class Served:
    """What a kind of training beside reinforcement learning asks of servers; every call is collective."""

    publish: Callable[[int], dict[str, float | str]]
    """hands the weights after a step to the servers; the metrics"""
    after: Callable[[int], dict[str, float | str]]
    """publishes and evaluates after a step that asks for it; the metrics"""
    collect: Callable[[int], list[Group]]
    """samples the prompts of a step from the weights that were published last"""


NOT_SERVED = Served(lambda step: {}, lambda step: {}, lambda step: [])
"""where nothing is sampled"""


@contextmanager
def served(trainer: Trainer) -> Iterator[Served]:
    """The servers of a kind of training beside reinforcement learning; none where it samples nothing."""
    config = trainer.config
    with ExitStack() as stack:
        if not config.samples_responses:
            yield NOT_SERVED
            return
        servers, transport = start_servers(config, trainer.policy, trainer.step_log, trainer.timers, stack)
        rewards = RewardSource(
            trainer.mesh,
            stack.enter_context(reward_pool(config)),
            reward_title(config),
            config.reward.max_void,
            None,
            trainer.shape,
            Residency({}),
            weights=config.reward.weights,
            names=config.reward.functions,
        )
        generation, evaluator, _ = build_sampling(trainer, servers, rewards, stack)
        publisher = Publisher(trainer, servers, transport, generation)
        keep = trainer.attempt.saved is not None
        on_main(trainer.mesh, lambda: open_samples(config.run.dir, keep=keep))
        trainer.attempt.reached("the servers were ready")

        def publish(step: int) -> dict[str, float | str]:
            return publisher.publish(step, trainer.probe_prompts())

        def after(step: int) -> dict[str, float | str]:
            due = evaluator.schedule.due(step)
            published = publish(step) if due or config.distills_samples else {}
            if not due:
                return published
            counted = held_out_metrics(evaluator.sets) if step == 0 else {}
            return published | counted | evaluator.after(step) | rewards.take_metrics()

        def collect(step: int) -> list[Group]:
            groups = generation.collect(step)
            servers.release()
            return groups

        yield Served(publish, after, collect)
