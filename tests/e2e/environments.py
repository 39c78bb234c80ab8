"""Environments of the tests, which the ranks import by name."""

from __future__ import annotations


async def asks_again(policy, prompt, *, turns: int):
    """Puts a question behind every answer; the last turn begins anew, as where a context is compacted."""
    ids, digits = [*prompt.token_ids], []
    for _ in range(turns - 1):
        turn = await policy.generate(ids, max_new_tokens=6)
        ids = [*turn.prompt_ids, *turn.token_ids, *policy.encode("+1=")]
        digits.append(sum(character.isdigit() for character in turn.text))
    turn = await policy.generate([*prompt.token_ids, *policy.encode("=")], max_new_tokens=6)
    return {"digits": [*map(float, digits), 0.0], "brief": -0.01 * len(turn.token_ids)}
