"""`python -m tests.environments.openenv_episodes OUT`, where openenv-core is: episodes on its own server.

They are played with a policy whose replies are known. Writes what they came to; a fault is an exception.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn  # pyright: ignore[reportMissingImports]
from openenv.core.env_server import (  # pyright: ignore[reportMissingImports]
    Action,
    Environment,
    Observation,
    State,
    create_fastapi_app,
)

from mcore_rl.environments.connectors import openenv
from mcore_rl.rewards.outcome import Void
from tests.environments.support import Scripted, build_tokenizer, chat_prompt, policy_of


class Guess(Action):
    message: str


class Hint(Observation):
    text: str


class Higher(Environment):
    """The number is the seed; three guesses, of which the right one is worth 1."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._state, self._number = State(), 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Hint:
        self._number, self._state = seed or 0, State(episode_id=episode_id)
        return Hint(text="guess")

    def step(self, action: Guess, timeout_s: float | None = None, **kwargs: Any) -> Hint:
        if action.message == "fail":
            raise ValueError("what the environment cannot do")
        guess = int(action.message)
        self._state.step_count += 1
        text = "higher" if guess < self._number else "lower"
        done = guess == self._number or self._state.step_count == 3
        return Hint(text=text, done=done, reward=float(guess == self._number) or -0.1)

    @property
    def state(self) -> State:
        return self._state


async def episode(url: str, seed: Any, *said: str) -> dict[str, Any]:
    """One, in which the model says that."""
    tokenizer = build_tokenizer()
    prompt = chat_prompt(tokenizer, "Find it.", openenv=seed)
    server = Scripted(tokenizer, *said)
    policy = policy_of(tokenizer, prompt, server)
    try:
        returned: Any = await openenv.play(policy, prompt, url=url, action="message", observation="text")
    except Exception as error:
        returned = {"raised": f"{type(error).__name__}: {error}"}
    trained = [t for one in policy.recorder.segments(prompt) for t in one.token_ids.tolist()]
    return {
        "returned": [returned.reason, returned.why] if isinstance(returned, Void) else returned,
        "trained": tokenizer.decode(trained) if trained else "",
        "asked": len(server.asked),
    }


async def main(out: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    app = create_fastapi_app(Higher, Guess, Hint, max_concurrent_envs=8)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.05)
    url = f"http://127.0.0.1:{port}"
    found = await asyncio.gather(
        episode(url, {"seed": 42}, "50<e>", "42<e>"),
        episode(url, {"seed": 7}, *["9<e>"] * 3),
        episode(url, {"seed": 7}, "fail<e>"),
        episode(url, 7),
        episode("http://127.0.0.1:9", {"seed": 7}),
    )
    server.should_exit = True
    await serving
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(asyncio.wait_for(main(Path(sys.argv[1])), 120))
