"""What is refused before a process group is formed or a weight is built; whole commands are in tests/e2e."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.arithmetic import main as write_task
from mcore_rl.config import load_config
from mcore_rl.errors import ConfigError, LayoutError
from mcore_rl.launch.preflight import check_node
from mcore_rl.training.data import fewest_positions, response_of
from mcore_rl.training.setup import load_tokenizer, read_prompts, start_trainer
from tests.sources import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("setup")
    assert write_task([str(made), "--train", "8", "--eval", "2", "--layers", "1", "--hidden", "64"]) == 0
    return made


def test_a_layout_that_does_not_fit_the_model_is_refused_before_a_group_is_formed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """There is nobody to form one with: it would wait, not raise."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    keys = {"model.path": folder / "model", "parallel.tensor": "3", "run.dir": tmp_path / "run"}
    overrides = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    config = load_config(ROOT / "examples" / "gspo_tiny.toml", overrides)
    refused = pytest.raises(LayoutError, match=r"parallel\.tensor = 3 does not divide")
    with refused as caught, start_trainer(config, optimizer_steps=1, resume=None):
        pass
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--parallel.tensor", "3"], r"parallel\.tensor = 3 does not divide"),
        (
            ["--parallel.expert", "2", "--parallel.data", "2"],
            r"parallel\.expert = 2, but a qwen3 model has no",
        ),
        (["--parallel.pipeline", "2"], r"parallel\.pipeline x parallel\.virtual_pipeline = 2 does not"),
        (["--reward.model", "MODEL", "--parallel.tensor", "4"], r"reward\.model is cut as the policy is: "),
        (["--parallel.tensor", "4"], ""),
    ],
)
def test_the_launcher_refuses_a_layout_that_no_model_of_the_run_divides_by(
    folder: Path, tmp_path: Path, flags: list[str], says: str
) -> None:
    given = json.loads((folder / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(given | {"num_attention_heads": 6, "num_key_value_heads": 6})
    )
    words = [word.replace("MODEL", str(tmp_path)) for word in flags]
    where = ["--model.path", str(folder / "model"), "--run.dir", str(tmp_path / "run")]
    where += ["--parallel.tensor", "1"]
    config = load_config(ROOT / "examples" / "gspo_tiny.toml", [*where, *words])
    if not says:
        check_node(config)
        return
    with pytest.raises(LayoutError, match=says):
        check_node(config)


@pytest.mark.parametrize("rows", [10, None])
def test_a_tokenizer_with_an_id_that_the_model_has_no_row_for_is_refused(folder: Path, rows: int | None):
    """Untouched, as the control, it is loaded."""
    file = folder / "model" / "config.json"
    own = json.loads(file.read_text())
    if rows is None:
        assert load_tokenizer(folder / "model").eos_token_id is not None
        return
    file.write_text(json.dumps(own | {"vocab_size": rows}))
    try:
        with pytest.raises(ConfigError, match=rf"the tokenizer has token id \d+, the model only {rows} rows"):
            load_tokenizer(folder / "model")
    finally:
        file.write_text(json.dumps(own))


@pytest.mark.parametrize(
    ("key", "value", "reads", "message"),
    [
        ("data.chat_template_kwargs.enable_thinkin", "false", "enable_thinking", "reads no such variable"),
        ("data.chat_template_kwargs.enable_thinking", "false", "enable_thinking", ""),
        ("data.tools", "tools.json", "messages", "the chat template reads no tools"),
        ("data.tools", "tools.json", "tools", ""),
    ],
)
def test_what_the_chat_template_does_not_read_is_refused(
    folder: Path, tmp_path: Path, key: str, value: str, reads: str, message: str
):
    (tmp_path / "tools.json").write_text('[{"name": "f"}]')
    value = value.replace("tools.json", str(tmp_path / "tools.json"))
    overrides = ["--model.path", str(folder / "model"), "--run.dir", str(tmp_path / "r"), f"--{key}", value]
    overrides += ["--data.apply_chat_template", "true", "--data.train", str(folder / "train.jsonl")]
    config = load_config(ROOT / "examples" / "gspo_tiny.toml", overrides)
    tokenizer = load_tokenizer(folder / "model")
    tokenizer.chat_template = f"{{% if {reads} %}}{{% endif %}}{{{{ messages[0].content }}}}"
    if message:
        with pytest.raises(ConfigError, match=rf"{key}: .*{message}"):
            read_prompts(config, config.data.train, tokenizer)
    else:
        assert len(read_prompts(config, config.data.train, tokenizer)) == 8


@pytest.mark.parametrize("key", ["reward.model", "critic.path", "distill.teachers.large"])
def test_sequences_fit_every_model_that_reads_them(folder: Path, tmp_path: Path, key: str) -> None:
    """Beyond its positions a model answers something, and nothing says that it never learnt to."""
    small, given = tmp_path / "small", json.loads((folder / "model" / "config.json").read_text())
    small.mkdir()
    (small / "config.json").write_text(json.dumps(given | {"max_position_embeddings": 8}))
    overrides = ["--model.path", str(folder / "model"), "--run.dir", str(tmp_path / "run")]
    config = load_config(ROOT / "examples" / "gspo_tiny.toml", overrides)
    assert fewest_positions(config) == (512, "the model")
    section, name = key.split(".")[:2]
    changed = getattr(config, section).model_copy(
        update={name: {"large": small} if section == "distill" else small}
    )
    config = config.model_copy(update={section: changed})
    assert fewest_positions(config) == (8, key)
    held_out = fewest_positions(config, held_out=True)
    assert held_out == ((8, key) if key == "reward.model" else (512, "the model"))


@pytest.mark.parametrize(("kind", "behind"), [("reward_model", 1), ("preference", 0)])
def test_a_score_has_room_behind_its_sequence(folder: Path, tmp_path: Path, kind: str, behind: int) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f'run = {{kind = "{kind}", dir = "{tmp_path}/run"}}\n'
        f'model.path = "{folder}/model"\ndata.train = "pairs.jsonl"\ntrain.steps = 1\n'
    )
    positions, room = response_of(load_config(file)).limits
    assert (positions.behind, room.behind) == (0, behind)
