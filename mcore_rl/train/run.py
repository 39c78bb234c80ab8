"""A reinforcement-learning run: the trainer's parts and the servers it samples from."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np

from mcore_rl.algo.algorithms import Algorithm, configure
from mcore_rl.config import Config, is_loopback
from mcore_rl.data.cursor import share
from mcore_rl.directories import write_whole
from mcore_rl.errors import ConfigError, RolloutError
from mcore_rl.model.architecture import read_architecture
from mcore_rl.model.build import Model, build_critic, build_policy
from mcore_rl.model.optimizer import Optimizer
from mcore_rl.model.residency import Offloaded, Swapped, gradients_of, weights_of
from mcore_rl.parallel.control import of_all, on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.rewards import load_reward
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.rollout.local import LocalServer
from mcore_rl.rollout.programs import Embedded, SGLang
from mcore_rl.rollout.sampler import sample_groups
from mcore_rl.train.ahead import Ahead
from mcore_rl.train.checkpoint import restore
from mcore_rl.train.data import count_dropped
from mcore_rl.train.ending import recorded
from mcore_rl.train.judge import Judge, place_reward_model
from mcore_rl.train.metrics import ON_POLICY_RATIO, GradientAlert
from mcore_rl.train.mismatch import Notices, notice
from mcore_rl.train.objective import PolicyObjective, ValueObjective
from mcore_rl.train.rundir import open_samples, published_to
from mcore_rl.train.setup import (
    Trainer,
    model_settings,
    offload_optimizers,
    optimizer_of,
    read_prompts,
    start_trainer,
    trained_ddp,
)
from mcore_rl.train.share import share_groups
from mcore_rl.types import ExpertLayers, Group, Prompt, Tokens
from mcore_rl.weights.broadcast import Distributed
from mcore_rl.weights.disk import Changes, Disk, export
from mcore_rl.weights.encoding import ENCODINGS
from mcore_rl.weights.shared import SharedTensor
from mcore_rl.weights.transport import Transport, wait_for_servers

_CALLS_PER_SERVER = 4
"""of a rollout: few, for the servers batch; not one, so that what a lost server had is not everything"""


@dataclass(frozen=True)
class Critic:
    """The value model in training."""

    model: Model
    optimizer: Optimizer
    objective: ValueObjective


@dataclass
class Run(Trainer):
    """What the loop needs besides the trainer."""

    algorithm: Algorithm
    objective: PolicyObjective
    reference: Model | None
    """the frozen starting policy, where the algorithm needs one"""
    critic: Critic | None
    """where the algorithm needs one"""
    alert: GradientAlert
    judge: Judge
    """gives every sample its reward"""
    eval_prompts: Sequence[Prompt]
    fleet: Fleet
    """the rollout servers"""
    transport: Transport
    """how versions reach the servers"""
    ahead: Ahead | None = None
    """generates beside training; None where rollouts and training take turns"""
    experts: ExpertLayers | None = None
    """of the policy, where its routing is replayed"""
    notices: Notices = field(default_factory=Notices)
    """what the terminal was told of a mismatch to the servers"""

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """As Trainer's; a gradient scale or a mismatch to the servers out of bounds is an event too."""
        if self.ahead is not None:
            metrics = {**metrics, **self.ahead.metrics}
        super().log(step, metrics)
        notice(self, step, metrics)
        if self.alert.due(metrics):
            self.step_log.event("gradient_scale", step=step, ratio=metrics[ON_POLICY_RATIO])

    def lose(self, lost: Mapping[str, str]) -> None:
        """These servers (url -> why, the same on every rank) serve no more until a publish; collective.

        Those of this machine are started anew, at once or (residency.servers) at the next publish, and are
        published to when they answer. One that is known to be lost already, or was under an address that it
        has no more, is no news.
        """
        serving = {client.url for client in self.fleet.serving}
        lost = {url: why for url, why in lost.items() if url in serving}
        for url, why in lost.items():
            self.step_log.event("server_lost", url=url, why=why)
        self.fleet.lose(lost)
        if self.fleet.standing.lost:
            shared = self.config.residency.servers == "released"  # one that starts would take the memory
            again = self.fleet.end_lost if shared else self.fleet.restart_lost
            self.fleet.standing = on_main(self.mesh, again)

    @property
    def temperature(self) -> float:
        """Of sampling, and therefore of every log-prob."""
        return self.config.rollout.temperature

    def decode(self, ids: Sequence[int] | Tokens) -> str:
        """A response as text, for rewards and people."""
        return str(self.tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True))

    def probe_prompts(self) -> list[tuple[int, ...]]:
        """Token sequences for the check of the first publish, before anything was sampled."""
        return [prompt.token_ids for prompt in self.prompts.prompts[: self.config.publish.probe_sequences]]


