"""Reading a configuration from TOML and the command line, and writing the resolved one."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mcore_rl.config import toml
from mcore_rl.config.config import BEFORE_TORCH, Config, unused_keys
from mcore_rl.config.sections import REFUSED_SAMPLING, EvalSetConfig, RewardFunctionConfig, Section
from mcore_rl.errors import ConfigError
from mcore_rl.terminal import escaped

KEYS: dict[str, dict[str, FieldInfo]] = {
    name: cast(type[Section], field.annotation).model_fields for name, field in Config.model_fields.items()
}
"""section -> key -> field"""
NAMED: dict[str, type[Section]] = {"eval.sets": EvalSetConfig, "reward.functions": RewardFunctionConfig}
"""where tables of the user's own names are -> what each of them is"""
_MOST_MISTAKES = 20
"""that one message names"""
MAX_DEPTH = 16
"""tables and arrays within each other; the deepest key is at 3, such as algorithm.params.eps_low"""
MOST_SHOWN = 200
"""characters of a key or flag in a message"""


def load_config(
    path: Path, overrides: Sequence[str] = (), look: Callable[[Config], None] | None = None
) -> Config:
    """Read a TOML file, then `--section.key value` or `--section.key=value` in order.

    Override values are TOML literals; a bare word is a string.

    Args:
        look: is shown the configuration before torch is imported for the rules that read the algorithms.

    Raises:
        ConfigError: a line per mistake: where it stands, the dotted path, what is wrong and the remedy. No
            line repeats a value, which could be a secret pasted into the wrong place.
    """
    try:
        tables = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; check the path") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or an integer of thousands of digits
        raise ConfigError(f"{path}: not TOML: {error}; fix the file") from None
    flags = dict(_parse_overrides(overrides))
    for dotted, value in flags.items():
        _override(tables, dotted, value)
    beyond = [
        f"{_source(dotted, flags, path)}: {_shown(dotted)}: {what}"
        for dotted, what in _beyond_reading(tables)
    ]
    if beyond:
        raise ConfigError("\n".join(beyond))
    try:
        # Through JSON: in its strict mode, unlike Python's, an array may be a tuple and a string a path.
        text = json.dumps(tables, default=str)
        if look is not None:
            look(Config.model_validate_json(text, context=BEFORE_TORCH))
        return Config.model_validate_json(text)
    except ValidationError as error:
        mistakes = [mistake for details in error.errors() for mistake in _describe(details)]
        lines = [
            f"{_source(dotted, flags, path)}: {_shown(dotted)}: {what}"
            for dotted, what in mistakes[:_MOST_MISTAKES]
        ]
        if len(mistakes) > _MOST_MISTAKES:
            lines.append(f"{path}: and {len(mistakes) - _MOST_MISTAKES} more mistakes")
        raise ConfigError("\n".join(lines)) from None


def separate(mistakes: str) -> list[str]:
    """The mistakes that one message tells of; a line that is indented goes on with the one before it."""
    return re.split(r"\n(?=\S)", mistakes)


def to_toml(config: Config) -> str:
    """The configuration with its defaults, less the keys that have no effect; `load_config` reads it back."""
    tables = config.model_dump()
    for dotted in unused_keys(config):
        section, _, key = dotted.partition(".")
        del tables[section][key]
    return toml.dumps(tables)


