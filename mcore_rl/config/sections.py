"""The sections of a configuration: names, types, ranges and defaults.

They hold names of environment variables, never keys, so that `resolved.toml` can be shown to anyone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from mcore_rl.precision import FP32_TOLERANCES, PrecisionName, RecipeName
from mcore_rl.tuning import OffloadModule, RecomputeModule
from mcore_rl.types import TAKEN_PARTS


def function_name(name: str) -> str:
    """The name, which is one of a function in a module. Raises ValueError."""
    if not re.fullmatch(r"[\w.]+:\w+", name):
        raise ValueError("must be `module:function`")
    return name


def _named_sets(sets: dict[str, Any]) -> dict[str, Any]:
    """Names that files and metrics can have, where a disk does not tell capitals from small letters too."""
    for name in sets:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", name):
            raise ValueError(
                "the name of a set, which files and metrics carry, is of at most 64 letters, digits, `_` and "
                "`-`, and does not begin with `-`; rename it"
            )
    twice = [name for name, times in Counter(map(str.lower, sets)).items() if times > 1]
    if twice:
        raise ValueError(f"two sets are called {twice[0]}, but for capitals; rename one")
    return sets


def _named_functions(functions: dict[str, Any]) -> dict[str, Any]:
    """Names that the part of a reward can have, in a metric `reward/NAME`."""
    for name in functions:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,31}", name) or name in TAKEN_PARTS:
            raise ValueError(
                "the name of a function, which the metric of its part carries, is of at most 32 letters, "
                f"digits, `_` and `-`, and none of {', '.join(sorted(TAKEN_PARTS))}; rename it"
            )
    return functions


def _choices(value: Any) -> Any:
    """Field -> one value or a list of them, as a list each."""
    if not isinstance(value, dict):
        return value
    return {name: tuple(one) if isinstance(one, list) else (one,) for name, one in value.items()}


def _variable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ValueError("must be the NAME of an environment variable in capitals, never the key itself")
    return name


def _not_empty(value: Any) -> Any:
    """An empty path would be the current directory: more often it is a variable that is not set."""
    if value == "":
        raise ValueError("is empty; name a path, or leave the key out, of the file too")
    return value


def _file_path(path: Path) -> Path:
    """A path that the system can be asked for: it ends with an error where it is asked for any other."""
    text = str(path)
    if "\0" in text:
        raise ValueError("holds the character NUL, which no path can; retype it")
    if len(text.encode()) >= MAX_PATH or any(len(part.encode()) > MAX_NAME for part in path.parts):
        raise ValueError(
            f"longer than a path of {MAX_PATH} bytes, or a name of {MAX_NAME}; choose a shorter one"
        )
    return path


def _listed(value: Any) -> Any:
    """One path is a list of one; what a validator hands on must be a tuple in the strict mode."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds the character NUL, which no command line can; retype it")
    return text


def _server_url(url: str) -> str:
    if not re.fullmatch(r"https?://[^/@?#\s\x00-\x1f\x7f]+(/[^@?#\s\x00-\x1f\x7f]*)?", url):
        raise ValueError("must be http(s)://host:port; a key goes into the variable that api_key_env names")
    return url.rstrip("/")


def _plain_params(params: dict[str, Any]) -> dict[str, Any]:
    for name, value in params.items():
        if not isinstance(value, bool | int | float | str) or (
            isinstance(value, float) and not math.isfinite(value)
        ):
            raise ValueError(f"{name} must be a finite number, a string, true or false")
    return params


