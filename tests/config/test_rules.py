"""Keys that cannot go together, each beside the nearest configuration that is accepted."""

import re
import tempfile
from pathlib import Path

import pytest

from mcore_rl.algo.algorithms import ALGORITHMS
from mcore_rl.algo.presets import PRESETS
from mcore_rl.config import load_config, notes, to_toml
from mcore_rl.config.names import KINDS, SPELLINGS
from mcore_rl.errors import ConfigError
from tests.sources import ROOT

BASE = {"run.dir": "r", "model.path": "m", "data.train": "t.jsonl", "train.steps": 10}


FP8_WEIGHTS = {
    "publish__quantize": "fp8",
    "model__precision": "bf16",
    "rollout__urls": "['http://a:1']",
}
DISTRIBUTED = {"publish__transport": "distributed", "rollout__urls": "['http://a:1']"}
ADAPTER = {"publish__transport": "adapter", "lora__rank": 8, "rollout__urls": "['http://a:1']"}


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "empty.toml"
    path.touch()
    return lambda **keys: load_config(
        path, [f"--{key.replace('__', '.')}={value}" for key, value in {**BASE, **keys}.items()]
    )


@pytest.mark.parametrize(
    ("bad", "good", "message"),
    [
        ({"parallel__sequence": "true"}, {"parallel__tensor": 2}, "parallel.sequence: .*tensor >= 2"),
        (
            {"parallel__virtual_pipeline": 2},
            {"parallel__pipeline": 2},
            "parallel.virtual_pipeline: .*pipeline >= 2",
        ),
        ({"train__eval_every": 5}, {"data__eval": "e.jsonl"}, "train.eval_every: .*set data.eval"),
        ({"publish__tolerance_max": 1e-6}, {"publish__tolerance_p999": 1e-7}, "publish.tolerance_p999: "),
        (
            {"algorithm__mini_batches": 513},
            {"rollout__prompts_per_step": 65},
            "algorithm.mini_batches: .*512",
        ),
        (
            {"optimizer__warmup_steps": 41},
            {"algorithm__epochs": 2},
            "optimizer.warmup_steps: cut from 41 to 10, of a run of 40 optimizer steps",
        ),
        (
            {"train__tokens_per_micro_batch": 1087},
            {"data__max_prompt_tokens": 1023},
            "train.tokens_per_micro_batch: 1087 cannot hold one sequence of 1088",
        ),
        (
            {"train__tokens_per_micro_batch": 1091, "rollout__max_new_tokens": 66, "parallel__context": 2},
            {"data__max_prompt_tokens": 1022},
            "padded to 4",
        ),
        ({"algorithm__name": "gsop"}, {"algorithm__name": "gspo"}, "algorithm.name: .*did you mean 'gspo'"),
        ({"algorithm__params.eps_hi": 1}, None, "algorithm.params.eps_hi: .*did you mean 'eps_high'"),
        (
            {"rollout__samples_per_prompt": 1},
            {"algorithm__name": "ppo"},
            "rollout.samples_per_prompt: .*2",
        ),
        (
            {"environment__function": "m:f", "data__max_prompt_tokens": 512, "reward__model": "r"},
            None,
            "reward.model: .*may have several sequences; .*or name a reward.function",
        ),
        (
            {
                "environment__function": "m:f",
                "data__max_prompt_tokens": 512,
                "rollout__routing_replay": "true",
            },
            {"rollout__routing_replay": "false"},
            "rollout.routing_replay: experts of several turns are not joined.*set it to false",
        ),
        (
            {"rollout__dynamic_sampling": 10, "algorithm__name": "ppo"},
            {"algorithm__name": "rloo"},
            "rollout.dynamic_sampling: ppo does not compare .*drop it",
        ),
        (
            {"rollout__dynamic_sampling": 1},
            {"rollout__dynamic_sampling": 2},
            "rollout.dynamic_sampling: with 1 a step may replace no group.*set 2 or more, or 0",
        ),
        (
            {"rollout__max_staleness": 1},
            {"algorithm__params.correction": '"tis-token"'},
            'rollout.max_staleness: .*algorithm.params.correction = "tis-token"',
        ),
        (
            {
                "model__precision": "fp8",
                "train__tokens_per_micro_batch": 1100,
                "rollout__max_new_tokens": 66,
                "parallel__context": 2,
            },
            {"train__tokens_per_micro_batch": 1120},
            "padded to 32",
        ),
        (
            {"model__precision": "fp8", "model__fp8_recipe": "delayed", "model__fp8_first_last_bf16": "true"},
            {"model__fp8_recipe": "tensorwise"},
            'model.fp8_first_last_bf16: .*"delayed" recipe',
        ),
        (
            {"rollout__urls": "['http://a:1', 'http://b:1', 'http://a:1/']"},
            {"rollout__urls": "['http://a:1', 'http://b:1']"},
            "rollout.urls: http://a:1 is named twice",
        ),
        (
            {"residency__servers": "released"},
            {"rollout__urls": "['http://a:1']"},
            "residency.servers: the embedded server keeps",
        ),
        (
            {
                "residency__servers": "released",
                "rollout__urls": "['http://127.0.0.1:1']",
                "publish__transport": "tensor",
            },
            {"publish__transport": "disk"},
            "residency.servers: only weights from disk",
        ),
        (
            {
                "residency__servers": "released",
                "rollout__urls": "['http://a:1']",
                "rollout__max_staleness": 1,
                "algorithm__params.correction": '"tis-token"',
            },
            {"rollout__max_staleness": 0},
            "residency.servers: servers that generate beside",
        ),
        (
            {"optimizer__cpu_fraction": 0.5, "checkpoint__every": 0},
            {"model__precision": "bf16"},
            "optimizer.cpu_fraction: it takes no float32 weights",
        ),
        (
            {
                "model__precision": "fp8",
                "model__fp8_param_gather": "true",
                "optimizer__cpu_fraction": 0.5,
                "checkpoint__every": 0,
            },
            {"model__fp8_param_gather": "false"},
            "optimizer.cpu_fraction: with model.fp8_param_gather Megatron hands",
        ),
        (
            {"model__precision": "fp8", "model__fp8_param_gather": "true", "checkpoint__every": 1},
            {"checkpoint__every": 0},
            "model.fp8_param_gather: a checkpoint does not hold",
        ),
        (
            {
                "model__precision": "fp8",
                "model__fp8_param_gather": "true",
                "optimizer__distributed": "false",
                "checkpoint__every": 0,
            },
            {"optimizer__distributed": "true"},
            "model.fp8_param_gather: it is the distributed optimizer",
        ),
        (
            FP8_WEIGHTS | {"rollout__urls": "[]"},
            {"rollout__urls": "['http://a:1']"},
            "publish.quantize: the embedded server has no FP8",
        ),
        (
            FP8_WEIGHTS | {"model__precision": "fp32"},
            {"model__precision": "bf16"},
            "publish.quantize: SGLang computes",
        ),
        ({"model__fp8_recipe": "mxfp8"}, {"model__precision": "fp8"}, "model.fp8_recipe: has no effect"),
        (
            {"rollout__over_sampling": 8},
            {"rollout__max_staleness": 1, "algorithm__params.correction": '"icepop"'},
            "rollout.over_sampling: has no effect because rollout.max_staleness is 0",
        ),
        ({"supervised__batch_size": 8}, {"run__kind": "sft"}, "supervised.batch_size: has no effect"),
        (
            {"run__kind": "sft", "supervised__target": "all", "data__label_key": "x"},
            {"data__eval": "e.jsonl"},
            'data.label_key: has no effect because supervised.target is "all"',
        ),
        (
            {"run__kind": "preference", "preference__average": "true"},
            {"preference__loss": "ipo"},
            'preference.average: has no effect because preference.loss is "dpo"',
        ),
        (
            {"run__kind": "preference", "preference__loss": "orpo", "residency__reference": "kept"},
            {"preference__loss": "dpo"},
            'residency.reference: has no effect because preference.loss is "orpo", which has no reference',
        ),
        (
            {"run__kind": "preference", "preference__loss": "kto", "residency__reference": "kept"},
            {"residency__reference": "swapped"},
            "residency.reference: kto asks of prompts with answers of other rows",
        ),
        (
            {"run__kind": "preference", "preference__loss": "kto", "supervised__batch_size": 1},
            {"supervised__batch_size": 2},
            "supervised.batch_size: kto asks of a prompt with the answer of another row",
        ),
        (
            {"algorithm__name": "ppo", "residency__reference": "kept", "algorithm__params.kl_in_reward": 0.1},
            {"residency__reference": "offloaded"},
            'residency.reference: "kept" takes rows that are known before',
        ),
        (
            {"run__kind": "reward_model", "data__eval": "e.jsonl"},
            None,
            'data.eval: has no effect because run.kind is "reward_model", and nothing is sampled',
        ),
        ({"data__chosen_key": "a"}, {"run__kind": "reward_model"}, "data.chosen_key: has no effect"),
        (
            {"run__kind": "reward_model", "data__chosen_key": "rejected"},
            {"data__rejected_key": "worse"},
            "data.rejected_key: 'rejected' is data.chosen_key as well",
        ),
        (
            {"run__kind": "preference", "preference__loss": "kto", "data__completion_key": "label"},
            {"data__label_key": "good"},
            "data.label_key: 'label' is data.completion_key as well",
        ),
        ({"algorithm__name": "sft"}, {"algorithm__name": "ppo"}, 'is a kind of run; set run.kind = "sft"'),
        (
            {"rollout__server": "sglang"},
            {"rollout__python": "python3"},
            "rollout.python: name the interpreter",
        ),
        ({"rollout__python": "python3"}, {"rollout__server": "sglang"}, "rollout.python: has no effect"),
        (
            {"rollout__servers": 2, "rollout__urls": "['http://a:1']"},
            {"rollout__urls": "[]"},
            "rollout.servers: has no",
        ),
        (
            {"rollout__threads": 2, "rollout__urls": "['http://a:1']"},
            {"rollout__urls": "[]"},
            "rollout.threads: has no",
        ),
        (
            {"publish__transport": "tensor"},
            {"rollout__server": "sglang", "rollout__python": "python3"},
            "publish.transport: the embedded server loads weights from disk only",
        ),
        (
            {"publish__transport": "tensor", "rollout__urls": "['http://127.0.0.1:1', 'http://a:1']"},
            {"rollout__urls": "['http://127.0.0.1:1', 'http://localhost:2']"},
            "publish.transport: .*http://a:1 may not be on",
        ),
        (
            {"publish__transport": "tensor", "rollout__urls": "['http://a:1']"},
            {"publish__transport": "distributed"},
            'publish.transport: .*set it to "distributed"',
        ),
        ({"publish__bucket_mib": 64}, DISTRIBUTED, "publish.bucket_mib: has no effect"),
        (ADAPTER | {"lora__rank": 0}, {"lora__rank": 8}, "publish.transport: there is no adapter"),
        (ADAPTER | {"rollout__urls": "[]"}, ADAPTER, "publish.transport: the embedded server loads"),
        (
            ADAPTER | {"lora__targets": "['qkv', 'experts']"},
            {"lora__targets": "['qkv']"},
            "publish.transport: adapters of experts",
        ),
        (
            ADAPTER | {"publish__quantize": "fp8", "model__precision": "bf16"},
            {"publish__quantize": "none"},
            "publish.quantize: servers hold model.path itself",
        ),
        (
            ADAPTER | {"model__random_init": "true"},
            {"model__random_init": "false"},
            "publish.transport: servers need the frozen weights",
        ),
        (ADAPTER | {"publish__bucket_mib": 64}, DISTRIBUTED, "publish.bucket_mib: has no effect"),
        (
            ADAPTER | {"publish__replica": "r"},
            {"publish__transport": "disk"},
            "publish.replica: has no effect.*they are small",
        ),
        (DISTRIBUTED | {"publish__dir": "w"}, {"publish__transport": "disk"}, "publish.dir: has no effect"),
    ],
)
def test_a_contradiction_is_refused_or_noted_and_its_remedy_accepted(load, bad, good, message):
    assert re.search(message, refused_or_noted(load, **bad))
    if good is not None:
        assert not re.search(message, "\n".join(notes(load(**{**bad, **good}))))


