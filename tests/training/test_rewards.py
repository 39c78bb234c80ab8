"""Rewards from a reward model: the scores of transformers' sequence classifier, at every layout alike."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, Qwen3Config, Qwen3ForSequenceClassification

from mcore_rl.config import Config, load_config, notes
from mcore_rl.doctor.inputs import check_inputs
from mcore_rl.errors import ConfigError, RewardError
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.residency import storages, weights_of
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.pool import Pool
from mcore_rl.plan.memory import stage_memory
from mcore_rl.plan.work import work_of
from mcore_rl.types import Group, Sample
from tests.training.test_ppo import built_run, config, recorded

__all__ = ["config"]


@pytest.fixture(scope="module")
def judged(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The policy's tokenizer; another size than the policy's, and a tied embedding, which no head uses.

    Some samples end with the token that it pads with, as all do where that is the end of sequence.
    """
    path = tmp_path_factory.mktemp("judge") / "reward_model"
    vocab = read_architecture(config.model.path).vocab
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_labels": 1, "pad_token_id": 5}
    torch.manual_seed(2)
    classifier = Qwen3ForSequenceClassification(
        Qwen3Config(vocab_size=vocab, initializer_range=0.2, tie_word_embeddings=True, **sizes, **heads)
    )
    classifier.save_pretrained(path)
    for file in config.model.path.glob("*token*"):
        shutil.copy(file, path)
    return with_model(config, path)


def with_model(config: Config, path: Path) -> Config:
    return config.model_copy(update={"reward": config.reward.model_copy(update={"model": path})})


def unscored(groups: list[Group]) -> list[Group]:
    return [replace(g, samples=tuple(replace(s, reward=None) for s in g.samples)) for g in groups]


def groups_of(run: Any) -> list[Group]:
    """The groups of test_ppo's recorded rollout, less their rewards; one group has lost all its samples."""
    samples: dict[str, list[Sample]] = {"lost@1": []}
    for sample in recorded(run).samples:
        samples.setdefault(sample.id.rpartition("/")[0], []).append(sample)
    return unscored([Group(name, tuple(of_it)) for name, of_it in samples.items()])


def scores(config: Config, layout: Layout, directory: Path) -> list[tuple[tuple[int, ...], float | None]]:
    """(tokens, reward) of every recorded sample. For a pool's ranks."""
    with built_run(config, layout, directory) as run:
        groups = groups_of(run)
        assert run.rewards.by_function(groups) == groups
        judged = run.rewards.by_model(groups)
        assert unscored(judged) == groups
        return [(s.prompt.token_ids + s.token_ids, s.reward) for group in judged for s in group.samples]


@pytest.fixture(scope="module")
def expected(judged: Config) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(judged.reward.model, dtype=torch.float32)

    def score(tokens: tuple[int, ...]) -> float:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits.item()

    return score


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2+sp", "pp2", "cp2"])
def test_it_is_the_score_of_transformers(pool2, judged, expected, layout, tmp_path):
    ranks = pool2.run(scores, judged, Layout.parse(layout), tmp_path, timeout=100.0)
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == 16
    wanted = [expected(tokens) for tokens, _ in ranks[0]]
    np.testing.assert_allclose([reward for _, reward in ranks[0]], wanted, atol=1e-5)
    assert any(tokens[-1] == 5 for tokens, _ in ranks[0])
    shorter = [expected(tokens[:-1]) for tokens, _ in ranks[0]]
    assert np.abs(np.subtract(wanted, shorter)).max() > 1e-2  # a row too early would be seen


def away(config: Config, directory: Path) -> dict[str, Any]:
    """What an offloaded one holds outside and inside its phase, and its scores. For a pool's rank."""
    where = config.residency.model_copy(update={"reward_model": "offloaded"})
    with built_run(config.model_copy(update={"residency": where}), Layout(), directory) as run:
        model = run.rewards.model
        assert model is not None
        held = lambda: sum(s.nbytes() for s in storages(weights_of(model)))  # noqa: E731
        outside = held()
        with run.residency.during("rewards"):
            inside = held()
        judged = run.rewards.by_model(groups_of(run))
        planned = stage_memory(run.trainer.policy.arch, Layout(), work_of(run.trainer.config))
        return {
            "outside": outside,
            "inside": inside,
            "rewards": [s.reward for group in judged for s in group.samples],
            "planned": planned[0].reward_model,
        }


