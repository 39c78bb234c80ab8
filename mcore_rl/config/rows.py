"""The sections of training without rollouts: on rows as they are."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from mcore_rl.config.sections import Count, FilePath, Positive, Section

SupervisedTarget = Literal["label", "last", "all"]


def _named_teachers(teachers: dict[str, Any]) -> dict[str, Any]:
    """Names that a prefix of tensors in a checkpoint can have."""
    for name in teachers:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,31}", name):
            raise ValueError(
                "the name of a teacher is of at most 32 letters, digits, `_` and `-`, and does not begin "
                "with `-`; rename it"
            )
    return teachers


Teachers = Annotated[dict[str, FilePath], AfterValidator(_named_teachers)]


class SupervisedConfig(Section):
    """Training without rollouts, where run.kind is another one than `rl`."""

    batch_size: Count = 256
    """Rows of one optimizer step over all replicas."""
    target: SupervisedTarget = "label"
    """With `sft` and `distill`, what is trained: the label, or of a conversation under data.prompt_key the
    assistant's last turn, or all of its turns."""


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


class DistillConfig(Section):
    """Distillation of a teacher into the model that is trained, with `run.kind = "distill"`."""

    teachers: Teachers = Field(default={})
    """Name -> Hugging Face directory of a frozen model with the student's vocabulary, of whatever size."""
    teacher_key: str = ""
    """Key of a row that names its teacher, where there are several."""
    divergence: Literal["forward", "reverse", "jsd", "sampled"] = "forward"
    """Over the whole vocabulary `forward`, KL(teacher, student), `reverse`, KL(student, teacher), or `jsd`,
    the generalised Jensen-Shannon of GKD; `sampled`: the reverse KL at the sampled token, as an advantage."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """`jsd`: weight of the teacher in the mixture."""
    on_policy: bool = False
    """On what the student samples of the prompts, in the place of the answers that the rows have."""