def _parse_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of each flag."""
    rest = iter(arguments)
    for argument in rest:
        flag, equals, text = argument.partition("=")
        keys = flag[2:].split(".")
        if not _is_unicode(flag):
            raise ConfigError(f"command line: {_shown(flag)}: not UTF-8 text; retype the flag")
        if not flag.startswith("--") or len(keys) < 2 or not all(keys):
            raise ConfigError(
                f"command line: {_shown(flag)} is not of the form --section.key value, as in --run.seed 1"
            )
        value = text if equals else next(rest, "--")
        if not equals and value.startswith("--"):
            raise ConfigError(f"command line: {_shown(flag)} needs a value; write --section.key=VALUE")
        if not _is_unicode(value):
            raise ConfigError(f"command line: {_shown(flag[2:])}: not UTF-8 text; retype the value")
        yield flag[2:], toml.parse_value(value)


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _shown(dotted: str) -> str:
    """A dotted path for a message: on one line, and of thousands of parts the first."""
    cut = dotted if len(dotted) <= MOST_SHOWN else f"{dotted[:MOST_SHOWN]}..."
    return escaped(cut)


def _beyond_reading(tables: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted path, what and remedy) of every value that could not go through JSON, where it is checked."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), tables)]
    while waiting:
        keys, value = waiting.pop()
        if isinstance(value, dict | list) and len(keys) > MAX_DEPTH:
            yield ".".join(keys), "nested too deeply; keys are of the form section.key"
        elif isinstance(value, dict):
            waiting += [((*keys, key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            waiting += [((*keys, str(index)), inner) for index, inner in enumerate(value)]
        elif type(value) is int and value.bit_length() > 63:
            yield ".".join(keys), "beyond 64 bits, which is where TOML's integers end; write a smaller number"


def _override(tables: dict[str, Any], dotted: str, value: Any) -> None:
    *above, key = dotted.split(".")
    table = tables
    for name in above:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(
                f"command line: {_shown(dotted)}: {_shown(name)} is a value, not a table; set it by itself"
            )
    table[key] = value


def _source(dotted: str, flags: dict[str, Any], path: Path) -> str:
    given = any(f"{dotted}.".startswith(f"{flag}.") or f"{flag}.".startswith(f"{dotted}.") for flag in flags)
    return "command line" if given else str(path)


def _describe(details: ErrorDetails) -> Iterator[tuple[str, str]]:
    """(dotted path, what and remedy) of one of pydantic's errors."""
    dotted = ".".join(map(str, details["loc"]))
    reason = str(details.get("ctx", {}).get("error", details["msg"]))
    match details["type"]:
        case "extra_forbidden" if dotted.partition(".")[2] in REFUSED_SAMPLING:
            yield dotted, REFUSED_SAMPLING[dotted.partition(".")[2]]
        case "extra_forbidden":
            yield dotted, f"unknown {'key' if '.' in dotted else 'section'}; {_suggestion(dotted)}"
        case "missing":
            yield dotted, "required; add it"
        case "value_error" if not dotted:  # the rules between sections name their own keys
            for line in separate(reason):
                key, _, what = line.partition(": ")
                yield key, what
        case "value_error":
            yield dotted, reason
        case _:
            yield dotted or "file", reason.replace("Input should", "must").replace("String should", "must")


OTHER_TRAINERS = {
    "learning_rate": "optimizer.lr",
    "lora_alpha": "lora.alpha",
    "lora_rank": "lora.rank",
    "max_completion_length": "rollout.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_response_length": "rollout.max_new_tokens",
    "max_steps": "train.steps",
    "model_name": "model.path",
    "num_generations": "rollout.samples_per_prompt",
    "reward_funcs": "reward.function",
    "total_training_steps": "train.steps",
    "train_files": "data.train",
}
"""keys of other trainers that no key here is like -> what is meant by them; all are in docs/coming_from.md"""


def _suggestion(dotted: str) -> str:
    section, _, key = dotted.partition(".")
    for place, one in NAMED.items():
        if dotted.startswith(f"{place}."):
            _, _, of_table = dotted.removeprefix(f"{place}.").rpartition(".")
            close = get_close_matches(of_table, one.model_fields, n=1)
            known = f"the keys of {place}.NAME are {', '.join(one.model_fields)}"
            return f"did you mean {dotted.removesuffix(of_table)}{close[0]}?" if close else known
    if not key or section not in KEYS:
        close = get_close_matches(section, KEYS, n=1)
        return f"did you mean [{close[0]}]?" if close else f"the sections are {', '.join(KEYS)}"
    elsewhere = [f"{name}.{key}" for name, keys in KEYS.items() if key in keys]
    elsewhere += [OTHER_TRAINERS[key]] if key in OTHER_TRAINERS else []
    close = get_close_matches(key, KEYS[section], n=1)
    if close or elsewhere:
        return f"did you mean {f'{section}.{close[0]}' if close else elsewhere[0]}?"
    return f"the keys of [{section}] are {', '.join(KEYS[section])}"
