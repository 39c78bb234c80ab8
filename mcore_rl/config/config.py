"""A whole configuration: the sections joined, and the rules between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from types import ModuleType
from urllib.parse import urlsplit

from pydantic import PrivateAttr, ValidationInfo, model_validator

from mcore_rl.config.environment import EnvironmentConfig, unused_of_environment, wrong_environment
from mcore_rl.config.held_out import set_name, wrong_sets
from mcore_rl.config.kinds import keys_of_one_name, unused_of_kind, wrong_of_kind
from mcore_rl.config.lora import LoraConfig, unused_of_lora, wrong_lora
from mcore_rl.config.names import misnamed
from mcore_rl.config.on_cpu import wrong_on_cpu
from mcore_rl.config.parallel import ParallelConfig
from mcore_rl.config.rewards import wrong_rewards
from mcore_rl.config.rows import DistillConfig, PreferenceConfig, RewardModelConfig, SupervisedConfig
from mcore_rl.config.sections import (
    AlgorithmConfig,
    CriticConfig,
    DataConfig,
    EvalConfig,
    EvalSetConfig,
    ModelConfig,
    OptimizerConfig,
    PublishConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    Section,
    TrainConfig,
)
from mcore_rl.config.state import CheckpointConfig, ResidencyConfig
from mcore_rl.config.unused import misleads, unused_of_servers
from mcore_rl.config.watch import WatchConfig, wrong_watch
from mcore_rl.imports import uncollected
from mcore_rl.precision import RECIPES, packed_multiple, token_multiple

BEFORE_TORCH = {"before_torch": True}
"""context of a validation that leaves out the rules which read the algorithms, for which torch is imported"""
_WARM_UP_SHARE = 4
"""a warm-up that is longer than the run becomes one part of so many"""


class Config(Section):
    """A whole run. Construct it with `load_config`, which says where a mistake is and what to do about it."""

    run: RunConfig
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    eval: EvalConfig = EvalConfig()
    rollout: RolloutConfig = RolloutConfig()
    environment: EnvironmentConfig = EnvironmentConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig = CriticConfig()
    train: TrainConfig
    residency: ResidencyConfig = ResidencyConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    supervised: SupervisedConfig = SupervisedConfig()
    preference: PreferenceConfig = PreferenceConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    distill: DistillConfig = DistillConfig()
    publish: PublishConfig = PublishConfig()
    watch: WatchConfig = WatchConfig()
    _cut: str = PrivateAttr("")
    """what was shortened, since the run is shorter"""

    @model_validator(mode="after")
    def _wider_below_float32(self) -> Config:
        """Publish tolerances that are not given: not those of float32, where weights are published."""
        given = self.publish.model_fields_set
        wider = {name: None for name in ("tolerance_p999", "tolerance_max") if name not in given}
        if self.model.precision != "fp32" and self.samples_responses:
            object.__setattr__(self, "publish", self.publish.model_copy(update=wider))  # it is frozen
        return self

    @model_validator(mode="after")
    def _warm_up_within_the_run(self) -> Config:
        """A file of a long run serves a short one: its warm-up would else be all of it."""
        total, given = self.optimizer_steps, self.optimizer.warmup_steps
        if given > total:
            cut = total // _WARM_UP_SHARE
            self._cut = (
                f"optimizer.warmup_steps: cut from {given} to {cut}, of a run of {total} optimizer steps"
            )
            object.__setattr__(self, "optimizer", self.optimizer.model_copy(update={"warmup_steps": cut}))
        return self

    @model_validator(mode="after")
    def _no_contradictions(self, info: ValidationInfo) -> Config:
        found = [*_contradictions(self), *wrong_watch(self.watch, self.train.steps)]
        if info.context != BEFORE_TORCH:
            found += [*_of_algorithm(self), *_without_effect(self)]
        if found:
            raise ValueError("\n".join(found))
        return self

    @property
    def held_out(self) -> dict[str, EvalSetConfig]:
        """Every set that is evaluated, by name; that of data.eval, which is named after its file, first."""
        one = {} if self.data.eval is None else {set_name(self.data.eval): EvalSetConfig(path=self.data.eval)}
        return {**one, **self.eval.sets}

    @property
    def optimizer_steps(self) -> int:
        """Updates of the policy in the whole run."""
        a = self.algorithm
        return self.train.steps * (a.mini_batches * a.epochs if self.run.kind == "rl" else 1)

    @property
    def longest_response(self) -> int:
        """Tokens that one sequence of a sample may have behind its prompt."""
        plays = self.environment.function is not None
        return self.environment.max_tokens if plays else self.rollout.max_new_tokens

    @property
    def samples_responses(self) -> bool:
        """Servers are needed: to train on rollouts, or to evaluate."""
        return not self.trains_on_rows or bool(self.held_out)

    @property
    def trains_on_rows(self) -> bool:
        """No rollouts: the data has what is trained on."""
        return self.run.kind != "rl" and not self.distills_samples

    @property
    def distills_samples(self) -> bool:
        """The student is compared with its teacher on what it samples."""
        return self.run.kind == "distill" and self.distill.on_policy


def _contradictions(config: Config) -> Iterator[str]:
    """`section.key: what, remedy` for every pair of keys that cannot go together."""
    parallel, rollout, train = config.parallel, config.rollout, config.train
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence: splits over tensor-parallel ranks; set parallel.tensor >= 2 or drop it"
    if parallel.virtual_pipeline and parallel.pipeline == 1:
        yield "parallel.virtual_pipeline: needs pipeline stages; set parallel.pipeline >= 2 or drop it"
    yield from _of_data(config)
    if train.eval_every and not config.held_out and config.data.validation is None:
        yield "train.eval_every: there is nothing to evaluate on; set data.eval or [eval.sets.NAME]"
    yield from wrong_rewards(config.reward)
    yield from wrong_environment(config.environment, config.data, rollout, config.reward, train)
    yield from wrong_sets(config.eval.sets, config.data.eval, config.reward, rollout.temperature)
    p999, largest = config.publish.tolerance_p999, config.publish.tolerance_max
    if p999 is not None and largest is not None and p999 > largest:
        yield "publish.tolerance_p999: exceeds publish.tolerance_max; lower it"
    if config.run.kind == "rl":
        yield from misnamed(config.algorithm.name)
    of_kind = (config.preference, config.distill, config.supervised, config.residency.reference)
    yield from wrong_of_kind(config.run.kind, *of_kind)
    yield from wrong_lora(config.lora, config.run.kind, config.model, config.optimizer, config.publish)
    yield from keys_of_one_name(config.run.kind, config.preference, config.data)
    yield from _of_servers(config)
    yield from _of_transport(config)
    yield from _of_fp8(config)
    yield from _of_memory(config)
    if config.publish.quantize == "fp8":
        yield from _of_quantized(config)
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    if config.run.kind == "rl" and config.algorithm.mini_batches > samples:
        yield (
            f"algorithm.mini_batches: {config.algorithm.mini_batches} from the {samples} samples of a "
            "rollout; lower it, or raise rollout.prompts_per_step"
        )
    if config.critic.warmup_rollouts >= train.steps:
        yield (
            f"critic.warmup_rollouts: the policy would never learn in a run of {train.steps} rollouts; "
            "lower it, or raise train.steps"
        )
    yield from _of_lengths(config)


def _of_algorithm(config: Config) -> Iterator[str]:
    if config.run.kind == "rl" and not list(misnamed(config.algorithm.name)):
        plays = config.environment.function is not None
        yield from _effects().wrong_algorithm(config.algorithm, config.rollout, plays=plays)


def _of_data(config: Config) -> Iterator[str]:
    data = config.data
    if data.weights and len(data.weights) != len(data.train):
        yield (
            f"data.weights: {len(data.weights)} for the {len(data.train)} paths of data.train; give one for "
            "each, or none"
        )
    if len(data.weights) == 1 == len(data.train):
        yield "data.weights: has no effect on one path; remove it"
    reads_rows = config.run.kind in ("sft", "distill") and config.trains_on_rows
    trains_labels = reads_rows and config.supervised.target == "label"
    if trains_labels and not data.label_key and data.last_assistant != "drop":
        yield (
            f'data.label_key: run.kind = "{config.run.kind}" trains on labels; name their key, or set '
            'data.last_assistant = "drop" to train on the last turns'
        )


def _of_lengths(config: Config) -> Iterator[str]:
    parallel, train, rollout = config.parallel, config.train, config.rollout
    if not config.samples_responses:
        return  # rows are checked when they are read
    of_sets = [one.max_new_tokens or 0 for one in config.eval.sets.values() if one.reward is None]
    responses = [rollout.max_new_tokens, *(of_sets if config.reward.model is not None else [])]
    longest = config.data.max_prompt_tokens + max(responses)
    what = "data.max_prompt_tokens + max_new_tokens"
    if config.environment.function is not None:
        longest, what = config.environment.max_tokens, "environment.max_tokens"
    longest += config.reward.model is not None  # its score is a row of its own behind the response
    tokens = token_multiple(config.model.precision, config.model.fp8_recipe)
    align = packed_multiple(parallel.tensor, parallel.context, tokens, sequence=parallel.sequence)
    if -(-longest // align) * align > train.tokens_per_micro_batch:
        yield (
            f"train.tokens_per_micro_batch: {train.tokens_per_micro_batch} cannot hold one sequence of "
            f"{longest} tokens ({what}, padded to {align}); raise it"
        )


def _of_servers(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if config.residency.servers == "released":
        if rollout.server == "embedded" and not rollout.urls:
            yield (
                "residency.servers: the embedded server keeps its memory; set "
                'rollout.server = "sglang", or drop it'
            )
        if config.publish.transport != "disk":
            yield (
                "residency.servers: only weights from disk fill released memory; set "
                'publish.transport = "disk", or drop it'
            )
        if rollout.max_staleness:
            yield (
                "residency.servers: servers that generate beside training cannot give up their memory; set "
                "rollout.max_staleness = 0, or drop it"
            )
    twice = [url for url, times in Counter(rollout.urls).items() if times > 1]
    if twice:
        yield f"rollout.urls: {twice[0]} is named twice, and would be sent weights twice; name it once"
    if rollout.server == "sglang" and rollout.python is None and not rollout.urls:
        yield "rollout.python: name the interpreter that SGLang is installed for (.venv-sglang/bin/python)"


def _of_transport(config: Config) -> Iterator[str]:
    publish, rollout = config.publish, config.rollout
    if publish.replica is not None and not rollout.urls:
        yield "publish.replica: the servers that a run starts read publish.dir; set rollout.urls or drop it"
    if publish.transport == "disk":
        return
    if rollout.server == "embedded" and not rollout.urls:
        yield (
            'publish.transport: the embedded server loads weights from disk only; set it to "disk", or '
            'rollout.server = "sglang"'
        )
    away = [url for url in rollout.urls if not is_loopback(url)]
    if publish.transport == "tensor" and away:
        yield (
            f'publish.transport: "tensor" hands over memory of this machine, which {away[0]} may not be on; '
            'name servers by their loopback address (http://127.0.0.1:...), or set it to "distributed"'
        )


def is_loopback(url: str) -> bool:
    """Another server on every machine."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _of_fp8(config: Config) -> Iterator[str]:
    model = config.model
    if model.precision != "fp8":
        return
    if RECIPES[model.fp8_recipe].remembers and model.fp8_first_last_bf16:
        yield (
            f'model.fp8_first_last_bf16: Megatron has no "{model.fp8_recipe}" recipe with layers in '
            'bf16; set model.fp8_recipe = "blockwise" or drop it'
        )
    if model.fp8_param_gather and config.checkpoint.saves:
        yield (
            "model.fp8_param_gather: a checkpoint does not hold weights in FP8; drop it, or set "
            "checkpoint.every = 0"
        )
    waiting = config.residency.model_dump(exclude={"servers"})
    if model.fp8_param_gather and set(waiting.values()) != {"resident"}:
        yield (
            "model.fp8_param_gather: what is kept in FP8 cannot wait in host memory yet; drop it, or "
            "[residency]"
        )
    if model.fp8_param_gather and not config.optimizer.distributed:
        yield (
            "model.fp8_param_gather: it is the distributed optimizer that gathers; drop it, or set "
            "optimizer.distributed = true"
        )


