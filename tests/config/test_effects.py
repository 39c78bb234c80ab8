"""No setting is accepted whose effect is nothing, or it is said."""

from __future__ import annotations

import re

import pytest
import torch

from mcore_rl.algo.losses import KLEstimator, kl
from mcore_rl.config import load_config, notes, warnings
from tests.config.test_rules import refused_or_noted

BASE = {"run.dir": "r", "model.path": "m", "data.train": "t.jsonl", "train.steps": 10}
NO_SETS = "train.eval_samples: has no effect because no held-out set"


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "empty.toml"
    path.touch()
    return lambda **keys: load_config(
        path, [f"--{key.replace('__', '.')}={value}" for key, value in {**BASE, **keys}.items()]
    )


def grpo(**params: object) -> dict[str, object]:
    return {"algorithm__name": "grpo"} | {f"algorithm__params.{key}": value for key, value in params.items()}


@pytest.mark.parametrize(
    ("bad", "good", "message"),
    [
        (grpo(kl_in_loss=0.1, kl_estimator="k1"), {"algorithm__params.kl_estimator": "k1_iw"}, "is 0 in exp"),
        (grpo(kl_estimator="k2"), {"algorithm__params.kl_in_loss": 0.1}, "kl_estimator: has no effect"),
        (grpo(std="none", eps=1e-4), {"algorithm__params.std": "group"}, "params.eps: has no effect"),
        (grpo(std="none", ddof=0), {"algorithm__params.std": "batch"}, "params.ddof: has no effect"),
        (grpo(whiten="true", ddof=0), {"algorithm__params.whiten": "false"}, "ddof: .* by their spread once"),
        (grpo(whiten="true", std="batch"), {"algorithm__params.std": "group"}, "params.std: has no effect"),
        (grpo(decoupled="true", ddof=0), {"algorithm__params.decoupled": "false"}, "by its own spread"),
        ({"algorithm__name": "echo"}, {"environment__function": "m:f"}, "name: without environment.function"),
        ({"algorithm__name": "echo"}, {"algorithm__params.observation_nll": 0}, "name: without environment"),
        (grpo(observation_nll=0.1), {"algorithm__params.observation_nll": 0}, "observation_nll: without env"),
        (grpo(observation_nll=0.1), {"environment__function": "m:f"}, "observation_nll: without env"),
        (
            {"algorithm__name": "remax", "environment__function": "m:f"},
            {"algorithm__name": "rloo"},
            "name: remax compares with one greedy response",
        ),
        ({"train__eval_samples": 5}, {"data__eval": "e.jsonl"}, NO_SETS),
        (
            {"data__weights": "[3]"},
            {"data__train": '["a.jsonl", "b.jsonl"]', "data__weights": "[3, 1]"},
            "no effect on one path",
        ),
        (
            {"reward__model": "rm", "reward__timeout": 5.0},
            {"eval__sets.a.path": "e.jsonl", "eval__sets.a.reward": "m:f"},
            "reward.timeout: has no effect because reward.model gives the rewards",
        ),
        (
            {"run__kind": "sft", "reward__timeout": 5.0},
            {"data__eval": "e.jsonl"},
            "reward.timeout: has no effect because run.kind is .sft., and without held-out",
        ),
        (
            {
                "run__kind": "sft",
                "reward__function": "m:f",
                "eval__sets.a.path": "e.jsonl",
                "eval__sets.a.reward": "m:g",
            },
            {"data__eval": "e.jsonl"},
            "reward.function: has no effect because .* every held-out set has a reward",
        ),
        (
            {"run__kind": "sft", "rollout__temperature": 0.5},
            {"data__eval": "e.jsonl"},
            "rollout.temperature: has no effect because run.kind is .sft., and without held-out",
        ),
        (
            {"run__kind": "sft", "publish__probe_sequences": 2},
            {"data__eval": "e.jsonl"},
            "publish.probe_sequences: has no effect",
        ),
    ],
)
def test_what_changes_nothing_is_refused_or_noted_and_its_remedy_accepted(load, bad, good, message) -> None:
    assert re.search(message, refused_or_noted(load, **bad))
    load(**{**bad, **good})