def plain_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that resolved.toml can show to anyone. Raises ValueError."""
    for name, value in arguments.items():
        for one in value if isinstance(value, list) else [value]:
            _plain_params({name: one})
            if isinstance(one, str) and re.match(r"https?://[^/\s]*@", one):
                raise ValueError(f"{name} holds a password; a key goes into the variable that key_env names")
    return arguments


_WRONG_RATIO = "so that every importance ratio would be wrong"
_TRUNCATES = (
    "refused: it cuts the distribution that tokens are drawn from, but servers answer with log-probs from "
    f"before the cut, {_WRONG_RATIO}; drop it, or sharpen with rollout.temperature, at which log-probs are "
    "taken everywhere"
)
_SHIFTS = f"refused: it shifts the servers' logits, and training's know nothing of that, {_WRONG_RATIO}"
REFUSED_SAMPLING = {
    **dict.fromkeys(("top_p", "top_k", "min_p"), _TRUNCATES),
    **dict.fromkeys(
        ("frequency_penalty", "presence_penalty", "repetition_penalty"),
        f"{_SHIFTS}; drop it, or discourage repetition in the reward",
    ),
    "logit_bias": f"{_SHIFTS}; drop it, or change what the reward prefers",
    "min_new_tokens": f"{_SHIFTS}; drop it, or prefer longer responses in the reward",
    "sampling_params": "refused: they are the same for every prompt, and keys of [rollout] themselves "
    "(temperature, max_new_tokens, stop_token_ids); set those",
}
"""what servers could do to the distribution and training does not follow -> why not, and the remedy"""

EXACT_MATCH = "mcore_rl.rewards.exact:exact_match"
"""the reward where none is named"""
MAX_PATH, MAX_NAME = 4096, 255
"""bytes that Linux allows in a path and in each of its names"""
MAX_SECONDS = 1e6
"""the longest deadline: 11 days; poll() counts milliseconds in 32 bits"""

Count = Annotated[int, Field(ge=1)]
FilePath = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(_file_path)]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
NonNegative = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Section(BaseModel):
    """Base of all sections: immutable, strict about types, no unknown keys, no infinities."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


Kind = Literal["rl", "sft", "preference", "reward_model", "distill"]
"""what a run trains by"""
TrackerName = Literal["wandb", "tensorboard", "trackio", "mlflow"]
"""a service that shows metrics"""


class RunConfig(Section):
    """What kind of training a run is, where it writes, and its seed."""

    dir: FilePath
    """Where the run writes everything; relative to the current directory, like every path here."""
    kind: Kind = "rl"
    """`rl`: reinforcement learning on rollouts; `sft`: supervised, on answers that the data has;
    `preference`: on answers that the data prefers; `reward_model`: to score as the data prefers;
    `distill`: to answer as a teacher does."""
    seed: Seed = 0
    """Prompt order, sampling and random initial weights follow from it."""
    trackers: tuple[TrackerName, ...] = ()
    """Services that are handed every step's metrics, beside metrics.jsonl: `wandb`, `tensorboard`, `trackio`,
    `mlflow`; each is an extra of the same name, and its own environment variables act."""


class ModelConfig(Section):
    """The policy's starting point."""

    path: FilePath
    """Hugging Face directory: config.json, tokenizer, safetensors."""
    precision: PrecisionName = "fp32"
    """Parameters and activations; log-probs and the optimizer state are fp32 in any case."""
    fp8_recipe: RecipeName = "blockwise"
    """How Transformer Engine scales what the layers' GEMMs round to FP8; all else is in bf16."""
    fp8_param_gather: bool = False
    """Keep the layers' weights in FP8 and gather them so; saves their bf16 copy."""
    fp8_first_last_bf16: bool = False
    """Keep the first and the last layer in bf16."""
    random_init: bool = False
    """Start from random weights by run.seed; only config.json and the tokenizer are read."""


