"""The environment of benchmarks/soak.py: an agent in a process of its own, which speaks OpenAI's API."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress

from mcore_rl.environments.gateway import serve_policy
from mcore_rl.environments.policy import Policy
from mcore_rl.types import Prompt

AGENT = """
import json, socket, sys
url, key, run, text = sys.argv[1:]
place, _, path = url.removeprefix("http://").partition("/")
for turn in range(2):
    body = json.dumps({"model": "policy", "prompt": text})
    head = f"POST /{path}/completions HTTP/1.0", f"Authorization: Bearer {key}"
    with socket.create_connection(place.split(":"), 600) as connection:
        connection.sendall("\\r\\n".join([*head, f"Content-Length: {len(body)}", "", body]).encode())
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b"")).partition(b"\\r\\n\\r\\n")[2]
    said = json.loads(answer)["choices"][0]["text"]
    text += said + "="
print(said)
"""
"""asks twice, the second time behind its own answer; without a package, so that it starts at once"""


async def play(policy: Policy, prompt: Prompt, *, run: str) -> float:
    """Whether the agent of a rollout says the label in the end; `run` is what its command line names.

    Raises:
        RuntimeError: The agent was killed.
    """
    async with serve_policy(policy) as endpoint:
        command = [sys.executable, "-S", "-c", AGENT, endpoint.openai_url, endpoint.key, run, prompt.text]
        agent = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            said, _ = await agent.communicate()
        finally:
            if agent.returncode is None:
                with suppress(ProcessLookupError):
                    agent.kill()
                await agent.wait()
    if agent.returncode:
        raise RuntimeError(f"the agent ended with {agent.returncode}")
    return float(said.decode().strip() == prompt.label)
