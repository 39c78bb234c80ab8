"""Names of other trainers' algorithms: what they compute by default, as an entry here and its settings.

Their numbers are those of the versions named in docs/algorithms.md. A setting of one's own overrides one of
the preset's. What a preset cannot carry over is `differs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """One trainer's algorithm."""

    algorithm: str
    """the entry of ALGORITHMS"""
    params: Mapping[str, Any]
    """what the trainer has otherwise: algorithm.params"""
    called: str
    """how it is asked for there"""
    differs: str = ""
    """what is not the same in spite of it"""

    @property
    def settings(self) -> tuple[str, Mapping[str, Any]]:
        """The entry, and what changes in it."""
        return self.algorithm, self.params


_TRL = {"eps": 1e-4, "aggregation": "token-mean", "correction": "mis-sequence"}
_TRL_BY_SEQUENCE = {**_TRL, "aggregation": "seq-mean-token-mean"}
_VERL = {"dual_clip": 3.0, "aggregation": "token-mean"}
_BY_ENGINE = "TRL corrects where vLLM samples; without it set correction = none"
_CLIPPED = "verl clips the ratio, which changes nothing in the only update of a rollout"
_PRIME = {"std": "none", "cap": 1e6, "drift": 1e-3}

PRESETS: Mapping[str, Preset] = {
    "trl-grpo": Preset("grpo", _TRL, "GRPOConfig()", _BY_ENGINE),
    "trl-grpo-paper": Preset("grpo", _TRL_BY_SEQUENCE, 'loss_type="grpo"', _BY_ENGINE),
    "trl-dapo": Preset("dapo", _TRL, 'loss_type="dapo", epsilon_high=0.28', _BY_ENGINE),
    "trl-dr-grpo": Preset(
        "grpo", {**_TRL, "aggregation": "seq-mean-token-sum-norm"}, 'loss_type="dr_grpo"', _BY_ENGINE
    ),
    "trl-gspo": Preset(
        "gspo",
        _TRL_BY_SEQUENCE,
        'loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4',
        _BY_ENGINE,
    ),
    "trl-luspo": Preset(
        "gspo",
        {**_TRL, "aggregation": "seq-mean-token-sum"},
        'loss_type="luspo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4',
        _BY_ENGINE,
    ),
    "trl-sapo": Preset("sapo", _TRL_BY_SEQUENCE, 'loss_type="sapo"', _BY_ENGINE),
    "trl-cispo": Preset(
        "cispo", {**_TRL, "eps_high": 4.0}, 'loss_type="cispo", epsilon_high=5.0', _BY_ENGINE
    ),
    "trl-vespo": Preset(
        "vespo", {"eps": 1e-4}, 'loss_type="vespo"', "TRL truncates the engine's part of W token by token"
    ),
    "verl-ppo": Preset("ppo", {**_VERL, "lam": 1.0, "kl_in_reward": 0.0}, "adv_estimator=gae"),
    "verl-grpo": Preset("grpo", _VERL, "adv_estimator=grpo", "a group of one: verl keeps its reward, here 0"),
    "verl-dapo": Preset(
        "dapo", {**_VERL, "dual_clip": 10.0}, "clip_ratio_high=0.28 clip_ratio_c=10.0, as in recipe/dapo"
    ),
    "verl-gspo": Preset("gspo", {}, "loss_mode=gspo clip_ratio_low=3e-4 clip_ratio_high=4e-4"),
    "verl-sapo": Preset("sapo", {}, "loss_mode=sapo"),
    "verl-cispo": Preset("cispo", {"eps_low": 0.2, "eps_high": 0.2}, "loss_mode=cispo"),
    "verl-gmpo": Preset("gmpo", {"clip_low": 0.2, "clip_high": 0.2}, "loss_mode=geo_mean"),
    "verl-dppo-tv": Preset(
        "dppo-tv", {"cap": 3.0}, "loss_mode=dppo_tv", "verl's ratio is one to the old policy"
    ),
    "verl-dppo-kl": Preset(
        "dppo-kl", {"kl_low": 0.2, "kl_high": 0.2, "cap": 3.0}, "loss_mode=dppo_kl", "the same"
    ),
    "verl-rloo": Preset("rloo", {}, "adv_estimator=rloo", _CLIPPED),
    "verl-opo": Preset("opo", {}, "adv_estimator=opo", _CLIPPED),
    "nemo-grpo": Preset(
        "grpo-loo",
        {"kl_in_loss": 0.01, "kl_estimator": "k3_score", "kl_cap": 10.0},
        "examples/configs/grpo_math_1B.yaml",
    ),
    "prime-grpo": Preset("dppo-tv", _PRIME, 'id = "grpo", loss type "default"'),
    "prime-maxrl": Preset("maxrl", {}, 'id = "max_rl"', "prime-rl's loss is its DPPO, here PPO's"),
    "slime-grpo": Preset("grpo", {}, "--advantage-estimator grpo"),
    "slime-gspo": Preset("gspo", {}, "--advantage-estimator gspo --eps-clip 3e-4 --eps-clip-high 4e-4"),
}
