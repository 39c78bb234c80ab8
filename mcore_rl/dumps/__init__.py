"""Rollouts kept on disk: written by a run or `mcore-rl rollout`, trained again, shown token by token."""
