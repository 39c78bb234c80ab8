"""Environments of the package verifiers (0.4): its tasks as a prompt file, its agents by the gateway.

    python -m mcore_rl.environments.connectors.verifiers '{"taskset": {"id": "my_tasks"}}' train.jsonl

    [environment]
    function = "mcore_rl.environments.connectors.verifiers:play"
    args = { env = { taskset = { id = "my_tasks" }, agent = { runtime = { type = "subprocess" } } } }

`env` is the package's own [env] block. An episode is a rollout: whatever program its agents are, their model
is the gateway's, so that every token that they had sampled is trained. The reward is the package's own, by
parts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from mcore_rl.directories import write_whole
from mcore_rl.environments.gateway import serve_policy
from mcore_rl.environments.policy import Policy
from mcore_rl.errors import ConfigError, McoreRLError
from mcore_rl.rewards.outcome import Void
from mcore_rl.terminal import escaped, printable, short
from mcore_rl.types import Prompt

_KEY = "verifiers"
"""of the metadata of a row: the position of its task"""
_SENT_IN_VAIN = ("temperature", "top_p", "top_k", "min_p", "parallel_tool_calls")
"""that agents of the package may send, and that have no effect: the policy is sampled as it is trained"""


@dataclass
class _Served:
    """An environment whose own servers run on an event loop, until that ends."""

    env: Any
    ready: asyncio.Future[None]
    task: asyncio.Task[None] | None = None


_SERVED: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Served]] = (
    weakref.WeakKeyDictionary()
)


async def play(policy: Policy, prompt: Prompt, *, env: Mapping[str, Any]) -> dict[str, float] | Void:
    """One episode of a row's task; the weighted rewards by their names, or why there are none."""
    import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]

    key = json.dumps(env, sort_keys=True)
    served = await _serving(key)
    task = _tasks(key)[prompt.metadata[_KEY]]
    async with serve_policy(policy, ignored=_SENT_IN_VAIN) as endpoint:
        client = vf.EvalClientConfig(
            base_url=endpoint.openai_url, api_key_var="", headers={"x-api-key": endpoint.key}
        )
        episode = await served.env.run_episode(task, vf.ModelContext(model="policy", client=client))
    if not episode.ok:
        errors = [*episode.errors, *(one for trace in episode.traces for one in trace.errors)]
        why = f"{errors[-1].type}: {errors[-1].message}" if errors else "the episode is not ok"
        return Void("verifiers", short(why))
    return parts(episode)


def parts(episode: Any) -> dict[str, float]:
    """The weighted rewards of an episode's agents, by name; those of one name are added."""
    found: dict[str, float] = {}
    for trace in episode.traces:
        for name, reward in trace.rewards.items():
            if reward is not None:
                found[name] = found.get(name, 0.0) + reward.value
    return found


def rows(env: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """The first tasks of an environment as rows of a prompt file. Raises ConfigError."""
    for index, task in enumerate(islice(_tasks(json.dumps(env, sort_keys=True)), size)):
        data = task.data
        said = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
        yield {
            "id": data.id or f"{env['taskset']['id']}-{index}",
            "prompt": [*said, {"role": "user", "content": data.prompt_text}],
            "label": "",
            _KEY: index,
        }


async def _serving(key: str) -> _Served:
    """The environment of a configuration on this event loop, with its servers up."""
    of_loop = _SERVED.setdefault(asyncio.get_running_loop(), {})
    if key not in of_loop:
        served = of_loop[key] = _Served(_load(key), asyncio.get_running_loop().create_future())
        served.task = asyncio.create_task(_serve(served))
    await asyncio.shield(of_loop[key].ready)
    return of_loop[key]


async def _serve(served: _Served) -> None:
    """Until the loop's tasks are cancelled, at the end of the run."""
    try:
        async with served.env.serving():
            served.ready.set_result(None)
            await asyncio.get_running_loop().create_future()
    except Exception as error:
        if not served.ready.done():
            served.ready.set_exception(ConfigError(f"verifiers: {escaped(error)}; see environment.args.env"))


def _load(key: str) -> Any:
    try:
        from verifiers.v1.utils import loaders  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(f'verifiers: {error}; pip install "mcore_rl[verifiers]"') from None
    try:
        return loaders.load_environment(loaders.resolve_env_config(json.loads(key)))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"environment.args.env: {escaped(error)}; write verifiers' own [env]") from None


@lru_cache(maxsize=8)
def _tasks(key: str) -> Sequence[Any]:
    """The tasks of a configuration in their order. Raises ConfigError where there is no end of them."""
    taskset = _load(key).taskset
    if not taskset.bounded:
        raise ConfigError("verifiers: the taskset is infinite; bound it in its own configuration")
    return list(taskset)


def main(argv: Sequence[str] | None = None) -> int:
    """Write a prompt file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("env", type=json.loads, help="verifiers' own [env] block, as JSON")
    parser.add_argument("out", type=Path, help="the jsonl file to write")
    parser.add_argument("--size", type=int, default=1 << 20, help="tasks, at most")
    given = parser.parse_args(argv)
    try:
        lines = [json.dumps(one) + "\n" for one in rows(given.env, given.size)]
        write_whole(given.out, "".join(lines))
    except McoreRLError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    print(printable(f"{given.out}: {len(lines)} prompts"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