class DataConfig(Section):
    """Prompt files."""

    train: Annotated[tuple[FilePath, ...], BeforeValidator(_listed), Field(min_length=1)]
    """Prompts and labels: jsonl, jsonl.gz, parquet, a folder or glob of these, or a directory that `datasets`
    saved; one path or a list, and `PATH@[0:100]` takes rows."""
    weights: tuple[Positive, ...] = ()
    """Shares of the paths of `train` in every step, exactly; unset, all rows are shuffled together."""
    eval: FilePath | None = None
    """Held-out prompts in the same formats: one set named after the file, a sample of each; or see [eval]."""
    validation: FilePath | None = None
    """Held-out rows like those of `train`, of which training without rollouts measures the loss."""
    prompt_key: Annotated[str, Field(min_length=1)] = "prompt"
    """Key of the prompt: a string, or a list of chat messages; `a.b.c` looks into objects."""
    label_key: str = "label"
    """Key of the reference answer, any value of JSON; empty, rows have none."""
    chosen_key: Annotated[str, Field(min_length=1)] = "chosen"
    """Key of the better answer of a pair: a string, or messages, its own or the whole conversation."""
    rejected_key: Annotated[str, Field(min_length=1)] = "rejected"
    """Key of the worse one."""
    margin_key: str = ""
    """With `reward_model`, key of the number by which the chosen answer is better; empty, rows have none."""
    completion_key: Annotated[str, Field(min_length=1)] = "completion"
    """Key of an answer on which the label is a verdict, true or false (`kto`)."""
    id_key: Annotated[str, Field(min_length=1)] = "id"
    """Key of a name that is unique in its file; unset, `id`, or the line where a row has none."""
    apply_chat_template: bool = False
    """A prompt that is a string is what a user says in a conversation."""
    system: Annotated[str, Field(min_length=1)] | None = None
    """System turn of conversations without one; a row's own `system` comes first."""
    tools: FilePath | None = None
    """JSON file with the list of tools that conversations may use; a row's own `tools` come first."""
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_plain_params)] = {}
    """Variables of the chat template, such as enable_thinking = false; a row's own come first."""
    last_assistant: Literal["refuse", "drop", "continue"] = "refuse"
    """What becomes of an assistant's turn that ends a conversation; what is dropped is the label of a row
    without one."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are dropped when the file is read, and counted."""
    curriculum: Annotated[str, AfterValidator(function_name)] | None = None
    """`module:function` that chooses prompts by what was measured of them; unset, each once per epoch."""


class EvalSetConfig(Section):
    """One held-out set: its prompts, how they are sampled, and how the samples are scored."""

    path: FilePath
    """Prompts and labels, as a path of data.train, with the keys that [data] names."""
    prompts: Count | None = None
    """Prompts of one evaluation, at most; unset, train.eval_samples."""
    samples: Annotated[int, Field(ge=1, le=1024)] = 1
    """Responses per prompt."""
    temperature: Annotated[float, Field(ge=0)] | None = None
    """Sampling temperature, 0 for the likeliest token; unset, that of [rollout]."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that have this probability together."""
    top_k: Count | None = None
    """Sample from so many of the likeliest tokens."""
    max_new_tokens: Count | None = None
    """Longest response; unset, that of [rollout]."""
    reward: Annotated[str, AfterValidator(function_name)] | None = None
    """`module:function` that scores one sample, or a group of them; unset, what [reward] says."""
    pass_reward: float | None = None
    """Least reward with which a sample passes; unset, 1.0 where a function gives the rewards."""
    pass_at: tuple[Count, ...] = ()
    """Every k for pass@k, the chance that one of k samples passes."""
    majority_at: tuple[Count, ...] = ()
    """Every k for majority@k, how often the answer that most of k samples give passes."""
    answer: Annotated[str, AfterValidator(function_name)] | None = None
    """`module:function` of one sample: the answer it votes for, or None; unset, exact_match's whole text."""


class EvalConfig(Section):
    """What is held out, beside data.eval: named sets, each a table `[eval.sets.NAME]`."""

    sets: Annotated[dict[str, EvalSetConfig], AfterValidator(_named_sets)] = {}
    """Name, as metrics and files carry it -> the set."""


