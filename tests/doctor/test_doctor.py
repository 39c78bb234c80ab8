"""A sound setting, then one planted problem at a time: each must be found, with its remedy."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.arithmetic import main as write_arithmetic
from mcore_rl.__main__ import main
from mcore_rl.config.file import separate
from mcore_rl.doctor import finding
from mcore_rl.doctor.storage import check_disk
from mcore_rl.environments.tools import CALL_TOOLS
from mcore_rl.errors import ConfigError
from mcore_rl.lora import Lora
from mcore_rl.model.hf.adapters import AdapterMap
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.peft_files import CONFIG, WEIGHTS, write_adapter
from tests.environments.served import embedded

ROWS = 80
"""of the training file: more than a step's 64 prompts"""


class Setting(NamedTuple):
    """A config and what it names, free to be spoilt."""

    config: Path
    model: Path
    train: Path
    eval: Path

    def edit(self, file: str, **changes: object) -> None:
        """Change keys of a JSON file of the model directory."""
        path = self.model / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def sound_setting(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    small = ["--train", str(ROWS), "--eval", "20", "--hidden", "64", "--layers", "1"]
    assert write_arithmetic([str(root), *small]) == 0
    config = Qwen3Config.from_pretrained(root / "model")
    Qwen3ForCausalLM(config).save_pretrained(root / "model")
    return root


@pytest.fixture
def setting(sound_setting: Path, tmp_path: Path) -> Setting:
    root = tmp_path / "setting"
    shutil.copytree(sound_setting, root)
    config = root / "config.toml"
    config.write_text(
        f'[run]\ndir = "{root}/run"\n[model]\npath = "{root}/model"\n[data]\ntrain = "{root}/train.jsonl"\n'
        f'eval = "{root}/eval.jsonl"\n[train]\nsteps = 3\n[algorithm]\n'
    )
    return Setting(config, root / "model", root / "train.jsonl", root / "eval.jsonl")


def doctor(capsys, config: Path, *flags: str) -> tuple[int, list[dict]]:
    code = main(["doctor", str(config), "--json", *flags])
    *_, last = capsys.readouterr().out.splitlines()
    return code, json.loads(last)["findings"]


def bad(findings: list[dict]) -> list[dict]:
    return [finding for finding in findings if finding["level"] in ("error", "warning")]


def test_a_sound_setting_has_no_bad_finding_and_nothing_is_written(capsys, setting: Setting):
    before = sorted(path for path in setting.config.parent.rglob("*"))
    code, findings = doctor(capsys, setting.config)
    assert code == 0
    assert not bad(findings)
    looked_at = {finding["check"] for finding in findings}
    expected = "python torch megatron-core gpu transformer-engine apex ports config model layout tokenizer"
    expected += " data.train data.eval reward run.dir checkpoint.dir server"
    assert looked_at == {*expected.split(), "gradient scale"}
    assert sorted(path for path in setting.config.parent.rglob("*")) == before


# --- planted problems -------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def messages(setting: Setting, template: str | None, role: str = "user") -> None:
    line = {"prompt": [{"role": role, "content": "1+1="}], "label": "2"}
    setting.train.write_text(json.dumps(line) + "\n")
    setting.edit("tokenizer_config.json", chat_template=template)


Plant = Callable[[Setting], object]
PROBLEMS: dict[str, tuple[Plant, tuple[str, ...], str, str]] = {
    "unknown key": (
        lambda s: s.config.write_text(s.config.read_text() + "clip = 1\n"),
        (),
        "algorithm.clip",
        "the keys of [algorithm] are",
    ),
    "contradiction": (
        lambda s: None,
        ("--parallel.sequence", "true"),
        "parallel.sequence",
        "parallel.tensor",
    ),
    "a number out of range": (
        lambda s: None,
        ("--train.steps", "0"),
        "train.steps: must be greater",
        "`mcore-rl config train` says what each key means",
    ),
    "no model": (lambda s: shutil.rmtree(s.model), (), "config.json", ""),
    "unsupported model": (
        lambda s: s.edit("config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        (),
        "gpt2",
        "",
    ),
    "weights of another shape": (lambda s: s.edit("config.json", intermediate_size=64), (), "has shape", ""),
    "damaged weights": (
        lambda s: (s.model / "model.safetensors").write_bytes(b"x"),
        (),
        "safetensors",
        "again",
    ),
    "illegal layout": (lambda s: None, ("--parallel.tensor", "3"), "parallel.tensor = 3", "legal: [1, 2"),
    "no tokenizer": (
        lambda s: [p.unlink() for p in s.model.glob("tokenizer*")],
        (),
        "tokenizer",
        "put tokenizer.json beside config.json",
    ),
    "messages without a chat template": (
        lambda s: messages(s, None),
        ("--rollout.prompts_per_step", "1"),
        "no chat template",
        "give prompts as strings",
    ),
    "messages that end with the answer": (
        lambda s: messages(s, "{{ messages[0]['content'] }}{{ messages[-1]['content'] }}", "assistant"),
        ("--rollout.prompts_per_step", "1"),
        "train.jsonl:1:prompt[0]: ends with the assistant's turn",
        "take the turn out",
    ),
    "labels that do not fit": (
        lambda s: (
            s.edit("config.json", max_position_embeddings=8),
            s.train.write_text(json.dumps({"prompt": "1+1=", "label": "2" * 8}) + "\n"),
            s.config.write_text(s.config.read_text().replace(f'eval = "{s.eval}"\n', "")),
        ),
        ("--run.kind", "sft", "--supervised.batch_size", "1"),
        "train.jsonl:1:label: prompt '1' of 4 tokens and the label and its end of sequence of 9 make 13",
        "shorten it",
    ),
    "a batch larger than the file": (
        lambda s: s.train.write_text("\n".join(s.train.read_text().split("\n")[:5])),
        ("--run.kind", "sft", "--supervised.batch_size", "6"),
        "supervised.batch_size = 6, the file has 5 usable prompts",
        "lower it",
    ),
    "damaged generation_config.json": (
        lambda s: (s.model / "generation_config.json").write_text("[" * 10_000),
        (),
        "generation_config.json:1: nested too deeply",
        "at most 100 levels",
    ),
    "template without the system turn": (
        lambda s: messages(s, "{{ messages[-1]['content'] }}"),
        ("--rollout.prompts_per_step", "1"),
        "template drops the system turn",
        "belong to the model",
    ),
    "malformed line": (
        lambda s: s.train.write_text(s.train.read_text() + "{,\n"),
        (),
        f"train.jsonl:{ROWS + 1}",
        "fix the line",
    ),
    "a curriculum that takes nothing": (
        lambda s: None,
        ("--data.curriculum", "tests.doctor.rewards:nothing_taken"),
        f"data.curriculum takes 0 of {ROWS} prompts by the end of epoch 1, and 64 are asked at once",
        "let it take more",
    ),
    "no such file": (lambda s: s.eval.unlink(), (), "eval.jsonl", "check the path"),
    "held-out prompts in training": (
        lambda s: s.eval.write_text(s.train.read_text()),
        (),
        "held-out prompts are training prompts",
        "remove them from one file",
    ),
    "fewer prompts than a step asks for": (
        lambda s: s.train.write_text("\n".join(s.train.read_text().split("\n")[:5])),
        (),
        "the file has 5 usable prompts",
        "lower it",
    ),
    "no such reward": (
        lambda s: None,
        ("--reward.function", "no_such:f"),
        "cannot import no_such",
        "PYTHONPATH",
    ),
    "reward that is no number": (
        lambda s: None,
        ("--reward.function", "tests.doctor.rewards:nothing"),
        "returned NoneType",
        "return a float",
    ),
    "run directory is a file": (
        lambda s: (s.config.parent / "run").write_text(""),
        ("--checkpoint.every", "0"),
        "is a file",
        "name a directory",
    ),
    "checkpoints into a file": (
        lambda s: (s.config.parent / "saved").write_text(""),
        ("--checkpoint.every", "1", "--checkpoint.dir", "SETTING/saved"),
        "is a file",
        "name a directory",
    ),
    "FP8 without a GPU": (lambda s: None, ("--model.precision", "fp8"), "needs a GPU", "bf16"),
    "no server interpreter": (
        lambda s: None,
        ("--rollout.server", "sglang", "--rollout.python", "/nowhere/python"),
        "/nowhere/python is no program",
        "name the interpreter",
    ),
    "longer than the model": (
        lambda s: (
            s.edit("config.json", max_position_embeddings=64),
            s.config.write_text(s.config.read_text().replace(f'eval = "{s.eval}"\n', "")),
        ),
        ("--rollout.max_new_tokens", "100"),
        "64 positions",
        "lower rollout.max_new_tokens",
    ),
    "a stop token of another tokenizer": (
        lambda s: None,
        ("--rollout.stop_token_ids", "[999]"),
        "[999]",
        "name ids of this model",
    ),
    "dead server": (
        lambda s: None,
        ("--rollout.urls", '["http://127.0.0.1:9"]'),
        "127.0.0.1:9",
        "start the server",
    ),
    "key not set": (
        lambda s: None,
        ("--rollout.urls", '["http://127.0.0.1:9"]', "--rollout.api_key_env", "NO_SUCH_KEY"),
        "NO_SUCH_KEY",
        "",
    ),
}


def test_what_needs_no_weights_is_examined_without_them(capsys, setting: Setting):
    for file in setting.model.glob("*.safetensors"):
        file.unlink()
    code, findings = doctor(capsys, setting.config)
    (found,) = bad(findings)
    assert "put the published ones beside config.json" in found["remedy"]
    assert {"layout", "tokenizer", "data.train"} <= {finding["check"] for finding in findings}
    assert code == 2


@pytest.mark.slow
def test_a_reward_that_never_comes(capsys, setting: Setting):
    flags = ("--reward.function", "tests.doctor.rewards:never", "--reward.timeout", "0.5")
    code, findings = doctor(capsys, setting.config, *flags)
    (found,) = bad(findings)
    assert "no reward within 0.5 s" in found["what"]
    assert found["remedy"].startswith("handle these responses in the function")
    assert code == 2


@pytest.mark.slow
def test_a_reward_with_an_alarm_works_here_as_it_does_in_training(capsys, setting: Setting):
    code, findings = doctor(capsys, setting.config, "--reward.function", "tests.doctor.rewards:alarmed")
    assert not bad(findings)
    assert code == 0


@pytest.mark.parametrize(("text", "level"), [("label", "warning"), ("label_text", "ok")])
def test_labels_that_equal_no_text_are_noticed(capsys, setting: Setting, text: str, level: str) -> None:
    rows = [json.loads(line) for line in setting.train.read_text().splitlines()]
    setting.train.write_text("".join(json.dumps(row | {"label": int(row["label"])}) + "\n" for row in rows))
    _, findings = doctor(capsys, setting.config, "--reward.function", f"tests.doctor.rewards:equals_{text}")
    (found,) = [finding for finding in findings if finding["check"] == "reward"]
    assert found["level"] == level
    assert ("label_text" in found["remedy"]) == (level == "warning")


TABLE = "reward.functions.a"


@pytest.mark.parametrize(
    ("flags", "level", "said"),
    [
        (("--reward.function", "tests.doctor.rewards:half"), "ok", r"1; \d of 8 are void"),
        (
            ("--reward.function", "tests.doctor.rewards:by_token"),
            "ok",
            "gives the first prompt's own label 1",
        ),
        (("--reward.function", "tests.doctor.rewards:judged_by_nobody"), "warning", "no route"),
        (
            (
                "--reward.functions.a.function",
                "tests.doctor.rewards:half",
                "--reward.functions.a.when.id",
                "no",
            ),
            "warning",
            "functions.a is for none of the first 2000 prompts",
        ),
        (
            ("--reward.function", "tests.doctor.rewards:half", "--reward.weights.a", "2"),
            "error",
            "reward.weights: no sample",
        ),
    ],
    ids=["void", "by token", "all void", "no row", "weight"],
)
def test_rewards_are_tried_as_a_run_tries_them(
    capsys, setting: Setting, flags: tuple[str, ...], level: str, said: str
) -> None:
    if "--reward.functions.a.when.id" in flags:
        rows = ({"prompt": f"{n}+1=", "label": str(n + 1)} for n in range(2100))
        setting.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, findings = doctor(capsys, setting.config, *flags)
    (found, *_) = [finding for finding in findings if finding["check"] == "reward"]
    assert found["level"] == level
    assert re.search(said, found["what"])


@pytest.mark.parametrize(
    ("function", "tools", "said"),
    [
        ("mcore_rl.environments.tools:gone", None, ["has no gone"]),
        (CALL_TOOLS, "math:gone", ["has no gone"]),
        (CALL_TOOLS, "examples.calculator:calculate", ["no word of tools", "no response template"]),
    ],
)
def test_an_environment_that_cannot_be_played_is_found(
    capsys, setting: Setting, function: str, tools: str | None, said: list[str]
) -> None:
    setting.edit("tokenizer_config.json", chat_template="{{ messages[0].content }}")
    flags = () if tools is None else ("--environment.args.tools", f'["{tools}"]')
    small = ("--data.max_prompt_tokens", "16", "--environment.max_tokens", "64")
    _, findings = doctor(capsys, setting.config, "--environment.function", function, *small, *flags)
    found = [finding for finding in bad(findings) if finding["check"] == "environment"]
    assert all(what in finding["what"] for what, finding in zip(said, found, strict=True))
    assert all(finding["remedy"] for finding in found)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_planted_problem_is_found_with_its_remedy(capsys, setting: Setting, name: str):
    plant, flags, what, remedy = PROBLEMS[name]
    plant(setting)
    here = [flag.replace("SETTING", str(setting.config.parent)) for flag in flags]
    code, findings = doctor(capsys, setting.config, *here)
    (found,) = bad(findings)
    assert what in found["what"] + found["remedy"]
    assert remedy in found["remedy"] + found["what"]
    assert found["remedy"]
    assert code == (0 if found["level"] == "warning" else found["exit_code"])


def test_an_error_of_every_check_has_a_remedy_though_its_message_has_none():
    """Those of the checks as the sources name them, with a message that ends where it says what is wrong."""
    sources = "".join(file.read_text() for file in Path(finding.__file__).parent.glob("*.py"))
    checks = {*re.findall(r'(?:guarded|of_error)\("([\w. -]+)"', sources), "eval.sets.a.path", "data.eval"}
    assert {"config", "model", "reward", "server"} <= checks
    for check in checks:
        said = finding.of_error(check, ConfigError("here: rope.theta: is not supported"))
        assert len(said.remedy.split()) > 4
    many = ConfigError("a.toml: algorithm.loss: f must be a function; write one such as\n    def f(rows):")
    assert finding.of_error("config", many).remedy.startswith("write one such as\n    def f(rows):")
    assert separate("a: one\n    more of it\nb: two") == ["a: one\n    more of it", "b: two"]


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if", "{{ range(10**9)|list }}"])
def test_a_template_that_fails_is_a_finding_and_all_else_is_examined(capsys, setting: Setting, template: str):
    messages(setting, template)
    code, findings = doctor(capsys, setting.config, "--rollout.prompts_per_step", "1")
    assert [f["check"] for f in bad(findings)] == ["chat template", "data.train"]
    assert "train.jsonl:1:prompt: the chat template fails on it" in bad(findings)[1]["what"]
    assert {"data.eval", "run.dir", "server"} <= {f["check"] for f in findings}
    assert code == 2


def test_a_damaged_config_json_is_a_finding_and_all_else_is_examined(capsys, setting: Setting):
    (setting.model / "config.json").write_text('{"a": ' * 10_000)
    code, findings = doctor(capsys, setting.config, "--checkpoint.every", "1")
    assert [f["check"] for f in bad(findings)] == ["model"], "said once, though the disk needs it too"
    assert {"run.dir", "server", "ports"} <= {f["check"] for f in findings}
    assert code == 2


def test_a_disk_that_is_too_small(tmp_path: Path):
    (finding,) = check_disk("run.dir", tmp_path / "new" / "run", needed=1 << 60)
    assert (finding.level, finding.remedy) == ("error", "free space, or choose a larger disk")
    assert [f.level for f in check_disk("run.dir", tmp_path / "new" / "run", needed=1)] == ["ok"]
    assert not (tmp_path / "new").exists()


def test_another_megatron_version(capsys, monkeypatch, tmp_path: Path, setting: Setting):
    """A distribution of another version comes first on the path."""
    planted = tmp_path / "planted" / "megatron_core-0.15.0.dist-info"
    planted.mkdir(parents=True)
    (planted / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.15.0\n")
    monkeypatch.syspath_prepend(planted.parent)
    code, findings = doctor(capsys, setting.config)
    (found,) = bad(findings)
    assert "megatron-core 0.15.0 is not supported" in found["what"]
    assert "install 0.16.1" in found["what"] + found["remedy"]
    assert code == 2


# --- servers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(sound_setting: Path) -> Iterator[str]:
    os.environ["DOCTOR_TEST_KEY"] = "a key"
    with embedded(sound_setting / "model", api_key="a key") as (url, _):
        yield url
    del os.environ["DOCTOR_TEST_KEY"]


def test_a_server_that_asks_for_a_key(capsys, setting: Setting, server: str):
    code, findings = doctor(capsys, setting.config, "--rollout.urls", f'["{server}"]')
    (found,) = bad(findings)
    assert "401" in found["what"]
    assert "set api_key_env" in found["remedy"]
    assert code == 2


def test_a_server_of_another_family(capsys, setting: Setting, server: str):
    """And with its key, the server is no problem."""
    flags = ("--rollout.urls", f'["{server}"]', "--rollout.api_key_env", "DOCTOR_TEST_KEY")
    setting.edit("config.json", model_type="qwen3_moe")
    _, findings = doctor(capsys, setting.config, *flags, "--rollout.prompts_per_step", "7000")
    assert any("of type qwen3, model.path is qwen3_moe" in finding["what"] for finding in findings)
    setting.edit("config.json", model_type="qwen3")
    _, findings = doctor(capsys, setting.config, *flags, "--rollout.prompts_per_step", "7000")
    assert [finding["check"] for finding in bad(findings)] == ["data.train"]
    assert any(finding["check"] == "server" and finding["level"] == "ok" for finding in findings)


def test_adapters_say_which_of_them_a_file_has_not(capsys, setting: Setting, tmp_path: Path):
    adapters = AdapterMap(read_architecture(setting.model), Lora(2, 4.0, ("qkv",)))
    tensors = {name: torch.ones(shape) for name, shape in adapters.hf_shapes().items()}
    write_adapter(adapters, tensors, tmp_path, base="model")
    flags = (
        "--lora.rank",
        "2",
        "--lora.alpha",
        "4",
        "--lora.targets",
        '["qkv"]',
        "--lora.path",
        str(tmp_path),
    )
    for but, kept in (
        ("", "proj"),
        (" but for ['model.layers.*.self_attn.k_proj'], which begin at 0", "[qv]_proj"),
    ):
        save_file({n: t for n, t in tensors.items() if re.search(kept, n)}, tmp_path / WEIGHTS)
        if but:
            told = json.loads((tmp_path / CONFIG).read_text()) | {"target_modules": ["q_proj", "v_proj"]}
            (tmp_path / CONFIG).write_text(json.dumps(told))
        _, findings = doctor(capsys, setting.config, *flags)
        (found,) = (finding for finding in findings if finding["check"] == "lora")
        assert found["what"].endswith(f"{tmp_path} has them{but}")