def _of_memory(config: Config) -> Iterator[str]:
    train, optimizer = config.train, config.optimizer
    if "attn_proj" in train.offload_modules and "core_attn" not in train.offload_modules:
        yield (
            'train.offload_modules: the input of "attn_proj" is the output of "core_attn", which must wait '
            "too; add it"
        )
    if optimizer.cpu_fraction:
        yield from wrong_on_cpu(optimizer, config.model, config.residency, config.checkpoint)


def _of_quantized(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.server == "embedded" and not rollout.urls:
        yield 'publish.quantize: the embedded server has no FP8; set rollout.server = "sglang" or drop it'
    if config.model.precision == "fp32":
        yield 'publish.quantize: SGLang computes beside FP8 weights in bf16; set model.precision = "bf16"'


def warnings(config: Config, *, trains: bool = True) -> list[str]:
    """`key: what` for settings that are allowed and hardly meant; without training, every step is kept."""
    rates = {"optimizer.lr": config.optimizer.lr}
    a = config.algorithm
    if config.run.kind != "rl":
        found = [f"{key}: 0, so that nothing is learned" for key, rate in rates.items() if rate == 0]
        return [*found, *_never_due(config)]
    algorithm = _effects().configure(a.name, a.params, a.loss)
    rates |= {"critic.lr": config.critic.lr} if algorithm.needs_critic else {}
    updates, stale = a.mini_batches * a.epochs, config.rollout.max_staleness > 0
    due = _never_due(config) if trains else ()
    found = _effects().doubtful(
        *(algorithm, a.params), updates=updates, stale=stale, rates=rates, tokens=config.longest_response
    )
    return [*found, *_of_critic(config, updates), *due, *_never_waited(config)]


def _of_critic(config: Config, updates: int) -> Iterator[str]:
    usual = CriticConfig()  # a file that was written from a config names every key
    if config.critic.value_clip not in (usual.value_clip, 0) and updates == 1:
        yield (
            "critic.value_clip: has no effect in the only update of a rollout, before which no value has "
            "moved; set algorithm.mini_batches or epochs higher, or remove it"
        )
    if config.critic.coef != usual.coef and not config.optimizer.clip_grad:
        yield (
            "critic.coef: has no effect on Adam where optimizer.clip_grad is 0; set critic.lr, or remove it"
        )


def _never_waited(config: Config) -> Iterator[str]:
    """Deadlines that the end of a run without progress comes before."""
    of_step, usual = config.train.step_timeout, (RolloutConfig(), RewardConfig())
    for name, default in zip(("rollout", "reward"), usual, strict=True):
        for key in {"start_timeout", "timeout", "health_timeout"} & type(default).model_fields.keys():
            seconds = getattr(getattr(config, name), key)
            if seconds != getattr(default, key) and seconds >= of_step:
                yield (
                    f"{name}.{key}: {seconds:g} s never pass: a run without progress ends after "
                    f"train.step_timeout = {of_step:g} s; lower it, or raise that"
                )


def _never_due(config: Config) -> Iterator[str]:
    """What would come every so many steps, of which the run has fewer."""
    steps = config.train.steps
    if config.train.eval_every > steps:
        yield (
            f"train.eval_every: {config.train.eval_every} steps never pass in a run of {steps}, which is "
            "evaluated at its start and its end alone; lower it, or set 0"
        )
    if config.rollout.dump > steps:
        yield (
            f"rollout.dump: no step of {steps} is the {config.rollout.dump}th, and nothing is kept; lower "
            "it, or set 0"
        )


def _needs_reference(config: Config) -> bool:
    if config.run.kind != "rl":
        return config.run.kind == "preference" and config.preference.loss != "orpo"
    return _effects().needs_reference(config.algorithm)


def _effects() -> ModuleType:
    """What reads the algorithms; imported when every key is known to be right, since it imports torch."""
    with uncollected():
        from mcore_rl.config import effects

    return effects


_OF_FUNCTION = ("function", "functions", "workers", "timeout", "memory", "max_void", "weights")
"""keys of [reward] that a reward model has no use for"""


def unused_keys(config: Config) -> Mapping[str, str]:
    """Keys that have no effect in this run -> why."""
    unused = {**_unused_of_training(config), **unused_of_servers(config.rollout, config.publish)}
    unused |= unused_of_environment(config.environment, samples=config.samples_responses)
    if config.data.validation is None and all(one.prompts for one in config.held_out.values()):
        unused["train.eval_samples"] = "no held-out set takes its number of prompts from it"
    if config.model.precision != "fp8":
        keys = ("fp8_recipe", "fp8_param_gather", "fp8_first_last_bf16")
        unused |= {f"model.{key}": 'model.precision is not "fp8"' for key in keys}
    name = config.algorithm.name
    other = config.run.kind != "rl"
    what = f'run.kind is "{config.run.kind}", which' if other else name
    if config.run.kind == "preference":
        what = f'preference.loss is "{config.preference.loss}", which'
    if other or not _effects().needs_critic(name):
        keys = [f"critic.{key}" for key in CriticConfig.model_fields] + ["residency.critic"]
        unused |= dict.fromkeys(keys, f"{what} has no critic")
    elif not config.critic.warmup_rollouts:
        unused["critic.warmup_epochs"] = "critic.warmup_rollouts is 0"
    unused |= unused_of_lora(config.lora)
    if not _needs_reference(config):
        unused["residency.reference"] = f"{what} has no reference"
    if not config.checkpoint.saves:
        keys = [f"checkpoint.{key}" for key in ("minutes", "keep", "background")]
        unused |= dict.fromkeys(keys, "checkpoint.every is 0")
    elif config.checkpoint.every is not None:
        unused["checkpoint.minutes"] = "checkpoint.every says when"
    return unused


def _unused_of_training(config: Config) -> Mapping[str, str]:
    unused: dict[str, str] = {}
    if config.train.recompute != "selective":
        unused["train.recompute_modules"] = f'train.recompute is "{config.train.recompute}"'
    if config.run.kind != "rl":
        keys = tuple(f"algorithm.{key}" for key in AlgorithmConfig.model_fields)
        keys += ("rollout.max_staleness", "rollout.dynamic_sampling", "data.curriculum", "rollout.dump")
        keys += ("reward.model", "rollout.routing_replay", "publish.mismatch_action")
        unused |= dict.fromkeys(keys, f'run.kind is "{config.run.kind}"')
    if config.trains_on_rows:
        keys = ("rollout.prompts_per_step", "rollout.samples_per_prompt", "residency.servers")
        unused |= dict.fromkeys(keys, f'run.kind is "{config.run.kind}", and trains on rows as they are')
        if not config.held_out:
            keys = [f"rollout.{key}" for key in RolloutConfig.model_fields]
            keys += [f"publish.{key}" for key in PublishConfig.model_fields]
            why = f'run.kind is "{config.run.kind}", and without held-out sets nothing is sampled'
            keys += [f"reward.{key}" for key in RewardConfig.model_fields]
            unused |= dict.fromkeys(keys, why)
        elif all(one.reward for one in config.held_out.values()):
            why = f'run.kind is "{config.run.kind}", and every held-out set has a reward'
            unused["reward.function"] = why
    kind, target, samples = config.run.kind, config.supervised.target, config.samples_responses
    unused |= dict(unused_of_kind(kind, target, config.preference, config.distill, samples=samples))
    if config.reward.functions:
        unused["reward.function"] = "reward.functions are there in its place"
    if config.reward.model is None:
        unused["residency.reward_model"] = "there is no reward.model"
    else:
        keys = ("function",) if _own_rewards(config) else _OF_FUNCTION
        unused |= dict.fromkeys((f"reward.{key}" for key in keys), "reward.model gives the rewards")
    return unused


def _own_rewards(config: Config) -> bool:
    """Whether a held-out set is scored by a function of its own."""
    return any(one.reward for one in config.held_out.values())


def _without_effect(config: Config) -> Iterator[str]:
    """Given keys without effect which would mislead whoever reads the file."""
    for key, why in _given_in_vain(config):
        if misleads(key):
            yield f"{key}: has no effect because {why}; remove it"


def _given_in_vain(config: Config) -> Iterator[tuple[str, str]]:
    for key, why in unused_keys(config).items():
        section, _, name = key.partition(".")
        if name in getattr(config, section).model_fields_set:
            yield key, why


def notes(config: Config) -> list[str]:
    """`key: what` for what is left out in this run: so that one file serves several."""
    found = [
        f"{key}: has no effect because {why}" for key, why in _given_in_vain(config) if not misleads(key)
    ]
    return [*filter(None, [config._cut]), *found]