class RolloutConfig(Section):
    """How responses are sampled."""

    server: Literal["embedded", "sglang"] = "embedded"
    """Kind of server to launch where no urls are given."""
    python: FilePath | None = None
    """Interpreter that SGLang is installed for; its torch may be another version than the trainer's."""
    servers: Count = 1
    """How many to launch."""
    options: tuple[Annotated[str, AfterValidator(_without_nul)], ...] = ()
    """More command line options of a launched server."""
    urls: tuple[Annotated[str, AfterValidator(_server_url)], ...] = ()
    """Servers that already run; empty, they are launched on this machine."""
    prompts_per_step: Count = 64
    """Prompts of one rollout over all replicas."""
    samples_per_prompt: Count = 8
    """Responses per prompt: the group size."""
    max_staleness: NonNegative = 0
    """Versions that a trained token may be old; 0 takes turns, 1 or more generates beside training."""
    over_sampling: NonNegative = 0
    """Prompts in flight beyond those of the steps, so that a step need not wait for the slowest."""
    dynamic_sampling: NonNegative = 0
    """Replace groups of equal rewards (DAPO), sampling at most so many times the step's prompts; 0: off."""
    temperature: Positive = 1.0
    """Sampling temperature; log-probs are taken at it everywhere."""
    max_new_tokens: Count = 64
    """Longest response."""
    dump: NonNegative = 0
    """Keep every N-th step's rollouts in the run directory, to train from or to look at; 0 keeps none."""
    dump_keep: Count = 100
    """Newest steps of them that stay; a token takes about 12 bytes, and 12 more once it is trained."""
    routing_replay: bool = False
    """Train a mixture of experts with the experts that the servers sent each token to (R3)."""
    stop_token_ids: tuple[NonNegative, ...] = ()
    """End a response besides the model's own end-of-sequence tokens."""
    timeout: Seconds = 120.0
    """Seconds for one request, retries included."""
    health_timeout: Seconds = 60.0
    """Seconds without a good health check after which a busy server is given up."""
    start_timeout: Seconds = 120.0
    """Seconds until a server must be ready."""
    api_key_env: Annotated[str, AfterValidator(_variable_name)] | None = None
    """NAME of the environment variable that holds the servers' key."""
    threads: Count = 2
    """CPU threads of a launched embedded server."""

    @property
    def sampling_params(self) -> dict[str, Any]:
        """What every sample is asked with, as SGLang names it."""
        return {
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "stop_token_ids": list(self.stop_token_ids),
        }


Finite = Annotated[float, Field(allow_inf_nan=False)]


class RewardFunctionConfig(Section):
    """One of several reward functions; the reward is the weighted sum of those that are for a row."""

    function: Annotated[str, AfterValidator(function_name)]
    """`module:function` that scores one sample, or a group of them."""
    weight: Finite = 1.0
    """Weight in the sum."""
    when: Annotated[dict[str, tuple[str | int | bool, ...]], BeforeValidator(_choices)] = {}
    """Field of the prompt's row -> the value, or values, that this function is for; unset, every row."""
    args: Annotated[dict[str, Any], AfterValidator(plain_arguments)] = {}
    """Its keyword arguments."""


class RewardConfig(Section):
    """How responses are scored."""

    function: Annotated[str, AfterValidator(function_name)] = EXACT_MATCH
    """`module:function` that scores one sample, or a group of them."""
    functions: Annotated[dict[str, RewardFunctionConfig], AfterValidator(_named_functions)] = {}
    """Several in its place, each a table `[reward.functions.NAME]` under the name that its metric has."""
    workers: Count = 4
    """Processes of a replica that it runs in, at most; they are started while there is work for them."""
    timeout: Seconds = 60.0
    """Seconds of one call; a sample that has no reward by then is void, and its process is replaced."""
    memory: Positive = 8.0
    """Address space of one process, in 2^30 bytes; beyond it the function gets a MemoryError."""
    max_void: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of a step's samples that may get no reward; above it the run ends with the reasons."""
    weights: dict[str, Finite] = {}
    """Weight of a part in the sum, by its name, where a function returns several; 1 for the others. A name
    that no sample of the first step has ends the run."""
    model: FilePath | None = None
    """A reward model in its place: directory of a sequence classifier, one label, the policy's tokenizer."""


class AlgorithmConfig(Section):
    """What is optimised."""

    name: Annotated[str, Field(min_length=1)] = "gspo"
    """A reinforcement-learning algorithm."""
    params: Annotated[dict[str, Any], AfterValidator(_plain_params)] = {}
    """The algorithm's own numbers, where they differ from its paper's."""
    loss: Annotated[str, AfterValidator(function_name)] | None = None
    """`module:function` of a policy loss of your own, in the place of the algorithm's."""
    overlong_filter: bool = False
    """Leave truncated responses out of the loss (DAPO); the statistics of their group have them."""
    mini_batches: Count = 4
    """Optimizer steps per pass over a rollout."""
    epochs: Count = 1
    """Passes over a rollout."""


