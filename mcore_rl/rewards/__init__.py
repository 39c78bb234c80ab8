"""Scoring responses: `module:function` loading, checks, and the built-in rewards."""

from mcore_rl.rewards.score import RewardFn, load_reward, score_groups

__all__ = ["RewardFn", "load_reward", "score_groups"]
