"""`python -m tests.environments.verifiers_episodes OUT`, where verifiers is: its episodes by the gateway.

They are played with a policy whose replies are known. Writes what they came to; a fault is an exception.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from mcore_rl.environments.connectors import verifiers
from mcore_rl.environments.policy import RolloutLimits
from mcore_rl.rewards.outcome import Void
from tests.environments.support import Scripted, build_tokenizer, chat_prompt, policy_of

ENV: dict[str, Any] = {
    "taskset": {"id": "sums_taskset"},
    "agent": {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}},
}
LIMITS = RolloutLimits(8, 2000, 300.0, 300.0)


async def episode(row: dict[str, Any], said: str) -> dict[str, Any]:
    """One, in which the model says that."""
    tokenizer = build_tokenizer()
    prompt = chat_prompt(tokenizer, row["prompt"][-1]["content"], verifiers=row["verifiers"])
    server = Scripted(tokenizer, *[said] * 3)
    policy = policy_of(tokenizer, prompt, server, limits=LIMITS)
    returned = await verifiers.play(policy, prompt, env=ENV)
    segments = policy.recorder.segments(prompt)
    trained = [token for one in segments for token in one.token_ids.tolist()]
    return {
        "returned": str(returned) if isinstance(returned, Void) else returned,
        "asked": tokenizer.decode(server.asked[0].prompts[0]) if server.asked else "",
        "trained": tokenizer.decode(trained) if trained else "",
        "turns": len(server.asked),
    }


async def main(out: Path) -> None:
    before = asyncio.all_tasks()
    rows = list(verifiers.rows(ENV, 3))
    found = await asyncio.gather(
        episode(rows[0], "It is 4.<e>"), episode(rows[1], "It is 5.<e>"), episode(rows[2], "8<e>")
    )
    out.write_text(json.dumps({"rows": rows, "episodes": found}))
    tasks = asyncio.all_tasks() - before
    for task in tasks:  # as a run does at its end
        task.cancel()
    await asyncio.wait(tasks, timeout=20)


if __name__ == "__main__":
    asyncio.run(asyncio.wait_for(main(Path(sys.argv[1])), 240))
