"""The environment of a rehearsal: several turns, two training sequences, any prompt of any tokenizer."""

from __future__ import annotations

from mcore_rl.environments.policy import Policy
from mcore_rl.types import Prompt

TURNS = 3
TOKENS = 64
"""of a training sequence, which is room for all of them"""


async def ask_again(policy: Policy, prompt: Prompt) -> None:
    """Put the question behind every answer; the last turn begins anew, as where a context is compacted.

    The reward is the run's reward function's.
    """
    ids = [*prompt.token_ids]
    for _ in range(TURNS - 1):
        turn = await policy.generate(ids)
        ids = [*turn.prompt_ids, *turn.token_ids, *prompt.token_ids]
    await policy.generate(prompt.token_ids)
