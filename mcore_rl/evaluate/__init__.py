"""`mcore-rl eval`: the held-out sets of a run or a config, sampled from its weights without training."""