class OptimizerConfig(Section):
    """Adam and its learning rate."""

    lr: Annotated[float, Field(ge=0)] = 1e-6
    """Peak learning rate of Adam."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mean gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the mean squared gradient."""
    eps: Positive = 1e-8
    """Added to the root of the mean squared gradient."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled, times the learning rate."""
    clip_grad: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up; update u of them has the rate lr * u / (warmup_steps + 1)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or decay to 0 at the last optimizer step."""
    distributed: bool = True
    """Shard the optimizer state over the data-parallel ranks."""
    cpu_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the parameters that Adam updates on the CPU, their state in host memory."""
    router_bias_rate: Annotated[float, Field(ge=0)] = 0.0
    """What an optimizer step adds to a router's bias for an expert with fewer tokens than the mean, and takes
    for one with more (DeepSeek-V3, GLM-4.5); 0 leaves the biases as they were loaded."""


class CriticConfig(Section):
    """The value model of an algorithm that needs one; the rest of its optimizer is that of [optimizer]."""

    path: FilePath | None = None
    """What it starts from: directory of a sequence classifier, one label, the policy's tokenizer, such as the
    reward model; unset, the policy's weights under a value head of 0."""
    lr: Annotated[float, Field(ge=0)] = 1e-5
    """Peak learning rate of its own Adam."""
    warmup_rollouts: NonNegative = 0
    """Rollouts at the start of the run in which only the critic learns, from returns at lambda = 1."""
    warmup_epochs: Count | None = None
    """Its passes over each of them; unset, algorithm.epochs."""
    value_clip: Annotated[float, Field(ge=0)] = 0.2
    """How far a value may move in one rollout before its gradient is cut; 0 does not clip."""
    coef: Positive = 1.0
    """Factor of the value loss; with Adam it matters to clip_grad only."""


class TrainConfig(Section):
    """Length, memory and evaluation of the run."""

    steps: Count
    """Rollouts to train on; batches, where run.kind is another one than `rl`."""
    tokens_per_micro_batch: Count = 16384
    """Token budget of a packed micro-batch, padding included."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again: none, those of recompute_modules, of every layer."""
    recompute_modules: Annotated[tuple[RecomputeModule, ...], Field(min_length=1)] = ("core_attn",)
    """Parts of a layer that `selective` computes again, by Megatron's names."""
    offload_modules: tuple[OffloadModule, ...] = ()
    """Parts of a layer whose inputs wait in host memory for the backward pass (Megatron's fine-grained
    offloading); needs Transformer Engine."""
    eval_every: NonNegative = 0
    """Steps between evaluations, validations too; 0 evaluates at the start and the end only."""
    eval_samples: Count = 1000
    """Held-out prompts of a set in one evaluation, and rows of data.validation, at most."""
    step_timeout: Seconds = 600.0
    """Seconds after which a step without progress ends the run."""


class PublishConfig(Section):
    """Weights for the servers, and the check that they arrived."""

    transport: Literal["disk", "tensor", "distributed", "adapter"] = "disk"
    """By files; out of memory, to servers on the trainer's machine; by broadcast (NCCL, gloo on CPU); or, of
    [lora], the adapter alone by files, which SGLang applies beside the frozen model."""
    bucket_mib: Count = 512
    """What `tensor` and `distributed` send at once, in 2^20 bytes; a rank that sends holds two of them."""
    dir: FilePath | None = None
    """Where weights go for the servers to read; unset, `weights` in the run directory."""
    replica: FilePath | None = None
    """Where `mcore-rl follow` keeps them on every server's machine; set, `dir` gets only what changed."""
    quantize: Literal["none", "fp8"] = "none"
    """Write them for the servers in FP8 blocks of 128 x 128; the trainer's own stay as they are."""
    probe_sequences: Count = 8
    """Sampled sequences whose log-probs are compared with the servers' after a publish, 4096 tokens each."""
    probe_share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Part of a step's tokens that these may be, 64 tokens in any case; 1 compares all of them."""
    tolerance_p999: Positive | None = FP32_TOLERANCES.p999
    """Largest difference of 99.9 % of a step's log-probs to the servers'; below fp32 unset: by the layers."""
    mismatch_action: Literal["warn", "stop", "drop"] = "warn"
    """Above that: say so, end the run before it trains the step, or train without the samples that differ."""
    tolerance_max: Positive | None = FP32_TOLERANCES.largest
    """Largest one of any log-prob compared after a publish; above, the run ends. Below fp32 as the other."""

    @property
    def by_buckets(self) -> bool:
        """Weights go from memory to memory, publish.bucket_mib at a time."""
        return self.transport in ("tensor", "distributed")
