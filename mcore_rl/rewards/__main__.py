"""`python -m mcore_rl.rewards`: a worker of the reward pool."""

from mcore_rl.rewards.worker import main

if __name__ == "__main__":
    main()
