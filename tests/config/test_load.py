"""Reading: TOML, overrides, errors that name place and remedy, and the resolved file."""

import string
import tomllib

import pytest
from hypothesis import example, given
from hypothesis import settings as options
from hypothesis import strategies as st

from mcore_rl.algo.algorithms import ALGORITHMS
from mcore_rl.config import Config, load_config, to_toml
from mcore_rl.config.toml import dumps, literal, parse_value
from mcore_rl.errors import ConfigError
from tests.any_json import AWKWARD, examples, json_values

MINIMAL = """
[run]
dir = "runs/x"
[model]
path = "model"
[data]
train = "train.jsonl"
eval = "eval.jsonl"
[train]
steps = 10
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(MINIMAL)
    return path


def refusal(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_a_minimal_file_takes_the_defaults(path):
    config = load_config(path)
    assert (config.train.steps, config.rollout.temperature, config.algorithm.name) == (10, 1.0, "gspo")
    assert config.parallel.data is None


def test_sections_are_frozen(path):
    with pytest.raises(ValueError, match="frozen"):
        load_config(path).run.seed = 3


def test_overrides_win_in_order_and_take_both_forms(path):
    flags = ["--run.seed", "1", "--run.seed=2", "--optimizer.lr", "3e-4", "--rollout.urls=['http://a:1/']"]
    flags += [
        "--algorithm.params.eps_low=0.2",
        "--model.random_init",
        "true",
        "--rollout.stop_token_ids",
        "[1, 2]",
    ]
    config = load_config(path, flags)
    assert (config.run.seed, config.optimizer.lr, config.rollout.urls) == (2, 3e-4, ("http://a:1",))
    assert config.algorithm.params == {"eps_low": 0.2}
    assert config.rollout.stop_token_ids == (1, 2)
    assert config.model.random_init


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--rollout.temprature", "2"], ["rollout.temprature: unknown key", "mean rollout.temperature?"]),
        (["--train.temperature=2"], ["train.temperature: unknown key", "did you mean rollout.temperature?"]),
        (["--optimizer.learning_rate=1"], ["optimizer.learning_rate: unknown key", "mean optimizer.lr?"]),
        (["--rollout.num_generations=1"], ["unknown key", "mean rollout.samples_per_prompt?"]),
        (["--rolout.threads=1"], ["rolout: unknown section", "did you mean [rollout]?"]),
        (["--xyz.k=1"], ["xyz: unknown section", "the sections are run, model"]),
        (["--run.qqq=1"], ["run.qqq: unknown key", "the keys of [run] are dir, kind, seed"]),
        (["--run.seed=true"], ["run.seed: must be a valid integer"]),
        (["--run.seed=1.0"], ["run.seed: must be a valid integer"]),
        (["--run.seed", "-1"], ["run.seed: must be greater than or equal to 0"]),
        (["--rollout.temperature=0"], ["rollout.temperature: must be greater than 0"]),
        (["--optimizer.lr=nan"], ["optimizer.lr: must be a finite number"]),
        (["--model.precision=fp7"], ["model.precision: must be 'fp32', 'bf16' or 'fp8'"]),
        (["--reward.function=exact"], ["reward.function: must be `module:function`"]),
        (["--rollout.urls=['x:1']"], ["rollout.urls.0: must be http(s)://host:port"]),
        (["--algorithm.params.x=[1]"], ["algorithm.params: x must be a finite number"]),
        (["--run.dir.x=1"], ["run.dir.x: dir is a value"]),
        (["--run.dir=\udc80"], ["run.dir: not UTF-8 text"]),
        (["--run.seed"], ["--run.seed needs a value"]),
        (["--run.seed", "--run.dir=x"], ["--run.seed needs a value"]),
        (["--seed=1"], ["--seed is not of the form --section.key"]),
        (["run.seed=1"], ["run.seed is not of the form --section.key"]),
    ],
)
def test_a_wrong_flag_is_named_with_its_remedy(path, flags, parts):
    message = refusal(path, *flags)
    assert message.startswith("command line: ")
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("key", "value", "why", "remedy"),
    [
        ("top_p", 0.9, "log-probs from before the cut", "sharpen with rollout.temperature"),
        ("top_k", 20, "log-probs from before the cut", "drop it"),
        ("min_p", 0.05, "log-probs from before the cut", "drop it"),
        ("repetition_penalty", 1.1, "shifts the servers' logits", "in the reward"),
        ("frequency_penalty", 0.1, "shifts the servers' logits", "in the reward"),
        ("presence_penalty", 0.1, "shifts the servers' logits", "in the reward"),
        ("min_new_tokens", 4, "shifts the servers' logits", "in the reward"),
    ],
)
def test_what_would_change_the_behaviour_policy_is_refused_with_its_reason(path, key, value, why, remedy):
    flag = refusal(path, f"--rollout.{key}={value}")
    path.write_text(MINIMAL + f"[rollout]\n{key} = {value}\n")
    file = refusal(path)
    for source, message in (("command line", flag), (str(path), file)):
        assert message.startswith(f"{source}: rollout.{key}: refused: "), message
        assert why in message, message
        assert "every importance ratio would be wrong" in message, message
        assert remedy in message, message


def test_sampling_params_are_keys_of_their_own(path):
    message = refusal(path, "--rollout.sampling_params.top_p=0.9")
    assert "rollout.sampling_params: refused" in message
    assert "keys of [rollout] themselves (temperature" in message
    assert load_config(path, ["--rollout.temperature=0.9"]).rollout.temperature == 0.9, "the control"


def test_a_mistake_in_the_file_names_the_file_and_all_mistakes_are_listed(path):
    path.write_text(MINIMAL.replace("steps", "stpes") + "[rollout]\nthreads = 'two'\n")
    lines = refusal(path, "--run.seed=x").splitlines()
    assert f"{path}: train.steps: required; add it" in lines
    assert f"{path}: train.stpes: unknown key; did you mean train.steps?" in lines
    assert f"{path}: rollout.threads: must be a valid integer" in lines
    assert "command line: run.seed: must be a valid integer" in lines


EXPANDED = ["$HOME/x", "${HOME}", "~", "%(dir)s", "{run.dir}", "!!python/object:os", "*"]


@pytest.mark.parametrize("name", EXPANDED)
def test_nothing_is_expanded(path, name):
    path.write_text(MINIMAL.replace("runs/x", f"runs/{name}"))
    assert str(load_config(path).run.dir) == f"runs/{name}"
    assert str(load_config(path, [f"--data.train={name}"]).data.train[0]) == name


@pytest.mark.parametrize("content", [b"[run", b"\xff\xfe", b"a = " + b"[" * 5000])
def test_a_file_that_is_not_toml(path, content):
    path.write_bytes(content)
    assert f"{path}: not TOML" in refusal(path)


@pytest.mark.parametrize("digits", [25, 5000])
@pytest.mark.parametrize("prefix", ["", "-", "0x"])
def test_a_number_of_many_digits_is_refused_in_the_file_and_as_a_flag(path, prefix, digits):
    number = prefix + "9" * digits
    flag = refusal(path, f"--train.steps={number}")
    assert flag.startswith("command line: train.steps: ")
    path.write_text(MINIMAL.replace("10", number))
    assert refusal(path).startswith(f"{path}: ")


def test_a_key_of_thousands_of_parts_is_refused_and_shown_in_short(path):
    flag = refusal(path, "--" + ".".join(["algorithm", "params", *["a"] * 3000]) + "=1")
    assert flag.startswith("command line: algorithm.params.a.a")
    path.write_text(MINIMAL + "[algorithm.params]\n" + ".".join(["a"] * 3000) + " = 1\n")
    file = refusal(path)
    assert file.startswith(f"{path}: algorithm.params.a.a")
    assert max(len(flag), len(file)) < 500
    assert all("nested too deeply" in message for message in (flag, file))


PATHS = "run.dir model.path data.train data.eval rollout.python reward.model checkpoint.dir publish.dir"


@pytest.mark.parametrize("key", [*PATHS.split(), "publish.replica", "rollout.options"])
def test_a_path_that_the_system_could_not_be_asked_for_is_refused(path, key):
    value = r'["a\u0000b"]' if key == "rollout.options" else r'"a\u0000b"'
    assert f"command line: {key}" in (found := refusal(path, f"--{key}={value}"))
    assert "NUL" in found
    if key != "rollout.options":
        for long in ("x" * 300, "x/" * 3000, "ü" * 200):
            place = f"{key}.0" if key == "data.train" else key
            assert f"command line: {place}: longer than" in refusal(path, f"--{key}={long}")
        assert f"command line: {place}: is empty; name a path" in refusal(path, f"--{key}=")


def test_of_very_many_mistakes_some_are_named_and_the_others_counted(path):
    path.write_text(MINIMAL + "[optimizer]\n" + "".join(f"k{number} = 1\n" for number in range(300)))
    *named, last = refusal(path).splitlines()
    assert (len(named), last) == (20, f"{path}: and 280 more mistakes")


def test_a_key_with_a_dot_in_quotes_is_an_unknown_key(path):
    path.write_text('"a.b" = 1\n' + MINIMAL)
    assert "a.b: unknown" in refusal(path)


def test_a_deadline_beyond_what_the_system_counts_is_refused(path):
    assert "train.step_timeout: must be less than or equal to 1000000" in refusal(
        path, "--train.step_timeout=1e300"
    )


def test_a_missing_file(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rollout.api_key_env", "sk-canary-1"),
        ("rollout.api_key", "sk-canary-1"),
        ("rollout.urls", "['http://me:sk-canary-1@host']"),
        ("rollout.urls", "['http://host/?key=sk-canary-1']"),
        ("canary", "sk-canary-1"),
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_repeated(path, key, value):
    assert "canary-1" not in refusal(path, f"--{key if '.' in key else 'rollout.' + key}={value}")


def test_the_resolved_file_holds_the_name_of_the_variable_and_not_its_value(path, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "sk-canary-2")
    text = to_toml(load_config(path, ["--rollout.api_key_env=SERVER_KEY"]))
    assert "SERVER_KEY" in text
    assert "canary" not in text


@pytest.mark.parametrize("name", [*ALGORITHMS, "--run.kind=sft"])
def test_the_resolved_file_gives_the_same_configuration(path, tmp_path, name):
    flags = [name] if name.startswith("--") else ["--algorithm.name", name]
    flags += ["--environment.function", "a.module:play"] if name == "echo" else []
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(to_toml(load_config(path, flags)))
    assert load_config(resolved) == load_config(path, flags)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
settings = st.fixed_dictionaries(
    {
        "run": st.fixed_dictionaries(
            {"dir": text.filter(lambda t: t and "\0" not in t), "seed": st.integers(0, 2**32 - 1)}
        ),
        "model": st.fixed_dictionaries({"path": st.just("m"), "random_init": st.booleans()}),
        "data": st.fixed_dictionaries({"train": st.just("t"), "label_key": text.filter(bool)}),
        "train": st.fixed_dictionaries(
            {"steps": st.integers(1, 2**62), "step_timeout": st.floats(1e-300, 1e6)}
        ),
        "rollout": st.fixed_dictionaries({"stop_token_ids": st.lists(st.integers(0, 9), max_size=3)}),
        "algorithm": st.fixed_dictionaries(
            {"params": st.dictionaries(st.sampled_from(["eps_low", "eps_high"]), st.floats(0, 1), max_size=2)}
        ),
    }
)


@given(settings)
def test_any_configuration_survives_writing_and_reading(tmp_path_factory, tables):
    folder = tmp_path_factory.mktemp("round")
    (folder / "a.toml").write_text(dumps(tables), encoding="utf-8", newline="")
    config = load_config(folder / "a.toml")
    (folder / "b.toml").write_text(to_toml(config), encoding="utf-8", newline="")
    assert load_config(folder / "b.toml") == config
    assert config.run.seed == tables["run"]["seed"]
    assert config.data.label_key == tables["data"]["label_key"]


scalars = (
    st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | text
)


@given(st.dictionaries(text, scalars | st.lists(scalars, max_size=3), max_size=4))
def test_what_is_written_is_toml(table):
    assert tomllib.loads(dumps({"a b": table})) == ({"a b": table} if table else {})
    assert parse_value(literal(table)) == table


@given(st.text(string.printable, max_size=20))
def test_an_override_is_one_value_and_never_an_error(value):
    parse_value(value)
    assert parse_value("1\nother = 2") == "1\nother = 2"


any_key = st.sampled_from(
    [f"{s}.{k}" for s, f in Config.model_fields.items() for k in f.annotation.model_fields]
)


def loaded_or_refused(path, flags=()):
    try:
        to_toml(load_config(path, flags))
    except ConfigError as error:
        lines = str(error).splitlines()
        assert all(line.startswith((f"{path}: ", "command line: ")) for line in lines), lines
        assert all(len(line) < 2000 for line in lines)


toml_values = json_values() | st.sampled_from([value for value in AWKWARD if value is not None])


@options(max_examples=examples(100))
@example({"algorithm.name": "x" * 3000})
@example({"algorithm.loss": "x" * 3000})
@example({"reward.function": "x" * 3000 + ":"})
@example({"algorithm.params": {"clip_low": "x" * 3000}})
@given(st.dictionaries(any_key, toml_values, max_size=4))
def test_any_value_of_any_key_is_read_or_refused_with_its_place(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("fuzz") / "c.toml"
    path.write_text(MINIMAL)
    loaded_or_refused(path, [f"--{key}={written(value)}" for key, value in values.items()])
    tables = tomllib.loads(MINIMAL)
    for key, value in values.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    try:
        path.write_text(dumps(tables), encoding="utf-8")
    except (
        TypeError,
        ValueError,
    ):  # null, half a surrogate pair and 400 digits have no form in TOML or in Python
        return
    loaded_or_refused(path)


def written(value):
    """What a shell would hand over: a TOML literal, or text that is none."""
    try:
        return literal(value)
    except (TypeError, ValueError):
        return repr(value)


@options(max_examples=examples(100))
@given(st.lists(st.text(max_size=12) | any_key.map("--{}".format), max_size=4), st.binary(max_size=60))
def test_any_command_line_and_any_bytes_are_read_or_refused_with_their_place(
    tmp_path_factory, flags, content
):
    path = tmp_path_factory.mktemp("fuzz") / "c.toml"
    path.write_text(MINIMAL)
    loaded_or_refused(path, flags)
    for text in (content, MINIMAL.encode() + content, content + MINIMAL.encode()):
        path.write_bytes(text)
        loaded_or_refused(path)
