"""Samples of the held-out sets from servers, without ranks: scored and kept as they come."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mcore_rl.config import Config
from mcore_rl.errors import RolloutError
from mcore_rl.evaluate.keep import SampleFile
from mcore_rl.evaluate.scoring import Score
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.rollout.client import call
from mcore_rl.rollout.fleet import Fleet, on_each
from mcore_rl.rollout.inflight import Begun, InFlight, Schedule
from mcore_rl.rollout.sampler import build_group, group_request, groups_per_call
from mcore_rl.screen import SCREEN
from mcore_rl.training.assemble_servers import local_servers
from mcore_rl.training.environment import build_environments
from mcore_rl.training.evaluation_sets import EvalSet, measure, record_of
from mcore_rl.training.requests import CALLS_PER_SERVER
from mcore_rl.types import Prompt
from mcore_rl.weights.disk import load_from_disk
from mcore_rl.weights.transport import wait_for_servers

_SAMPLES_PER_CALL = 256
"""what is lost at most when the command is ended"""
_GRACE_SECONDS = 60.0
_VERSION = "eval"


@contextmanager
def serving(config: Config, model: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[InFlight]:
    """Requests to servers that hold `model`: those of rollout.urls, or some that are started on it.

    Raises:
        RolloutError: a server does not start, has no usable answer, or does not load the model.
    """
    r = config.rollout
    with ExitStack() as stack:
        local = [] if r.urls else local_servers(config, model.resolve())
        SCREEN.doing(f"starting {len(local)} servers" if local else "waiting for the servers")
        for server in local:  # all at once, then wait: most of a start is imports
            stack.callback(server.close)
            server.launch()
        for server in local:
            server.wait()
        fleet = Fleet(
            [server.url for server in local] or list(r.urls),
            vocabulary=read_architecture(model).vocab,
            api_key_env=r.api_key_env,
            timeout=r.timeout,
            health_timeout=r.health_timeout,
            local=local,
        )
        wait_for_servers(fleet.serving, r.start_timeout)
        if local:
            info = call(fleet.serving[0], lambda client: client.model_info())
            fleet.version = str(info["weight_version"])
        else:
            _load(fleet, model.resolve())
        timeout = len(fleet.serving) * r.timeout + r.health_timeout + _GRACE_SECONDS
        schedule = Schedule(extra=0, max_staleness=0)
        environments = build_environments(config, tokenizer)
        if environments is not None:
            timeout += config.environment.timeout
            stack.callback(environments.close)
        requests = InFlight(fleet.dispatch(), schedule, timeout=timeout, player=environments)
        stack.callback(requests.close)
        yield requests


def _load(fleet: Fleet, model: Path) -> None:
    loads = on_each(fleet.serving, lambda client: load_from_disk(client, model, _VERSION))
    _, failed = asyncio.run(loads)
    if failed:
        raise RolloutError("\n".join(failed.values()))
    fleet.version = _VERSION


def sample_set(
    requests: InFlight,
    one: EvalSet,
    file: SampleFile,
    *,
    score: Score,
    servers: int,
    seed: int,
    decode: Callable[[Sequence[int]], str],
) -> None:
    """Sample what `file` lacks of a set, score it and keep it, with a line of progress for every call.

    Raises:
        RolloutError: no server is left; what was sampled is kept.
        RewardError: an answer could not be had, or what `score` raises.
    """
    left = [prompt for prompt in one.prompts if prompt.id not in file.sampled]
    calls = CALLS_PER_SERVER * servers
    together = groups_per_call(left, one.samples, one.params, calls=calls)
    together = max(1, min(together, _SAMPLES_PER_CALL // one.samples))
    waiting: deque[tuple[Sequence[Prompt], Begun]] = deque()
    parts = deque(left[start : start + together] for start in range(0, len(left), together))
    while parts or waiting:
        while parts and len(waiting) < calls:
            part = parts.popleft()
            asked = [group_request(p, _group(p, one), one.samples, one.params, seed=seed) for p in part]
            waiting.append((part, requests.begin(asked, len(part))))
        part, begun = waiting.popleft()
        SCREEN.doing(f"sampling {one.name}")
        replies = requests.finish(begun)
        groups = [build_group(_group(p, one), p, its, decode) for p, its in zip(part, replies, strict=True)]
        file.add([record_of(one, sample) for group in score(groups) for sample in group.samples])
        _say(one, file)
    file.finish()


def _group(prompt: Prompt, one: EvalSet) -> str:
    return f"{prompt.id}@{one.name}"


def _say(one: EvalSet, file: SampleFile) -> None:
    value = measure(one, file.records).get(f"eval/{one.name}/{one.what}")
    shown = "" if value is None else f"  {one.word} {value:.3f}"
    status = f"{one.name}  {len(file.sampled)}/{len(one.prompts)} prompts{shown}"
    SCREEN.progress(len(file.sampled) / len(one.prompts), status)
    SCREEN.say(status)
