"""Tasks of the package reasoning-gym: their questions as a prompt file, and their verifiers as a reward.

    python -m mcore_rl.environments.connectors.reasoning_gym chain_sum train.jsonl --size 1000 --seed 0

A row says of which data set, with which configuration, seed and size, it is which entry. The reward makes
that entry again and asks the package's own verifier, so that nothing of an entry goes through JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mcore_rl.directories import write_whole
from mcore_rl.errors import ConfigError, McoreRLError
from mcore_rl.terminal import escaped, printable, short
from mcore_rl.types import Sample

_KEY = "reasoning_gym"
"""of the metadata of a row"""


def rows(
    name: str, *, size: int, seed: int, config: Mapping[str, Any], system: str | None = None
) -> Iterator[dict[str, Any]]:
    """The entries of a data set as rows of a prompt file.

    Args:
        config: of the data set, as the package's create_dataset takes it.
        system: name of one of the package's own system prompts, which ask for <answer> tags.

    Raises:
        ConfigError: the package is absent, has no such data set or prompt, or does not take the config.
    """
    source = {"name": name, "config": dict(config), "seed": seed, "size": size}
    data = _dataset(json.dumps(source, sort_keys=True))
    said = [{"role": "system", "content": _system_prompt(system)}] if system is not None else []
    for index in range(size):
        entry = data[index]
        yield {
            "id": f"{name}-{seed}-{index}",
            "prompt": [*said, {"role": "user", "content": entry["question"]}],
            "label": str(entry["answer"]),
            _KEY: {**source, "index": index},
        }


def reward(sample: Sample) -> float:
    """What the package's verifier gives for the answer: what is in <answer> tags, or all of the response.

    Raises:
        ConfigError: the entry is another one than when the prompts were written.
    """
    from reasoning_gym.utils import extract_answer

    source = dict(sample.prompt.metadata[_KEY])
    index = source.pop("index")
    data = _dataset(json.dumps(source, sort_keys=True))
    tagged, entry = extract_answer(sample.text), data[index]
    if str(entry["answer"]) != sample.prompt.label:
        raise ConfigError(
            f"reasoning-gym: {sample.prompt.id}: this version of the package makes another entry; write the "
            "prompts with it"
        )
    return float(data.score_answer(sample.text.strip() if tagged is None else tagged, entry))


@lru_cache(maxsize=64)
def _dataset(source: str) -> Any:
    """The data set of {name, config, seed, size}."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError(f'reasoning-gym: {error}; pip install "mcore_rl[reasoning-gym]"') from None
    of = json.loads(source)
    try:
        return reasoning_gym.create_dataset(of["name"], seed=of["seed"], size=of["size"], **of["config"])
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"reasoning-gym: {short(of['name'])}: {escaped(error)}; see the package's list of data sets"
        ) from None


def _system_prompt(name: str) -> str:
    from reasoning_gym.utils import SYSTEM_PROMPTS

    if name not in SYSTEM_PROMPTS:
        known = ", ".join(SYSTEM_PROMPTS)
        raise ConfigError(f"reasoning-gym: --system {short(name)}: not one of {known}")
    return SYSTEM_PROMPTS[name]


def main(argv: Sequence[str] | None = None) -> int:
    """Write a prompt file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", help="of a data set of reasoning-gym, such as chain_sum")
    parser.add_argument("out", type=Path, help="the jsonl file to write")
    parser.add_argument("--size", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="another one for held-out prompts")
    parser.add_argument("--config", type=json.loads, default={}, help="of the data set, a JSON object")
    parser.add_argument("--system", help="name of one of the package's system prompts, such as default")
    given = parser.parse_args(argv)
    try:
        if not isinstance(given.config, dict):
            raise ConfigError("reasoning-gym: --config: expected a JSON object")
        made = rows(given.name, size=given.size, seed=given.seed, config=given.config, system=given.system)
        write_whole(given.out, "".join(json.dumps(one) + "\n" for one in made))
    except McoreRLError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    print(printable(f"{given.out}: {given.size} prompts of {given.name}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
