"""The sections of training without rollouts: on rows as they are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mcore_rl.config.sections import Count, Positive, Section

SupervisedTarget = Literal["label", "last", "all"]


class SupervisedConfig(Section):
    """Training without rollouts, where run.kind is another one than `rl`."""

    batch_size: Count = 256
    """Rows of one optimizer step over all replicas."""
    target: SupervisedTarget = "label"
    """With `sft`, what is trained: the label, or of a conversation under data.prompt_key the assistant's last
    turn, or all of its turns."""


class PreferenceConfig(Section):
    """Preference training, with `run.kind = "preference"`."""

    loss: Literal["dpo", "rdpo", "ipo", "orpo", "kto"] = "dpo"
    """Of pairs: `dpo` (with label_smoothing, cDPO), `rdpo`, `ipo`, and without a reference `orpo`; of
    verdicts on single answers `kto`."""
    beta: Positive = 0.1
    """How strongly the policy is held to the reference; tau of `ipo`, the weight of the odds of `orpo`."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that are taken to be the wrong way round; `dpo` and `rdpo`."""
    average: bool = False
    """`ipo`: compare means over the tokens of an answer, in the place of sums."""
    desirable_weight: Positive = 1.0
    """`kto`: weight of a desirable answer."""
    undesirable_weight: Positive = 1.0
    """`kto`: weight of an undesirable one."""


class RewardModelConfig(Section):
    """Training of a reward model, with `run.kind = "reward_model"`."""

    center_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared sum of a pair's scores, which holds their mean at 0."""