def refused_or_noted(load, **keys) -> str:
    """What is said of these keys: a refusal, or a note where they are left out."""
    try:
        return "\n".join(notes(load(**keys)))
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("transport", ["disk", "tensor", "distributed"])
def test_weights_in_fp8_go_by_every_transport(load, transport):
    here = {"rollout__urls": "['http://127.0.0.1:1']", "publish__transport": transport}
    assert load(**FP8_WEIGHTS | here).publish.quantize == "fp8"


@pytest.mark.parametrize(
    "key",
    [
        *("algorithm.epochs", "algorithm.mini_batches"),
        *("rollout.prompts_per_step", "rollout.samples_per_prompt", "rollout.max_staleness"),
    ],
)
def test_supervised_training_says_that_the_keys_of_rollouts_are_none_of_its_own(load, key):
    said = refused_or_noted(load, run__kind="sft", **{key: 1})
    assert f'{key}: has no effect because run.kind is "sft"' in said
    assert key.split(".")[1] not in to_toml(load(run__kind="sft"))
    assert key.split(".")[1] in to_toml(load())


def test_all_contradictions_are_reported_at_once(load):
    with pytest.raises(ConfigError) as caught:
        load(parallel__sequence="true", parallel__virtual_pipeline=2, algorithm__name="nothing")
    assert len(str(caught.value).splitlines()) == 3


