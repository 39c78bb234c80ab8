"""Builds a reinforcement-learning run from its config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mcore_rl.algo.algorithms import Algorithm, configure
from mcore_rl.config import Config
from mcore_rl.directories import is_ours
from mcore_rl.dumps import directory as dumps
from mcore_rl.errors import ConfigError
from mcore_rl.model.adapters import AdaptersOff
from mcore_rl.model.build import Model, build_classifier, build_critic, build_policy
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.residency import Offloaded, Residency, ResidentPart, Swapped, gradients_of, weights_of
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rewards import load_rewards
from mcore_rl.training.assemble_rollouts import (
    build_sampling,
    curriculum_of,
    replayed_experts,
    reward_pool,
    start_servers,
)
from mcore_rl.training.checkpoint import Contents, restore
from mcore_rl.training.critic import passes_of
from mcore_rl.training.environment import check_environment
from mcore_rl.training.evaluation_sets import load_set_functions
from mcore_rl.training.faults.exits import recorded
from mcore_rl.training.keep_rollouts import DumpWriter, open_dumps, words_of
from mcore_rl.training.kl_control import KLControl
from mcore_rl.training.layout import tuning_of
from mcore_rl.training.metrics import GradientAlert
from mcore_rl.training.mismatch import Mismatch, tolerances_of
from mcore_rl.training.objective import PolicyObjective, ValueObjective
from mcore_rl.training.publish import Publisher
from mcore_rl.training.requests import check_saved
from mcore_rl.training.rewards import RewardSource, reward_functions, reward_title
from mcore_rl.training.roles import RoleBaselines
from mcore_rl.training.run import Critic, Run
from mcore_rl.training.rundir import open_samples
from mcore_rl.training.servers import Servers
from mcore_rl.training.setup import (
    load_tokenizer,
    model_settings,
    offloaded_optimizers,
    optimizer_of,
    start_trainer,
    trained_ddp,
)
from mcore_rl.training.trainer import Attempt, Trainer
from mcore_rl.weights.transport import Transport


@contextmanager
def start(config: Config, resume: str | None = None) -> Iterator[Run]:
    """Everything a run needs, undone on exit: process group, model, servers; continued by `resume`."""
    algorithm = configure(config.algorithm.name, config.algorithm.params, config.algorithm.loss)
    load_rewards(reward_functions(config))  # what is wrong is said before anything is built
    check_environment(config)
    curriculum_of(config)
    load_set_functions(config)
    replayed_experts(config)
    with (
        start_trainer(config, optimizer_steps=policy_updates(config), resume=resume) as trainer,
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
        servers, transport = start_servers(config, trainer.policy, trainer.step_log, trainer.timers, stack)
        on_main(trainer.mesh, lambda: open_kept(config, trainer.attempt))
        trainer.attempt.reached("the servers were ready")
        yield build_run(trainer, models, residency, servers, transport, stack)


def policy_updates(config: Config) -> int:
    """Optimizer steps of the policy in the whole run."""
    updates = config.algorithm.mini_batches * config.algorithm.epochs
    return (config.train.steps - config.critic.warmup_rollouts) * updates


def open_kept(config: Config, attempt: Attempt) -> None:
    """On the main rank: the directories of what a run keeps of its rollouts, less those of another."""
    open_samples(config.run.dir, keep=attempt.saved is not None)
    if config.rollout.dump or is_ours(config.run.dir / dumps.NAME, "rollouts"):
        open_dumps(config.run.dir, "rollouts", after=attempt.step)


@dataclass(frozen=True)
class Models:
    """The models of a run besides the policy, and what of all of them waits in host memory."""

    algorithm: Algorithm
    """the algorithm, by which it was decided which of the models are needed"""
    reference: Model | None
    critic: Critic | None
    reward_model: Model | None
    waiting: Mapping[str, ResidentPart]
    """models that only score, offloaded since they were built; optimizers follow in `waiting_parts`"""
    contents: Contents
    """what a checkpoint holds of them, of the cursor, the alert, the KL's coefficient and the roles"""
    alert: GradientAlert
    kl: KLControl
    roles: RoleBaselines


def build_models(trainer: Trainer, algorithm: Algorithm, *, rewards: bool = True) -> Models:
    """Every model that the algorithm and, with `rewards`, a reward model need, where [residency] says.

    Collective.

    Raises:
        ConfigError: as build_classifier, with LayoutError; one has another tokenizer than the policy.
    """
    config, mesh, where = trainer.config, trainer.mesh, trainer.config.residency
    waiting: dict[str, ResidentPart] = {}
    frozen: dict[str, Model] = {}
    reference = None
    if algorithm.needs_reference and trainer.policy.adapters is not None:
        reference, waiting["reference"] = trainer.policy, AdaptersOff(trainer.policy.unwrapped)
    elif algorithm.needs_reference and where.reference == "swapped":
        reference, waiting["reference"] = trainer.policy, Swapped(trainer.policy)
    elif algorithm.needs_reference:
        reference = frozen["reference."] = build_reference(config, mesh)
        if where.reference == "offloaded":
            waiting["reference"] = Offloaded(partial(weights_of, reference), constant=True)
    critic = build_trained_critic(config, mesh) if algorithm.needs_critic else None
    reward_model = build_frozen_reward_model(config, mesh) if rewards else None
    if reward_model is not None:
        frozen["reward_model."] = reward_model
        if where.reward_model == "offloaded":
            waiting["reward_model"] = Offloaded(partial(weights_of, reward_model), constant=True)
    optimizers = {"": trainer.optimizer} | ({} if critic is None else {"critic.": critic.optimizer})
    alert, kl, roles = GradientAlert(), KLControl(algorithm), RoleBaselines(algorithm)
    stateful = {"cursor": trainer.cursor, "alert": alert, "kl": kl, "roles": roles}
    contents = Contents(optimizers, frozen, stateful)
    return Models(algorithm, reference, critic, reward_model, waiting, contents, alert, kl, roles)