@contextmanager
def start(config: Config, resume: str | None = None) -> Iterator[Run]:
    """Everything a run needs, undone on exit: process group, model, servers; continued by `resume`."""
    algorithm = configure(config.algorithm.name, config.algorithm.params, config.algorithm.loss)
    updates = config.algorithm.mini_batches * config.algorithm.epochs
    policy_steps = (config.train.steps - config.critic.warmup_rollouts) * updates
    reward = load_reward(config.reward.function)
    experts = replayed_experts(config)
    with (
        start_trainer(config, optimizer_steps=policy_steps, resume=resume) as trainer,
        ExitStack() as stack,
        recorded(config.run.dir),
    ):
        alert = GradientAlert()
        trainer.stateful["alert"] = alert
        reference = place_reference(trainer) if algorithm.needs_reference else None
        critic = build_trained_critic(config, trainer.mesh) if algorithm.needs_critic else None
        if critic is not None:
            trainer.optimizers["critic."] = critic.optimizer
        vocabulary = read_architecture(config.model.path).vocab
        prompts, ahead = trainer.prompts.prompts, None
        if config.rollout.max_staleness:
            ahead = Ahead(config, prompts, vocabulary, experts)
            trainer.stateful["ahead"] = ahead
        judge = Judge(reward, place_reward_model(trainer))
        restore(trainer)  # before a server starts on the policy's weights
        offload_trained(trainer, critic)
        weights_dir = published_to(config)
        transport = transport_of(config, weights_dir)
        fleet = build_fleet(config, trainer.policy, weights_dir, stack)
        stack.callback(transport.close, fleet)
        wait = partial(
            wait_for_servers,
            fleet.serving,
            config.rollout.start_timeout,
            experts=experts is not None,
            releases=config.residency.servers == "released",
        )
        on_main(trainer.mesh, wait)
        if ahead is not None:
            ahead.start(trainer.mesh, fleet)
            stack.callback(ahead.close)
        keep = trainer.saved is not None
        on_main(trainer.mesh, lambda: open_samples(config.run.dir, keep=keep))
        trainer.reached("the servers were ready")
        yield Run(
            **{field.name: getattr(trainer, field.name) for field in fields(Trainer)},
            algorithm=algorithm,
            objective=PolicyObjective(
                algorithm, trainer.mesh.cp if trainer.mesh.layout.context > 1 else None
            ),
            reference=reference,
            critic=critic,
            alert=alert,
            judge=judge,
            eval_prompts=load_eval(trainer),
            fleet=fleet,
            transport=transport,
            ahead=ahead,
            experts=experts,
        )


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


def place_reference(trainer: Trainer) -> Model:
    """The reference where [residency] says; `swapped`, the policy, with its start in that phase."""
    where = trainer.config.residency.reference
    if where == "swapped":
        trainer.residency.parts["reference"] = Swapped(trainer.policy)
        return trainer.policy
    reference = trainer.frozen["reference."] = build_reference(trainer.config, trainer.mesh)
    if where == "offloaded":
        trainer.residency.parts["reference"] = Offloaded(partial(weights_of, reference), constant=True)
    return reference


def offload_trained(trainer: Trainer, critic: Critic | None) -> None:
    """After `restore`: optimizer states and the critic wait in host memory, where [residency] says so."""
    offload_optimizers(trainer)
    if critic is not None and trainer.config.residency.critic == "offloaded":
        model = critic.model
        trainer.residency.parts["critic"] = Offloaded(
            partial(weights_of, model), partial(gradients_of, model)
        )


def build_reference(config: Config, mesh: Mesh) -> Model:
    """The policy's starting weights, frozen."""
    settings = model_settings(config)
    settings["fp8"] = replace(settings["fp8"], param_gather=False)  # nothing gathers a frozen model
    return build_policy(config.model.path, mesh, **settings)


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


def build_fleet(config: Config, policy: Model, weights_dir: Path, stack: ExitStack) -> Fleet:
    """The configured servers, or those that the main rank starts on the policy's own weights; collective."""
    r = config.rollout
    leads = of_all(policy.mesh, socket.gethostname() if policy.mesh.is_replica_lead else "")
    check_reach(r.urls, [host for host in leads if host])
    local: list[LocalServer] = []
    initial = None

    def launch() -> list[str]:
        local.extend(local_servers(config, weights_dir.resolve() / "initial"))
        for server in local:  # all at once, then wait: most of a start is imports
            stack.callback(server.close)
            server.launch()
        for server in local:
            server.wait()
        return [server.url for server in local]

    if r.urls:
        urls = list(r.urls)
    else:
        initial = weights_dir.resolve() / "initial"
        export(policy, initial, encoding=ENCODINGS[config.publish.quantize])
        urls = on_main(policy.mesh, launch)
    return Fleet(
        urls,
        vocabulary=read_architecture(config.model.path).vocab,
        api_key_env=r.api_key_env,
        timeout=r.timeout,
        health_timeout=r.health_timeout,
        local=local,
        initial=initial,
    )


