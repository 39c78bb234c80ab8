"""Every shipped recipe: small, legal, with memory to spare, and clear about what it lacks on this machine."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mcore_rl.__main__ import main
from mcore_rl.config import load_config
from mcore_rl.directories import locked
from mcore_rl.errors import EXIT_CONFIG, ConfigError, LayoutError, StorageError
from mcore_rl.launch.rehearse import LOCK, rehearse, shrink_parallel, write_rehearsal
from mcore_rl.log import read_metrics
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.precision import check_cpu_fraction, check_precision
from mcore_rl.plan.command import plan
from tests.e2e.ranks import Ranks
from tests.sources import ROOT

SCRIPTS = sorted(path for path in (ROOT / "examples").glob("train_*.sh"))
RECIPES = [path.with_name(path.name.removeprefix("train_")).with_suffix(".toml") for path in SCRIPTS]
LINES = 45


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def planned(recipe: Path, capsys: pytest.CaptureFixture[str], **options) -> dict:
    plan(recipe, options.pop("overrides", ()), as_json=True, **options)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_all_are_here() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {f"{name}_70b" for name in ("gspo", "ppo", "grpo", "sapo", "liteppo")}
    assert names >= {"gspo_8b", "gspo_30b_a3b", "ppo_8b", "gspo_deepseek_v3", "gspo_glm_4_5"}
    kinds = ("sft", "reward_model", "dpo", "distill")
    assert names >= {f"{name}_{size}" for name in kinds for size in ("8b", "70b")}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_fits_with_a_tenth_to_spare(recipe: Path, capsys) -> None:
    found = planned(recipe, capsys)
    assert found["configured"]["spare"] >= 0.1
    assert found["layouts"][0]["fits"]
    if recipe.stem.startswith("ppo"):
        stage = found["configured"]["stages"][0]
        assert min(stage[name] for name in ("weights", "reference", "critic", "reward_model")) > 0
    if recipe.stem.startswith("distill"):
        assert min(found["configured"]["stages"][-1][name] for name in ("teacher", "teacher_said")) > 0


def test_a_reward_model_is_planned_without_an_output_layer(capsys) -> None:
    policy, scored = (
        planned(ROOT / "examples" / f"{name}_8b.toml", capsys)["configured"]["stages"][0]
        for name in ("sft", "reward_model")
    )
    arch = read_architecture(ROOT / "examples/models/Qwen3-8B")
    less = (arch.vocab * arch.hidden / 4 - arch.hidden) / (1 << 30)
    assert policy["weights"] - scored["weights"] == pytest.approx(2 * less, abs=0.01)
    assert policy["gradients"] - scored["gradients"] == pytest.approx(4 * less, abs=0.01)
    assert policy["optimizer"] - scored["optimizer"] == pytest.approx(12 * less, abs=0.01)
    assert scored.get("head", 0) == 0


def test_too_little_memory_is_a_layout_error(capsys) -> None:
    """Negative control: the same recipe on GPUs of half the size."""
    with pytest.raises(LayoutError, match=r"parallel.*leaves -?\d+% of 40 GiB"):
        planned(ROOT / "examples" / "gspo_8b.toml", capsys, gpu_memory=40.0)


@pytest.mark.parametrize(
    "numbers",
    [
        {"gpu_memory": -1.0},
        {"gpu_memory": float("nan")},
        {"server_gpus": 0},
        {"prompt_tokens": -5.0},
        {"response_tokens": 20000.0},
        {"segments": 0.5},
        {"segments": float("inf")},
    ],
)
def test_numbers_that_mean_nothing_are_refused(numbers: dict[str, float]) -> None:
    (flag,) = numbers
    with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')}"):
        plan(ROOT / "examples/gspo_70b.toml", **numbers)


def test_a_reward_model_that_cannot_be_cut_so_is_named() -> None:
    with pytest.raises(LayoutError, match=r"reward\.model is cut as the policy is: .* 36 layers"):
        plan(ROOT / "examples/ppo_70b.toml", ["--reward.model", "examples/models/Qwen3-8B"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--rehearse", "--resume"], "--rehearse and --resume"),
        (["--resume", "latest", "--replay", "x"], "--resume and --replay"),
        (["--rehearse-procs", "4"], "only with --rehearse"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(flags: list[str], says: str, capsys) -> None:
    assert main(["train", "examples/gspo_8b.toml", *flags]) == EXIT_CONFIG
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("pipeline", "nodes", "each"), [(3, 2, 6), (4, 2, 8), (5, 4, 5)])
def test_the_launch_line_has_as_many_ranks_as_it_says(pipeline: int, nodes: int, each: int, capsys) -> None:
    """A layout of 4 x `pipeline` ranks on nodes of 8 GPUs."""
    assert main(["train", "examples/gspo_8b.toml", "--parallel.pipeline", str(pipeline)]) == EXIT_CONFIG
    assert f"torchrun --nnodes {nodes} --nproc-per-node {each} " in capsys.readouterr().err


def test_the_best_layout_is_named_with_its_reason(capsys) -> None:
    recipe = str(ROOT / "examples/gspo_8b.toml")
    assert main(["plan", recipe, "--search"]) == 0
    (sentence,) = capsys.readouterr().out.splitlines()
    best = planned(ROOT / "examples/gspo_8b.toml", capsys)["layouts"][0]
    assert sentence.startswith(f"Best for 4 GPUs: {best['layout']}, {best['seconds']['total']:.0f} s a step")
    assert re.search(r"of which generation has .* to spare: .*the config's tp4\+sp takes", sentence)


def test_a_stale_recipe_hides_what_takes_less(capsys) -> None:
    seconds = planned(ROOT / "examples/gspo_70b.toml", capsys)["configured"]["seconds"]
    assert seconds["beside"]
    assert seconds["total"] == max(
        seconds["generate"], sum(seconds[k] for k in ("log_probs", "train", "publish"))
    )


def test_what_the_cpu_updates_is_in_host_memory(capsys) -> None:
    keys = ["--checkpoint.every", "0", "--optimizer.cpu_fraction"]
    whole, half = (
        planned(ROOT / "examples/gspo_8b.toml", capsys, overrides=[*keys, share])["configured"]["stages"][0]
        for share in ("0.0", "0.5")
    )
    assert half["optimizer"] == pytest.approx(whole["optimizer"] / 2)
    assert half["host"] == pytest.approx(whole["optimizer"] / 2 * 4 / 3)  # three tensors, and a gradient


def test_an_illegal_layout_says_why(capsys) -> None:
    found = planned(ROOT / "examples" / "gspo_8b.toml", capsys)
    why = {entry["layout"]: entry["why"] for entry in found["illegal"]}
    assert "does not divide the model's 36 layers" in why["pp4vpp2"]
    with pytest.raises(LayoutError, match="does not divide the model's 36 layers"):
        plan(ROOT / "examples" / "gspo_8b.toml", ["--parallel.pipeline", "5"], as_json=True)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["configured"] is None
    assert found["gpus"] == 20
    assert found["layouts"], "what could be taken instead"
    with pytest.raises(LayoutError, match="give a multiple of 4"):
        plan(ROOT / "examples" / "gspo_8b.toml", gpus=6, as_json=True)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["configured"] is None
    assert found["gpus"] == 6


def test_a_search_answers_where_the_config_has_another_number_of_gpus(capsys) -> None:
    with pytest.raises(LayoutError, match=r"takes 32 GPUs; set parallel\.data = 2, or leave it out"):
        plan(ROOT / "examples/gspo_8b.toml", ["--parallel.data", "8"], gpus=8, only_best=True)
    (sentence,) = capsys.readouterr().out.splitlines()
    assert sentence.startswith("Best for 8 GPUs: ")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_it_is_short_and_names_its_sources(recipe: Path) -> None:
    text = recipe.read_text()
    assert len(text.splitlines()) <= LINES
    assert re.search(r"\d{4}\.\d{5}", text)
    assert load_config(recipe).train.steps > 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_shell_and_python(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=20)
    tree = ast.parse(script.read_text())
    assert f"examples/{script.stem.removeprefix('train_')}.toml" in ast.dump(tree)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False
    )


@pytest.mark.parametrize("starter", ["bash", "torchrun"])
@pytest.mark.slow
def test_a_machine_without_gpus_gets_the_launch_line(starter: str, tmp_path: Path) -> None:
    command = {"bash": ["bash"], "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}
    done = run(*command[starter], "examples/train_gspo_70b.sh", "--run.dir", str(tmp_path / "run"))
    assert done.returncode == {"bash": 2, "torchrun": 1}[starter]
    assert "LayoutError: [parallel] asks for tensor 8 x pipeline 4 x context 2 = 64 GPUs" in done.stderr
    assert "torchrun --nnodes 8 --nproc-per-node 8" in done.stderr
    assert "mcore-rl plan examples/gspo_70b.toml --gpus N" in done.stderr
    assert "bash examples/train_gspo_70b.sh --rehearse" in done.stderr


def test_fp8_without_a_gpu_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r'model\.precision = "fp8" needs a GPU.*"bf16"'):
        check_precision("fp8")
    check_precision("bf16")


def test_a_share_of_the_update_on_the_cpu_wants_a_gpu_and_the_engine(monkeypatch) -> None:
    check_cpu_fraction(0.0)
    with pytest.raises(ConfigError, match=r"cpu_fraction = 0\.5: it moves parameters from a GPU.*offloaded"):
        check_cpu_fraction(0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"cpu_fraction = 1\.0: .* Transformer Engine .*gpu_machine\.sh"):
        check_cpu_fraction(1.0)


@pytest.mark.parametrize(
    ("recipe", "processes", "small"),
    [("gspo_70b", 8, (2, 2, 2, 1, 1)), ("gspo_30b_a3b", 4, (2, 1, 1, 2, 2)), ("gspo_8b", 2, (2, 1, 1, 1, 1))],
)
def test_a_rehearsal_keeps_every_kind_of_parallelism(recipe: str, processes: int, small: tuple) -> None:
    p = shrink_parallel(load_config(ROOT / "examples" / f"{recipe}.toml").parallel, processes)
    assert (p.tensor, p.pipeline, p.context, p.expert, p.data) == small


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_rehearsed_model_and_its_tokenizer_belong_together(recipe: Path, tmp_path: Path) -> None:
    """For some families transformers adds tokens that a tokenizer lacks."""
    _, tiny = write_rehearsal(load_config(recipe, ["--run.dir", str(tmp_path)]), 8)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model.path, local_files_only=True)
    assert len(tokenizer) == read_architecture(tiny.model.path).vocab
    assert tokenizer.decode(tokenizer.encode("13+4=")) == "13+4="


def test_a_rehearsal_that_cannot_says_how_many_it_needs() -> None:
    parallel = load_config(ROOT / "examples" / "gspo_70b.toml").parallel
    with pytest.raises(LayoutError, match="takes 8 processes"):
        shrink_parallel(parallel, 4)


def test_a_second_rehearsal_is_refused_and_removes_nothing(tmp_path: Path) -> None:
    config = load_config(ROOT / "examples" / "gspo_70b.toml", ["--run.dir", str(tmp_path)])
    file, _ = write_rehearsal(config, 8)
    with locked(tmp_path, "", name=LOCK), pytest.raises(StorageError, match="is in use by"):
        rehearse(config)
    assert file.exists()
    write_rehearsal(config, 8)  # once more, in the place of the one before


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.xdist_group("launched")
def test_a_rehearsal_trains_resumes_and_exports(ranks: Ranks, tmp_path: Path) -> None:
    """PPO of Llama with all its models, on two stages; that on two nodes is tensor parallel."""
    command = ["examples/train_ppo_70b.sh", "--rehearse", "--rehearse-procs", "2"]
    command += ["--parallel.tensor", "1", "--parallel.sequence", "false"]
    done = ranks.launch(*command, "--parallel.context", "1", "--run.dir", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    for said in (
        "pp8 becomes pp2",
        "3 steps trained and saved",
        "resumed",
        "exported and read back",
    ):
        assert said in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.xdist_group("launched")
def test_a_rehearsal_on_two_nodes(ranks: Ranks, tmp_path: Path) -> None:
    """Two agents of torchrun on this machine, as on a cluster: one rendezvous, a rank each, TP over both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["torchrun", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "examples/train_gspo_8b.sh"]
    command += ["--rehearse", "--run.dir", str(tmp_path / "run")]
    logs = [tmp_path / f"agent_{number}" for number in range(2)]
    agents = []
    try:
        for log in logs:
            agents.append(ranks.start(*command, log=log))
        codes = [agent.wait(timeout=380) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    said = "".join(log.read_text() for log in logs)
    assert codes == [0, 0], said[-3000:]
    assert "tp2" in said
    assert said.count("step 3/3") == 1, "one of the agents has rank 0"
    events = read_metrics(tmp_path / "run" / "rehearsal" / "run" / "events.jsonl")
    assert [event["world_size"] for event in events if event["kind"] == "start"] == [2]