def build_run(
    trainer: Trainer,
    models: Models,
    residency: Residency,
    servers: Servers,
    transport: Transport,
    stack: ExitStack,
) -> Run:
    """The run, whose models are restored; its requests to the servers are closed by `stack`."""
    config = trainer.config
    rewards = RewardSource(
        trainer.mesh,
        stack.enter_context(reward_pool(config)),
        reward_title(config),
        config.reward.max_void,
        models.reward_model,
        trainer.shape,
        residency,
        weights=config.reward.weights,
        names=config.reward.functions,
    )
    generation, evaluator, greedy = build_sampling(trainer, servers, rewards, stack)
    parts = learner_parts(trainer, models, residency)
    stateful = {**models.contents.stateful, "ahead": generation}
    parts["contents"] = replace(models.contents, stateful=stateful)
    return Run(
        **parts,
        rewards=rewards,
        evaluator=evaluator,
        servers=servers,
        publisher=Publisher(trainer, servers, transport, generation),
        greedy=greedy,
        generation=generation,
    )


def learner_parts(trainer: Trainer, models: Models, residency: Residency) -> dict[str, Any]:
    """The fields of a Learner, whose models are restored."""
    config, mesh, algorithm = trainer.config, trainer.mesh, models.algorithm
    return {
        "trainer": trainer,
        "algorithm": algorithm,
        "objective": PolicyObjective(algorithm, mesh.cp if mesh.layout.context > 1 else None),
        "reference": models.reference,
        "critic": models.critic,
        "residency": residency,
        "contents": models.contents,
        "alert": models.alert,
        "kl": models.kl,
        "roles": models.roles,
        "mismatch": Mismatch(
            config.publish.mismatch_action,
            tolerances_of(config, trainer.policy.arch.layers).p999,
            trainer.step_log,
            mesh.is_main,
        ),
        "dumps": DumpWriter(
            run_dir=config.run.dir,
            every=config.rollout.dump,
            keep=config.rollout.dump_keep,
            mesh=mesh,
            temperature=config.rollout.temperature,
            cursor=trainer.cursor,
            words=words_of(trainer.tokenizer),
        ),
    }


def waiting_parts(config: Config, models: Models) -> dict[str, ResidentPart]:
    """After `restore`: optimizer states and the critic wait in host memory too, where [residency] says so."""
    waiting = {**models.waiting, **offloaded_optimizers(config, models.contents.optimizers)}
    if models.critic is not None and config.residency.critic == "offloaded":
        model = models.critic.model
        waiting["critic"] = Offloaded(partial(weights_of, model), partial(gradients_of, model))
    return waiting


def build_reference(config: Config, mesh: Mesh) -> Model:
    """The policy's starting weights, frozen."""
    settings = model_settings(config)
    settings["fp8"] = replace(settings["fp8"], param_gather=False)  # nothing gathers a frozen model
    return build_policy(config.model.path, mesh, **settings, tuning=tuning_of(config, trained=False))


def build_frozen_reward_model(config: Config, mesh: Mesh) -> Model | None:
    """The reward model of the config, if there is one."""
    path = config.reward.model
    if path is None:
        return None
    check_same_tokens(config, "reward.model", path)
    settings = model_settings(config)
    fp8 = replace(settings["fp8"], param_gather=False)  # nothing gathers a frozen model
    tuning = tuning_of(config, trained=False)
    return build_classifier(
        path, mesh, "reward.model", precision=settings["precision"], fp8=fp8, tuning=tuning
    )


def build_trained_critic(config: Config, mesh: Mesh) -> Critic:
    """The critic with its own Adam."""
    c = config.critic
    model = build_critic_of(config, mesh)
    passes = [passes_of(c, config.algorithm.epochs, step) for step in range(1, config.train.steps + 1)]
    optimizer = optimizer_of(config, model, sum(passes) * config.algorithm.mini_batches, c.lr)
    return Critic(model, optimizer, ValueObjective(c.value_clip or None, c.coef))


def build_critic_of(config: Config, mesh: Mesh) -> Model:
    """A critic on the policy's starting weights, or those of its own directory, to be trained."""
    path, ddp = config.critic.path, trained_ddp(config, mesh.layout)
    trained: dict[str, Any] = {"tuning": tuning_of(config, trained=True), "ddp": ddp}
    settings = model_settings(config)
    if path is None:
        return build_critic(config.model.path, mesh, **settings, **trained)
    check_same_tokens(config, "critic.path", path)
    settings.pop("random_seed")
    return build_classifier(path, mesh, "critic.path", **settings, **trained)


def check_same_tokens(config: Config, key: str, path: Path) -> None:
    """Raises ConfigError where a model would read other words in the ids that the policy samples.

    It may have tokens of its own besides, such as one for padding.

    Args:
        key: of the config, which names its directory `path`.
    """
    ours, theirs = (load_tokenizer(where).get_vocab() for where in (config.model.path, path))
    differing = sorted(token for token, number in ours.items() if theirs.get(token) != number)
    if differing:
        raise ConfigError(
            f"{key}: {path} and model.path have different tokenizers ({len(differing)} tokens, such as "
            f"{differing[0]!r}); use a model of its family"
            + (", or score text in reward.function" if key == "reward.model" else "")
        )