def test_offloaded_it_scores_the_same_and_has_the_planned_size(pool1: Pool, judged, tmp_path):
    at_home = pool1.run(scores, judged, Layout(), tmp_path / "here")[0]
    there = pool1.run(away, judged, tmp_path / "away")[0]
    assert there["outside"] == 0
    assert there["inside"] == there["planned"]
    assert there["rewards"] == [reward for _, reward in at_home]


def damaged(judged: Config, directory: Path, name: str, **changes: Any) -> Config:
    path = directory / name
    shutil.copytree(judged.reward.model or "", path)
    for file, content in changes.items():
        if file == "config":
            hf = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(hf | content))
        else:
            save_file(content, path / "model.safetensors")
    return with_model(judged, path)


def message(config: Config, directory: Path) -> str:
    with pytest.raises((ConfigError, RewardError)) as error:
        scores(config, Layout(), directory)
    return f"{type(error.value).__name__}: {error.value}"


def refusals(judged: Config, directory: Path) -> dict[str, str]:
    """What is said of unusable reward models. For a pool's rank."""
    tensors = load_file((judged.reward.model or Path()) / "model.safetensors")
    two = tensors | {"score.weight": torch.zeros(2, 64)}
    none = {name: tensor for name, tensor in tensors.items() if name != "score.weight"}
    nan = tensors | {"score.weight": torch.full((1, 64), float("nan"))}
    other = damaged(judged, directory, "other")
    vocabulary = (other.reward.model or Path()) / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"7"', '"x"'))
    cases = {
        "two labels": damaged(judged, directory, "two", weights=two),
        "no head": damaged(judged, directory, "none", weights=none),
        "no number": damaged(judged, directory, "nan", weights=nan),
        "other words": other,
        "nowhere": with_model(judged, directory / "absent"),
    }
    return {name: message(config, directory / "run") for name, config in cases.items()}


def test_unusable_models_are_refused_by_name(pool1: Pool, judged, tmp_path):
    said = pool1.run(refusals, judged, tmp_path)[0]
    assert "score.weight" in said["two labels"]
    assert "score.weight" in said["no head"]
    assert said["no number"].startswith("RewardError: reward.model:")
    assert "different tokenizers" in said["other words"]
    assert "absent" in said["nowhere"]
    assert all("Error: " in words for words in said.values())


def test_doctor_looks_at_it(judged, tmp_path):
    good = [finding for finding in check_inputs(judged, 0) if finding.check == "reward"]
    assert [finding.level for finding in good] == ["ok"]
    two = torch.zeros(2, 64)
    tensors = load_file((judged.reward.model or Path()) / "model.safetensors")
    bad = damaged(judged, tmp_path, "bad", weights=tensors | {"score.weight": two})
    (finding,) = [finding for finding in check_inputs(bad, 0) if finding.check == "reward"]
    assert finding.level == "error"


def test_doctor_looks_at_what_a_critic_starts_from(judged, tmp_path):
    """The policy's own directory is no classifier."""
    for path, level in ((judged.reward.model, "ok"), (judged.model.path, "error")):
        critic = judged.critic.model_copy(update={"path": path})
        found = check_inputs(judged.model_copy(update={"critic": critic}), 0)
        assert [finding.level for finding in found if finding.check == "critic"] == [level]


def test_keys_without_effect(config: Config) -> None:
    file = config.model.path.parent / "empty.toml"
    keys = [f"--{k}=x" for k in ("run.dir", "model.path", "data.train")] + ["--train.steps=5"]
    (note,) = notes(load_config(file, [*keys, "--residency.reward_model=offloaded"]))
    assert note.startswith("residency.reward_model: has no effect because there is no")
    with pytest.raises(ConfigError, match=r"reward\.function: has no effect because reward\.model"):
        load_config(file, [*keys, "--reward.model=m", "--reward.function=a:b"])
    with pytest.raises(ConfigError, match=r"reward\.model: has no effect"):
        load_config(file, [*keys, "--reward.model=m", "--run.kind=sft"])
    assert load_config(file, [*keys, "--reward.model=m"]).reward.model == Path("m")
