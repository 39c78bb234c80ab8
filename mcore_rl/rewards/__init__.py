"""Scoring responses: what a reward function may return, its processes, and the built-in rewards."""

from mcore_rl.rewards.outcome import Void
from mcore_rl.rewards.pool import RewardPool, check_rate
from mcore_rl.rewards.score import RewardFn, load_reward, load_rewards
from mcore_rl.rewards.task import RewardFunction, Task
from mcore_rl.rewards.tokenizer import full_text, tokenizer

__all__ = [
    "RewardFn",
    "RewardFunction",
    "RewardPool",
    "Task",
    "Void",
    "check_rate",
    "full_text",
    "load_reward",
    "load_rewards",
    "tokenizer",
]
