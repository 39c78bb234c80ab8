"""What a critic starts from and learns from, its conversion, and the coefficient of the KL in the reward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcore_rl.algo.algorithms import configure
from mcore_rl.config import Config, load_config
from mcore_rl.convert.command import mcore_to_hf
from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.parameters import CriticParameterMap, ParameterMap
from mcore_rl.model.weights_io import global_parameters, hf_reader
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.pool import Pool
from mcore_rl.training.checkpoint import end_step
from mcore_rl.training.critic import groups_of, pack_prompts, values_of
from mcore_rl.training.kl_control import KLControl
from mcore_rl.training.loop import learn
from mcore_rl.training.rewards import scores_of
from mcore_rl.training.run import Run
from mcore_rl.types import Sample
from mcore_rl.weights.buckets import gather
from tests.training.test_ppo import built_run, config, recorded
from tests.training.test_rewards import judged

__all__ = ["config", "judged"]
PAD = 5
"""which the reward model of test_rewards takes for padding at the end"""


def test_the_coefficient_follows_the_golden_trace_and_continues() -> None:
    algorithm = configure("ppo", {"kl_in_reward": 0.2, "kl_target": 6.0})
    control = KLControl(algorithm)
    golden = np.load(Path(__file__).parents[1] / "golden" / "advantages.npz")["adaptive_kl_trace"]
    found = [control.algorithm.kl_in_reward]
    for kl in (9.0, 3.0):
        control.observe({"kl/response": kl}, 256)
        found.append(control.algorithm.kl_in_reward)
    np.testing.assert_allclose(found, golden, rtol=1e-12)
    resumed, fixed = KLControl(algorithm), KLControl(configure("ppo", {"kl_in_reward": 0.3}))
    assert resumed.algorithm.kl_in_reward != found[-1]
    resumed.restore(control.state())
    assert resumed.algorithm.kl_in_reward == found[-1]
    fixed.restore(control.state())
    fixed.observe({"kl/response": 9.0}, 256)
    assert (fixed.algorithm.kl_in_reward, fixed.state()) == (0.3, {})


def starting_from(config: Config, **critic: Any) -> Config:
    return config.model_copy(update={"critic": config.critic.model_copy(update=critic)})


def first_values(config: Config, directory: Path) -> tuple[list[float], list[float], list[float]]:
    """(values before the last token, scores of all before it, the same after a step). For a pool's rank."""
    with built_run(config, Layout(), directory) as run:
        batch, shape = recorded(run), run.trainer.shape
        assert run.critic is not None
        values = values_of(run.critic.model, run.algorithm, batch, shape)
        kept = [i for i, s in enumerate(batch.samples) if s.trained_tokens > 1 and s.token_ids[-2] != PAD]
        cut = [without_last(batch.samples[i]) for i in kept]
        assert run.rewards.model is not None
        scores = scores_of(run.rewards.model, cut, shape)
        learn(run, batch, 1)
        return [float(values[i][-1]) for i in kept], scores, scores_of(run.rewards.model, cut, shape)


def without_last(sample: Sample) -> Sample:
    (segment,) = sample.segments
    versions = tuple(span._replace(end=span.end - 1) for span in segment.versions)
    cut = replace(
        segment, token_ids=segment.token_ids[:-1], log_probs=segment.log_probs[:-1], versions=versions
    )
    return replace(sample, segments=(cut,))


def test_a_critic_that_starts_from_the_reward_model_says_what_it_says(pool1: Pool, judged, tmp_path) -> None:
    config = starting_from(judged, path=judged.reward.model)
    values, scores, again = pool1.run(first_values, config, tmp_path / "from", timeout=100.0)[0]
    np.testing.assert_allclose(values, scores, atol=1e-5)
    assert np.std(values) > 1e-2
    assert again == scores, "the reward model itself is frozen"
    unset = pool1.run(first_values, judged, tmp_path / "unset", timeout=100.0)[0]
    assert np.abs(np.subtract(unset[0], scores)).max() > 0.1, "on the policy's weights it says something else"