def check_reach(urls: Sequence[str], hosts: Sequence[str]) -> None:
    """Raises ConfigError, on every rank, where leads of several `hosts` would not ask the same servers.

    Args:
        urls: servers that already run; none, they are to be started on the first host.
    """
    others = set(hosts) - {hosts[0]}
    here = [url for url in urls if is_loopback(url)]
    if not others or (urls and not here):
        return
    named = f"{here[0]} is" if urls else "servers that a run starts are"
    raise ConfigError(
        f"rollout.urls: {named} reached from one machine alone, but {hosts[0]} and {min(others)} ask; "
        "start them yourself and list them by an address that all machines reach"
    ).on_every_rank()


def transport_of(config: Config, weights_dir: Path) -> Transport:
    """The configured one. Raises ConfigError where it cannot work in this launch."""
    p = config.publish
    encoding = ENCODINGS[p.quantize]
    if p.transport == "tensor":
        return SharedTensor(p.bucket_mib << 20, encoding)
    if p.transport == "distributed":
        return Distributed(p.bucket_mib << 20, encoding)
    if p.replica is not None:
        return Changes(weights_dir, p.replica, timeout=config.rollout.timeout, encoding=encoding)
    return Disk(weights_dir, encoding)


def local_servers(config: Config, model_dir: Path) -> list[LocalServer]:
    """The servers that [rollout] asks for on this machine, not started; `server.log`, `server_1.log`, ..."""
    r = config.rollout
    if r.python is not None:
        dtype = {"fp32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}[config.model.precision]
        options = (*(["--enable-return-routed-experts"] if r.routing_replay else []), *r.options)
        program = SGLang(r.python, dtype=dtype, api_key_env=r.api_key_env, options=options)
    else:
        program = Embedded(api_key_env=r.api_key_env, threads=r.threads, options=r.options)
    names = ["server.log", *(f"server_{number}.log" for number in range(1, r.servers))]
    logs = [config.run.dir / name for name in names]
    return [LocalServer(model_dir, program, log_file=log, start_timeout=r.start_timeout) for log in logs]


def load_eval(trainer: Trainer) -> tuple[Prompt, ...]:
    """Held-out prompts, at most `train.eval_samples`; none when data.eval is unset."""
    config = trainer.config
    if config.data.eval is None:
        return ()
    found = read_prompts(config, config.data.eval, trainer.tokenizer)
    count_dropped(trainer, "eval", found)
    return found.prompts[: config.train.eval_samples]


def rollout(run: Run, step: int) -> list[Group]:
    """Sample and score one step's prompts; each replica asks for its own share. All groups, on every rank."""
    if run.ahead is not None:
        groups = run.ahead.collect(run, step)
    else:
        prompts = run.cursor.next(run.config.rollout.prompts_per_step)
        each = run.config.rollout.samples_per_prompt
        groups = sample(run, prompts, step, each, experts=run.experts)
    if not any(group.samples for group in groups):
        raise RolloutError(
            f"step {step}: the servers aborted all {len(groups)} groups; see their logs"
        ).on_every_rank()
    save_samples(run, step, groups)
    return groups


def sample(
    run: Run,
    prompts: Sequence[Prompt],
    step: int | str,
    samples_per_prompt: int,
    *,
    experts: ExpertLayers | None = None,
) -> list[Group]:
    """Scored groups of `prompts`, each replica's lead asking for its share; all of them, on every rank.

    Every token comes from the weights that were published last: the ratio of 1 rests on it.
    """
    mine = share(prompts, run.mesh.dp_rank, run.mesh.layout.data)

    async def ask() -> tuple[list[Group], Mapping[str, str]]:
        async with run.fleet.dispatch(run.mesh.dp_rank, run.mesh.layout.data) as servers:
            sampled = await sample_groups(
                servers.ask,
                mine,
                step=step,
                samples_per_prompt=samples_per_prompt,
                sampling_params=run.config.rollout.sampling_params,
                tokenizer_decode=run.decode,
                seed=run.config.run.seed,
                calls=_CALLS_PER_SERVER * len(servers) if len(servers) > 1 else 1,
                experts=experts,
            )
        return sampled, servers.lost

    def work() -> tuple[list[Group], Mapping[str, str]]:
        with run.timers("rollout"):
            sampled, lost = asyncio.run(ask())
        with run.timers("reward"):
            return run.judge.by_function(sampled), lost

    groups, losses = share_groups(run.mesh, {prompt.id: prompt for prompt in prompts}, work)
    run.lose({url: why for lost in losses for url, why in lost.items()})
    with run.timers("reward"), run.residency.during("rewards"):
        return run.judge.by_model(groups, run.shape)


def save_samples(run: Run, step: int, groups: Sequence[Group], count: int = 8) -> None:
    """RUN_DIR/samples/step_N.jsonl: the first sample of a few groups, for people; collective."""
    shown = [group.samples[0] for group in groups if group.samples][:count]
    records = (
        {
            "step": step,
            "prompt": s.prompt.text,
            "response": run.decode(s.token_ids),
            "label": s.prompt.label,
            "reward": s.reward,
        }
        for s in shown
    )
    path = run.config.run.dir / "samples" / f"step_{step}.jsonl"
    on_main(run.mesh, lambda: write_whole(path, "".join(json.dumps(record) + "\n" for record in records)))
