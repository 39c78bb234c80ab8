"""CPU time of the gateway for each request, besides the server's and the client's.

    python -m benchmarks.gateway [--sessions 512] [--turns 6] [--out benchmarks]

One process serves all sessions, each a rollout of its own, with the calculator example's tokenizer and
response template; what a server would sample is known beforehand and answered at once, so that none of the
CPU time is a server's. Another process has a client of the `openai` package for each session, which all
talk at the same time: every turn is a call, its answer sent with the whole history. Counted is the CPU time
of either process, all threads, from the first request to the last, over the number of requests. Writes
OUT/gateway_DATE.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import resource
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.outputs import output_directory
from examples.calculator import build_tokenizer
from mcore_rl.environments.dialogue import ChatTemplate
from mcore_rl.environments.gateway import serve_policy
from mcore_rl.environments.policy import Policy, RolloutLimits
from mcore_rl.rollout.dispatch import Request
from mcore_rl.rollout.reply import Reply
from mcore_rl.types import Prompt, VersionSpan

ROOT = Path(__file__).parents[1]
CALL = '<call>{"name": "calculate", "arguments": {"expression": "417*86"}}</call><eos>'
ASK = {"role": "user", "content": "What is 417*86?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "calculate",
        "description": "Multiply two whole numbers.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}
MOST_MS = 3.0
"""for a request, besides the server and the client"""


def cpu_seconds() -> float:
    """Of this process, user and system, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def talk(sessions: list[dict[str, str]], turns: int) -> dict[str, float]:
    """What the client process does: all sessions side by side."""
    import openai

    async def one(session: dict[str, str]) -> None:
        async with openai.AsyncOpenAI(base_url=session["url"], api_key=session["key"], timeout=600) as client:
            messages: list[Any] = [ASK]
            for _ in range(turns):
                said = await client.chat.completions.create(model="m", messages=messages, tools=[TOOL])  # type: ignore[list-item]
                message = said.choices[0].message
                assert message.tool_calls, "every turn is a call"
                messages.append(message.model_dump(exclude_none=True))
                called = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "35862"}
                messages.append(called)

    begun, used = time.monotonic(), cpu_seconds()
    await asyncio.gather(*(one(session) for session in sessions))
    return {"seconds": time.monotonic() - begun, "cpu": cpu_seconds() - used}


async def serve(sessions: int, turns: int) -> dict[str, float]:
    """The sessions of the gateway, until the client process has had all its answers."""
    tokenizer = build_tokenizer()
    ids = tuple(tokenizer.encode(CALL, add_special_tokens=False))
    scores = (-0.5,) * len(ids)

    async def sampled(request: Request) -> list[Reply]:
        return [Reply(request.rids[0], ids, scores, (), "stop", (VersionSpan("1", 0, len(ids)),))]

    text = str(tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True))
    prompt = Prompt("p", text, tuple(tokenizer.encode(text, add_special_tokens=False)), "", {}, [ASK])
    template = ChatTemplate(tokenizer, response=tokenizer.response_template)
    limits = RolloutLimits(turns + 1, 1 << 16, 3600.0, 3600.0)
    async with AsyncExitStack() as stack:
        policies, endpoints = [], []
        for k in range(sessions):
            request = Request([prompt.token_ids], [{"max_new_tokens": 512, "sampling_seed": k}], [f"p/{k}"])
            policies.append(Policy(prompt, request, sampled, template, limits))
            endpoint = await stack.enter_async_context(serve_policy(policies[-1]))
            endpoints.append({"url": endpoint.openai_url, "key": endpoint.key})
        command = [sys.executable, "-m", "benchmarks.gateway", "--client", "--turns", str(turns)]
        client = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        used = cpu_seconds()
        said, _ = await client.communicate(json.dumps(endpoints).encode())
        used = cpu_seconds() - used
        for policy in policies:
            (segment,) = policy.recorder.segments(prompt)
            assert len(segment.log_probs) == turns * len(ids), "every sampled token is there, once"
    found = json.loads(said)
    requests = sessions * turns
    return {
        "requests": requests,
        "gateway_ms": round(1e3 * used / requests, 3),
        "client_ms": round(1e3 * found["cpu"] / requests, 3),
        "requests_per_second": round(requests / found["seconds"], 1),
    }


def main() -> int:
    """Measure, write, and say whether it is within the bound."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sessions", type=int, default=512)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--out", type=output_directory, default=ROOT / "benchmarks")
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        print(json.dumps(asyncio.run(talk(json.load(sys.stdin), given.turns))))
        return 0
    found = asyncio.run(serve(given.sessions, given.turns))
    made = {
        "date": date.today().isoformat(),
        "sessions": given.sessions,
        "turns": given.turns,
        **found,
        "bound_ms": MOST_MS,
        "hardware": {"machine": platform.machine(), "processor": _processor()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("openai", "aiohttp", "transformers")},
        },
    }
    path = given.out / f"gateway_{made['date']}.json"
    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(made, indent=1))
    return int(found["gateway_ms"] > MOST_MS)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    sys.exit(main())
