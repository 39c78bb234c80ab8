"""Builds a reinforcement-learning run from its config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from mcore_rl.algo.algorithms import Algorithm, configure
from mcore_rl.config import Config
from mcore_rl.errors import ConfigError
from mcore_rl.log import StepLog
from mcore_rl.model.build import Model, build_critic, build_policy, build_reward_model
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.residency import Offloaded, Residency, ResidentPart, Swapped, gradients_of, weights_of
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rewards import RewardPool, Task, load_reward
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.training.assemble_servers import build_fleet, transport_of
from mcore_rl.training.checkpoint import Contents, restore
from mcore_rl.training.data import data_metrics, say_dropped
from mcore_rl.training.evaluate import Evaluation
from mcore_rl.training.faults.exits import recorded
from mcore_rl.training.generation import Generation
from mcore_rl.training.metrics import GradientAlert
from mcore_rl.training.mismatch import Mismatch
from mcore_rl.training.objective import PolicyObjective, ValueObjective
from mcore_rl.training.requests import Bounds, Sampling, check_saved, open_requests
from mcore_rl.training.rewards import RewardSource
from mcore_rl.training.run import Critic, Run
from mcore_rl.training.rundir import open_samples, published_to
from mcore_rl.training.servers import Servers
from mcore_rl.training.setup import (
    load_tokenizer,
    model_settings,
    offloaded_optimizers,
    optimizer_of,
    read_prompts,
    start_trainer,
    trained_ddp,
)
from mcore_rl.training.trainer import Trainer
from mcore_rl.types import ExpertLayers
from mcore_rl.weights.transport import Transport, wait_for_servers

_OF_STEP_TIMEOUT = 0.9
"""of it, a lead may wait: it names the cause before the ranks that wait for it run out of time"""


@contextmanager
def start(config: Config, resume: str | None = None) -> Iterator[Run]:
    """Everything a run needs, undone on exit: process group, model, servers; continued by `resume`."""
    algorithm = configure(config.algorithm.name, config.algorithm.params, config.algorithm.loss)
    updates = config.algorithm.mini_batches * config.algorithm.epochs
    policy_steps = (config.train.steps - config.critic.warmup_rollouts) * updates
    load_reward(config.reward.function)  # what is wrong is said before anything is built
    replayed_experts(config)
    with (
        start_trainer(config, optimizer_steps=policy_steps, resume=resume) as trainer,
        ExitStack() as stack,
        recorded(config.run.dir),
    ):
        models = build_models(trainer, algorithm)
        check_saved(
            trainer.attempt.saved,
            config.rollout.max_staleness,
            read_architecture(config.model.path).vocab,
            replayed_experts(config),
        )
        restore(trainer, models.contents)  # before a server starts on the policy's weights
        residency = Residency(waiting_parts(config, models))  # before a server takes the memory
        weights_dir = published_to(config)
        transport = transport_of(config, weights_dir)
        fleet = build_fleet(config, trainer.policy, weights_dir, stack)
        stack.callback(transport.close, fleet)
        wait = partial(
            wait_for_servers,
            fleet.serving,
            config.rollout.start_timeout,
            experts=config.rollout.routing_replay,
            releases=config.residency.servers == "released",
        )
        on_main(trainer.mesh, wait)
        run = build_run(trainer, models, residency, fleet, transport, stack)
        keep = trainer.attempt.saved is not None
        on_main(trainer.mesh, lambda: open_samples(config.run.dir, keep=keep))
        trainer.attempt.reached("the servers were ready")
        yield run


@dataclass(frozen=True)
class Models:
    """The models of a run besides the policy, and what of all of them waits in host memory."""

    algorithm: Algorithm
    """that needs them"""
    reference: Model | None
    critic: Critic | None
    reward_model: Model | None
    waiting: Mapping[str, ResidentPart]
    """those that only score, since they were built"""
    contents: Contents
    """what a checkpoint holds of them, of the cursor and of the alert"""
    alert: GradientAlert


def build_models(trainer: Trainer, algorithm: Algorithm) -> Models:
    """Every model that the algorithm and the rewards need, where [residency] says; collective.

    Raises:
        ConfigError: as build_reward_model, with LayoutError; the reward model has another tokenizer than the
            policy.
    """
    config, mesh, where = trainer.config, trainer.mesh, trainer.config.residency
    waiting: dict[str, ResidentPart] = {}
    frozen: dict[str, Model] = {}
    reference = None
    if algorithm.needs_reference and where.reference == "swapped":
        reference, waiting["reference"] = trainer.policy, Swapped(trainer.policy)
    elif algorithm.needs_reference:
        reference = frozen["reference."] = build_reference(config, mesh)
        if where.reference == "offloaded":
            waiting["reference"] = Offloaded(partial(weights_of, reference), constant=True)
    critic = build_trained_critic(config, mesh) if algorithm.needs_critic else None
    reward_model = build_frozen_reward_model(config, mesh)
    if reward_model is not None:
        frozen["reward_model."] = reward_model
        if where.reward_model == "offloaded":
            waiting["reward_model"] = Offloaded(partial(weights_of, reward_model), constant=True)
    optimizers = {"": trainer.optimizer} | ({} if critic is None else {"critic.": critic.optimizer})
    alert = GradientAlert()
    contents = Contents(optimizers, frozen, {"cursor": trainer.cursor, "alert": alert})
    return Models(algorithm, reference, critic, reward_model, waiting, contents, alert)


def build_run(
    trainer: Trainer,
    models: Models,
    residency: Residency,
    fleet: Fleet,
    transport: Transport,
    stack: ExitStack,
) -> Run:
    """The run, whose models are restored; its requests to the servers are closed by `stack`."""
    config, mesh, algorithm = trainer.config, trainer.mesh, models.algorithm
    rewards = RewardSource(
        mesh,
        stack.enter_context(reward_pool(config)),
        config.reward.function,
        config.reward.max_void,
        models.reward_model,
        trainer.shape,
        residency,
    )
    shared = config.residency.servers == "released"
    servers = Servers(mesh, fleet, trainer.step_log, trainer.timers, shared=shared)
    generation = build_generation(trainer, servers, rewards, stack)
    contents = models.contents
    return Run(
        trainer=trainer,
        algorithm=algorithm,
        objective=PolicyObjective(algorithm, mesh.cp if mesh.layout.context > 1 else None),
        reference=models.reference,
        critic=models.critic,
        rewards=rewards,
        evaluation=load_evaluation(config, trainer.tokenizer, trainer.step_log, is_main=mesh.is_main),
        servers=servers,
        transport=transport,
        generation=generation,
        residency=residency,
        contents=replace(contents, stateful={**contents.stateful, "ahead": generation}),
        alert=models.alert,
        mismatch=Mismatch(
            config.publish.mismatch_action, config.publish.tolerance_p999, trainer.step_log, mesh.is_main
        ),
    )


def reward_pool(config: Config) -> RewardPool:
    """The processes of the reward function, none of which runs yet."""
    r = config.reward
    task = Task(r.function, r.weights, r.memory, config.model.path.absolute())
    return RewardPool(task, workers=r.workers, timeout=r.timeout)


def build_generation(
    trainer: Trainer, servers: Servers, rewards: RewardSource, stack: ExitStack
) -> Generation:
    """What asks the servers, continued where the run is; its requests are closed by `stack`."""
    config, saved = trainer.config, trainer.attempt.saved
    bounds = bounds_of(config)
    timeout = _OF_STEP_TIMEOUT * config.train.step_timeout
    requests = open_requests(trainer.mesh, servers.fleet, bounds, timeout)
    if requests is not None:
        stack.callback(requests.close)
    experts = replayed_experts(config)
    generation = Generation(
        trainer.mesh,
        servers,
        requests,
        prompts=trainer.prompts.prompts,
        cursor=trainer.cursor,
        rewards=rewards,
        bounds=bounds,
        sampling=Sampling(config.rollout.sampling_params, config.run.seed, experts, trainer.decode),
        timers=trainer.timers,
    )
    if saved is not None and "ahead" in saved.document["state"]:
        generation.restore(saved.document["state"]["ahead"])
    return generation


def waiting_parts(config: Config, models: Models) -> dict[str, ResidentPart]:
    """After `restore`: optimizer states and the critic wait in host memory too, where [residency] says so."""
    waiting = {**models.waiting, **offloaded_optimizers(config, models.contents.optimizers)}
    if models.critic is not None and config.residency.critic == "offloaded":
        model = models.critic.model
        waiting["critic"] = Offloaded(partial(weights_of, model), partial(gradients_of, model))
    return waiting


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


def bounds_of(config: Config) -> Bounds:
    """What [rollout] says of how much is generated."""
    r = config.rollout
    return Bounds(
        config.train.steps, r.prompts_per_step, r.samples_per_prompt, r.over_sampling, r.max_staleness
    )


def build_reference(config: Config, mesh: Mesh) -> Model:
    """The policy's starting weights, frozen."""
    settings = model_settings(config)
    settings["fp8"] = replace(settings["fp8"], param_gather=False)  # nothing gathers a frozen model
    return build_policy(config.model.path, mesh, **settings)


