"""Who gives the rewards of a run: a function of each sample, or a reward model on the training ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import isfinite

from mcore_rl.config import Config
from mcore_rl.data.packing import TokenSequence
from mcore_rl.errors import ConfigError, RewardError
from mcore_rl.model.architecture import read_hf_config
from mcore_rl.model.build import Model, build_reward_model
from mcore_rl.model.residency import Offloaded, weights_of
from mcore_rl.rewards import RewardFn, score_groups
from mcore_rl.train.batch import Shape, whole_sequence
from mcore_rl.train.score import values
from mcore_rl.train.setup import Trainer, load_tokenizer, model_settings
from mcore_rl.types import Group


@dataclass(frozen=True)
class Judge:
    """The rewards' source: `model` where there is one, else `function`."""

    function: RewardFn
    model: Model | None

    def by_function(self, groups: Sequence[Group]) -> list[Group]:
        """On a lead: the groups with rewards; as they are where a model gives them. Raises RewardError."""
        return list(groups) if self.model else score_groups(groups, self.function)

    def by_model(self, groups: Sequence[Group], shape: Shape) -> list[Group]:
        """On all ranks, of the same groups: with the model's rewards; as they are where there is none.

        The score of a sample is that of its last token but padding, as transformers' classifiers take it,
        over the ids that were sampled, not over their text. Collective. Raises RewardError for one that is
        no number.
        """
        if self.model is None:
            return list(groups)
        samples = [sample for group in groups for sample in group.samples]
        pad = read_hf_config(self.model.source).get("pad_token_id")
        # What is scored is the state before a row's token: one more token, of any id, has the whole sample.
        whole = [TokenSequence(_up_to_padding(whole_sequence(s), pad), (0,)) for s in samples]
        scores = [float(score[0]) for score in values(self.model, whole, shape)] if whole else []
        for sample, score in zip(samples, scores, strict=True):
            if not isfinite(score):
                raise RewardError(
                    f"reward.model: {self.model.source} gives {score} to sample {sample.id}; its weights are "
                    "damaged, or it overflows in model.precision"
                ).on_every_rank()
        judged = iter([replace(s, reward=score) for s, score in zip(samples, scores, strict=True)])
        return [replace(group, samples=tuple(islice(judged, len(group.samples)))) for group in groups]


def _up_to_padding(ids: list[int], pad: int | None) -> list[int]:
    """Less the padding at the end: where that is the end of sequence, no classifier learnt to score there."""
    end = len(ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    return ids[:end]


def place_reward_model(trainer: Trainer) -> Model | None:
    """The reward model of the config, where [residency] says; collective.

    Raises:
        ConfigError: it has another tokenizer than the policy; as build_reward_model, with LayoutError.
    """
    config = trainer.config
    path = config.reward.model
    if path is None:
        return None
    check_same_tokens(config)
    settings = model_settings(config)
    fp8 = replace(settings["fp8"], param_gather=False)  # nothing gathers a frozen model
    model = trainer.frozen["reward_model."] = build_reward_model(
        path, trainer.mesh, precision=settings["precision"], fp8=fp8
    )
    if config.residency.reward_model == "offloaded":
        trainer.residency.parts["reward_model"] = Offloaded(partial(weights_of, model), constant=True)
    return model


def check_same_tokens(config: Config) -> None:
    """Raises ConfigError where the reward model would read other words in the ids that the policy samples.

    It may have tokens of its own besides, such as one for padding.
    """
    path = config.reward.model
    assert path is not None
    ours, theirs = (load_tokenizer(where).get_vocab() for where in (config.model.path, path))
    differing = sorted(token for token, number in ours.items() if theirs.get(token) != number)
    if differing:
        raise ConfigError(
            f"reward.model: {path} and model.path have different tokenizers ({len(differing)} tokens, such "
            f"as {differing[0]!r}); use a reward model of its family, or score text in reward.function"
        )