def light(config: Config, directory: Path) -> dict[str, Any]:
    """The light critic of a recorded rollout, before it learns and after. For a pool's rank."""
    with built_run(config, Layout(), directory) as run:
        batch, shape = recorded(run), run.trainer.shape
        assert run.critic is not None
        token_algorithm = configure("ppo")
        of_tokens = values_of(run.critic.model, token_algorithm, batch, shape)
        of_prompts = values_of(run.critic.model, run.algorithm, batch, shape)
        groups = groups_of(batch)
        rewards = [float(sample.reward or 0.0) for sample in batch.samples]
        packed = pack_prompts(batch, groups, shape, run.trainer.mesh, {"return": rewards})
        return {
            "same": [
                (float(t[0]), float(p[0])) for t, p in zip(of_tokens, of_prompts, strict=True) if len(t)
            ],
            "tokens": (
                sum(len(p.tokens) for p in packed),
                sum(len(s.prompt.token_ids) for s in batch.samples),
            ),
            "rows": torch.cat([p.fields["return"] for p in packed]).tolist(),
            "weights": torch.cat([p.fields["weight"] for p in packed]).tolist(),
            "means": [float(np.mean([rewards[i] for i in members])) for members in groups],
            "metrics": [learn(run, batch, step).metrics for step in (1, 2, 3)],
        }


@pytest.mark.parametrize("name", ["hybrid-grpo", "hybrid-grpo-shared"])
def test_a_light_critic_sees_each_prompt_once_and_learns(pool1: Pool, config, tmp_path, name: str) -> None:
    algorithm = config.algorithm.model_copy(update={"name": name, "params": {}})
    seen = pool1.run(light, config.model_copy(update={"algorithm": algorithm}), tmp_path, timeout=100.0)[0]
    assert all(token == pytest.approx(prompt, abs=1e-6) for token, prompt in seen["same"])
    assert len(seen["rows"]) == 8
    assert seen["tokens"][0] <= seen["tokens"][1] / 2 + 8, "two samples of a prompt, and no response"
    assert sorted(seen["rows"]) == pytest.approx(sorted(seen["means"]))
    assert sum(seen["weights"]) == pytest.approx(1.0)
    first, _, last = seen["metrics"]
    assert last["loss/value"] < 0.7 * first["loss/value"]
    assert "loss/policy" not in first
    assert "loss/policy" in last


def saved(config: Config, directory: Path) -> dict[str, Any]:
    """A checkpoint after a step, and the weights of both models. For a pool's rank."""
    checkpoint = config.checkpoint.model_copy(update={"every": 1})
    with built_run(config.model_copy(update={"checkpoint": checkpoint}), Layout(), directory) as run:
        learn(run, recorded(run), 2)
        end_step(run.trainer, run.contents, run.residency, 1, last=True)
        assert run.critic is not None
        return {"policy": whole(run, critic=False), "critic": whole(run, critic=True)}


def whole(run: Run, *, critic: bool) -> dict[str, torch.Tensor]:
    model = run.critic.model if critic and run.critic is not None else run.trainer.policy
    named = {name: p.detach() for name, p in global_parameters(model.unwrapped).items()}
    return gather(named, model.mapping, model.mesh)


def test_both_models_of_a_checkpoint_are_converted(pool1: Pool, config, tmp_path) -> None:
    models = pool1.run(saved, config, tmp_path, timeout=100.0)[0]
    source, path = tmp_path / "checkpoints" / "step_1", config.model.path
    arch = read_architecture(path)
    for name, table in (("policy", ParameterMap), ("critic", CriticParameterMap)):
        mcore_to_hf(source, tmp_path / name, config=path, critic=name == "critic")
        mapping = table(arch, arch.vocab)
        read = hf_reader(tmp_path / name, mapping)
        assert set(mapping.hf_shapes()) == set(models[name])
        assert all(torch.equal(read(key), models[name][key]) for key in models[name])
    differing = models["policy"].keys() & models["critic"].keys()
    assert any(not torch.equal(models["policy"][key], models["critic"][key]) for key in differing)
    with pytest.raises(ConfigError, match=r"--certify: .* is a critic"):
        mcore_to_hf(source, tmp_path / "no", config=path, critic=True, certified=True)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["--algorithm.params.kl_target=1", "--algorithm.params.kl_in_reward=0.0"], r"kl_target: adapts"),
        (["--algorithm.params.kl_horizon=900"], r"kl_horizon: has no effect because there is no kl_target"),
        (
            ["--algorithm.params.kl_target=1", "--algorithm.params.kl_horizon=100"],
            r"kl_horizon: 100 is shorter",
        ),
        (["--algorithm.params.kl_target=0"], r"kl_target"),
    ],
)
def test_what_means_nothing_is_refused(config, keys: list[str], says: str) -> None:
    path = config.model.path.parent / "empty.toml"
    needed = [f"--{k}=x" for k in ("run.dir", "model.path", "data.train")] + ["--train.steps=5"]
    with pytest.raises(ConfigError, match=says):
        load_config(path, [*needed, "--algorithm.name=ppo", *keys])