def build_frozen_reward_model(config: Config, mesh: Mesh) -> Model | None:
    """The reward model of the config, if there is one."""
    path = config.reward.model
    if path is None:
        return None
    check_same_tokens(config)
    settings = model_settings(config)
    fp8 = replace(settings["fp8"], param_gather=False)  # nothing gathers a frozen model
    return build_reward_model(path, mesh, precision=settings["precision"], fp8=fp8)


def build_trained_critic(config: Config, mesh: Mesh) -> Critic:
    """A critic on the policy's starting weights, with its own Adam."""
    c = config.critic
    model = build_critic(
        config.model.path,
        mesh,
        **model_settings(config),
        recompute=config.train.recompute,
        ddp=trained_ddp(config),
    )
    steps = config.train.steps * config.algorithm.mini_batches * config.algorithm.epochs
    optimizer = optimizer_of(config, model, steps, c.lr)
    return Critic(model, optimizer, ValueObjective(c.value_clip or None, c.coef))


def check_same_tokens(config: Config) -> None:
    """Raises ConfigError where the reward model would read other words in the ids that the policy samples.

    It may have tokens of its own besides, such as one for padding.
    """
    path = config.reward.model
    assert path is not None
    ours, theirs = (load_tokenizer(where).get_vocab() for where in (config.model.path, path))
    differing = sorted(token for token, number in ours.items() if theirs.get(token) != number)
    if differing:
        raise ConfigError(
            f"reward.model: {path} and model.path have different tokenizers ({len(differing)} tokens, such "
            f"as {differing[0]!r}); use a reward model of its family, or score text in reward.function"
        )


def load_evaluation(
    config: Config, tokenizer: PreTrainedTokenizerBase, step_log: StepLog, *, is_main: bool
) -> Evaluation:
    """Read the held-out prompts, at most `train.eval_samples`; there are none when data.eval is unset."""
    path, t = config.data.eval, config.train
    what = "accuracy" if config.reward.model is None else "reward"
    if path is None:
        return Evaluation((), "", what, t.steps, t.eval_every, {})
    found = read_prompts(config, path, tokenizer)
    if is_main:
        say_dropped(config, step_log, "eval", found)
    prompts, counted = found.prompts[: t.eval_samples], data_metrics("eval", found)
    return Evaluation(prompts, path.stem, what, t.steps, t.eval_every, counted)
