"""What of [reward] cannot be meant."""

from __future__ import annotations

from collections.abc import Iterator

from mcore_rl.config.sections import RewardConfig
from mcore_rl.terminal import joined, short


def wrong_rewards(reward: RewardConfig) -> Iterator[str]:
    """`reward.key: what, remedy` for tables of reward functions and weights that cannot be meant."""
    for name, one in reward.functions.items():
        for field, values in one.when.items():
            if not values:
                yield f"reward.functions.{name}.when: {short(field)} has no value to be; name one"
    for part in reward.weights if reward.functions else ():
        name, _, of_function = part.partition("/")
        if part in reward.functions:
            yield f"reward.weights: {part} is a function, not a part; set reward.functions.{part}.weight"
        elif name not in reward.functions or not of_function:
            yield (
                f"reward.weights: {short(part)} is no part of the functions {joined(reward.functions)}; "
                "their parts are called NAME/part"
            )
