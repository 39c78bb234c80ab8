"""Who scores the samples of `mcore-rl eval`: a function in processes of its own, or a reward model here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mcore_rl.config import Config
from mcore_rl.model.residency import Residency
from mcore_rl.rewards import check_rate
from mcore_rl.training.assemble import build_frozen_reward_model
from mcore_rl.training.assemble_rollouts import reward_pool
from mcore_rl.training.evaluation_sets import EvalSet
from mcore_rl.training.rewards import RewardSource
from mcore_rl.training.sample_only import process_alone
from mcore_rl.training.setup import batching_of
from mcore_rl.types import Group

Score = Callable[[Sequence[Group]], Sequence[Group]]
"""groups -> the same with rewards"""


@contextmanager
def scoring_model(config: Config, sets: Sequence[EvalSet]) -> Iterator[Score | None]:
    """The reward model, in this one process, where a set is scored by it.

    Raises:
        ConfigError: it is none, or has another tokenizer than the policy.
    """
    if all(one.function is not None for one in sets):
        yield None
        return
    with process_alone(config) as mesh, reward_pool(config) as unused:
        model, shape = build_frozen_reward_model(config, mesh), batching_of(config, mesh)
        assert model is not None
        r = config.reward
        yield RewardSource(mesh, unused, r.function, r.max_void, model, shape, Residency({})).by_model


@contextmanager
def scorer(config: Config, one: EvalSet, by_model: Score | None) -> Iterator[Score]:
    """What scores the samples of a set.

    It raises RewardError where too many of the samples that it is given get no reward.
    """
    function, most = one.function, config.reward.max_void
    if function is None:
        assert by_model is not None
        yield by_model
        return
    with reward_pool(config, function) as pool:

        def score(groups: Sequence[Group]) -> Sequence[Group]:
            scored, reasons = pool.score(groups)
            check_rate(sum(len(group.samples) for group in groups), [reasons], most, function)
            return scored

        yield score