def test_one_sample_is_refused_for_every_algorithm_that_compares_samples(load):
    for name in ("grpo", "gspo", "sapo", "rloo"):
        with pytest.raises(ConfigError, match="every advantage is 0"):
            load(algorithm__name=name, rollout__samples_per_prompt=1)


@pytest.mark.parametrize(
    ("keys", "tolerances"),
    [
        ({}, (1e-4, 2e-4)),
        ({"model__precision": "bf16"}, (None, None)),
        ({"model__precision": "fp8"}, (None, None)),
        ({"model__precision": "bf16", "publish__tolerance_max": 0.75}, (None, 0.75)),
    ],
)
def test_publish_tolerances_are_those_of_the_precision_unless_given(load, keys, tolerances) -> None:
    publish = load(**keys).publish
    assert (publish.tolerance_p999, publish.tolerance_max) == tolerances


MATH = {
    "reward__functions.math.function": "m:f",
    "reward__functions.math.weight": 0.5,
    "reward__functions.math.when": '{data_source = ["gsm8k", "math"], "extra_info.split" = "train"}',
    "reward__functions.tags.function": "mcore_rl.rewards.answers:tags_match",
    "reward__functions.tags.args": '{tags = ["think", "answer"]}',
}


def test_several_reward_functions_are_tables_of_their_names(load, tmp_path) -> None:
    config = load(**MATH, **{"reward__weights": '{"math/right" = 2}'})
    one = config.reward.functions["math"]
    assert one.when == {"data_source": ("gsm8k", "math"), "extra_info.split": ("train",)}
    (tmp_path / "resolved.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "resolved.toml") == config


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"reward__function": "a:b"}, "reward.function: has no effect because reward.functions are there"),
        (
            {"reward__functions.mean.function": "a:b"},
            "reward.functions: the name of a .* none of mean",
        ),
        ({'reward__functions."a/b".function': "a:b"}, "reward.functions: the name of a function"),
        ({"reward__functions.a.weight": 1}, "reward.functions.a.function: required"),
        ({"reward__functions.math.wieght": 1}, "did you mean reward.functions.math.weight"),
        ({"reward__functions.math.when": "{a = []}"}, "reward.functions.math.when: a has no value"),
        ({"reward__functions.math.when": "{a = {b = 1}}"}, "reward.functions.math.when.a.0"),
        ({"reward__functions.math.when": "{a = 1.5}"}, "reward.functions.math.when.a.0"),
        ({"reward__functions.math.args": "{a = {b = 1}}"}, "reward.functions.math.args: a must be"),
        (
            {"reward__functions.math.args": '{url = "http://me:secret@host/"}'},
            "reward.functions.math.args: url holds a password; a key goes into .* key_env names$",
        ),
        ({"reward__functions.math.args": "{a = [nan]}"}, "reward.functions.math.args: a must be"),
        ({"reward__weights.math": 2}, "reward.weights: math is a function.*reward.functions.math.weight"),
        ({"reward__weights.mth": 2}, "reward.weights: mth is no part of the functions math, tags"),
        ({"reward__model": "rm"}, "reward.functions: has no effect because reward.model"),
    ],
)
def test_tables_of_reward_functions_that_cannot_be_meant_are_refused(load, bad, message) -> None:
    with pytest.raises(ConfigError, match=message):
        load(**MATH | bad)


