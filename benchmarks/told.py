"""An environment that completes the answer: what lies between the turns is worth learning, and like the task.

A model that has never seen what an environment says gives it e^-12 or less, and a step of Adam is as long
whatever made it: to learn such text at the rate of reinforcement learning costs a tiny model what it knew.
"""

from __future__ import annotations

from mcore_rl.environments.policy import Policy
from mcore_rl.types import Prompt

TURNS = 3
TOKENS = 64
"""of a training sequence, which is room for all of them"""


async def told(policy: Policy, prompt: Prompt) -> None:
    """The model says the first token, is told the rest of the right answer, ends it, and answers anew.

    The reward is the run's reward function's, of the last answer, to which nothing is told.
    """
    first = await policy.generate(prompt.token_ids, max_new_tokens=1)
    rest = policy.encode(prompt.label_text)[1:]
    await policy.generate([*first.prompt_ids, *first.token_ids, *rest], max_new_tokens=1)
    await policy.generate(prompt.token_ids)