def test_k1_in_the_loss_has_no_gradient_in_expectation_and_the_others_have() -> None:
    """Over all tokens of a small vocabulary, weighted by the policy itself."""
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.0, 0.4, -0.2], dtype=torch.float64).log_softmax(0)

    def gradient(estimator: KLEstimator) -> float:
        log_prob = logits.log_softmax(0)
        terms = kl(estimator, log_prob, reference, log_prob.detach())
        return float(torch.autograd.grad((log_prob.detach().exp() * terms).sum(), logits)[0].abs().max())

    assert gradient("k1") == pytest.approx(0, abs=1e-15)
    assert min(gradient("k2"), gradient("k3"), gradient("k1_iw")) > 0.01


DISTILL = {"run__kind": "distill", "distill__teachers": "{a = 'm'}"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"critic__path": "c"}, "critic.path: has no effect because gspo has no critic"),
        (
            {"algorithm__name": "ppo", "critic__warmup_epochs": 2},
            "critic.warmup_epochs: has no effect because critic.warmup_rollouts is 0",
        ),
        (DISTILL | {"distill__beta": 0.3}, 'distill.beta: has no effect because distill.divergence is "'),
        (
            DISTILL | {"distill__teacher_key": "who"},
            "distill.teacher_key: has no effect because there is one teacher",
        ),
    ],
)
def test_a_key_that_only_another_choice_reads_is_a_note(load, given, said) -> None:
    key = said.partition(":")[0]
    assert any(said in note for note in notes(load(**given)))
    others = {name: value for name, value in given.items() if name != key.replace(".", "__")}
    assert not any(key in note for note in notes(load(**others)))


@pytest.mark.parametrize(
    ("doubtful", "sound", "message"),
    [
        ({"optimizer__lr": 0.0}, {"optimizer__lr": 1e-6}, "optimizer.lr: 0, so that nothing is learned"),
        ({"run__kind": "sft", "optimizer__lr": 0.0}, {"optimizer__lr": 1e-6}, "nothing is learned"),
        ({"algorithm__name": "ppo", "critic__lr": 0.0}, {"critic__lr": 1e-6}, "critic.lr: 0"),
        ({"algorithm__name": "rloo"}, {"algorithm__mini_batches": 1}, "no importance ratio"),
        (
            {"algorithm__name": "reinforce", "algorithm__mini_batches": 1, "algorithm__epochs": 3},
            {"algorithm__epochs": 1},
            "the first of 3 updates",
        ),
        (
            grpo(eps_high=0.3) | {"algorithm__mini_batches": 1},
            {"algorithm__epochs": 2},
            "eps_high: has no effect in the only update",
        ),
        (
            {
                "algorithm__name": "dsv32",
                "algorithm__params.delta": 0.2,
                "algorithm__mini_batches": 1,
            },
            {"rollout__max_staleness": 1, "algorithm__params.correction": "tis-token"},
            "delta: has no effect where the weights that sample",
        ),
        (
            {"algorithm__name": "vapo", "rollout__max_new_tokens": 20},
            {"algorithm__params.length_factor": 1.0},
            "length_factor: with 0.05 lambda is 0 for a response of 20 tokens, the longest",
        ),
        (
            {"algorithm__name": "ppo", "critic__value_clip": 0.3, "algorithm__mini_batches": 1},
            {"algorithm__epochs": 2},
            "critic.value_clip: has no effect in the only update",
        ),
        (
            {"algorithm__name": "ppo", "critic__coef": 0.5, "optimizer__clip_grad": 0.0},
            {"optimizer__clip_grad": 1.0},
            "critic.coef: has no effect on Adam",
        ),
        (
            {"data__eval": "e.jsonl", "train__eval_every": 11},
            {"train__eval_every": 10},
            "11 steps never pass in a run of 10",
        ),
        ({"rollout__dump": 11}, {"rollout__dump": 10}, "no step of 10 is the 11th, and nothing is kept"),
        (
            {"rollout__start_timeout": 900},
            {"train__step_timeout": 901},
            "start_timeout: 900 s never pass: a run without progress ends after train.step_timeout = 600 s",
        ),
        ({"reward__timeout": 600}, {"reward__timeout": 599}, "reward.timeout: 600 s never pass"),
    ],
)
def test_what_is_hardly_meant_is_said(load, doubtful, sound, message) -> None:
    (said,) = warnings(load(**doubtful))
    assert message in said
    assert warnings(load(**{**doubtful, **sound})) == []