def test_a_key_that_would_mislead_is_refused_and_another_noted(load):
    """One file serves several kinds and algorithms; what it says of the data and the algorithm is meant."""
    config = load(critic__lr=1e-5, supervised__batch_size=8, rollout__over_sampling=2)
    assert [note.split(":")[0] for note in notes(config)] == [
        "supervised.batch_size",
        "rollout.over_sampling",
        "critic.lr",
    ]
    assert notes(load_config_again(config)) == [], "resolved.toml has none of them"
    for key in ({"algorithm__epochs": 2}, {"rollout__dynamic_sampling": 2}, {"data__curriculum": "a:b"}):
        with pytest.raises(ConfigError, match="has no effect"):
            load(run__kind="sft", **key)


def load_config_again(config):
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(to_toml(config))
        file.flush()
        return load_config(Path(file.name))


RECIPES = sorted((ROOT / "examples").glob("**/*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_any_recipe_is_a_short_run_too(recipe):
    config = load_config(recipe, ["--train.steps=5"])
    assert config.optimizer.warmup_steps <= config.optimizer_steps
    long = load_config(recipe)
    assert not [note for note in notes(long) if "cut" in note], "none of them is cut as it stands"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dpo", 'run.kind = "preference" and preference.loss = "dpo"'),
        ("KTO", 'run.kind = "preference" and preference.loss = "kto"'),
        ("reinforce_plus_plus", '"reinforce++" is what it is called here'),
        ("clip_cov", '"clip-cov" is what it is called here'),
    ],
)
def test_a_name_that_means_something_else_says_what(load, name, said):
    with pytest.raises(ConfigError) as caught:
        load(algorithm__name=name)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert all(one in ALGORITHMS for one in SPELLINGS.values())
    assert not (SPELLINGS.keys() | KINDS.keys()) & (ALGORITHMS.keys() | PRESETS.keys())
