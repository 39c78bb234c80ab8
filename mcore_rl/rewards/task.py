"""What the processes of a reward pool are told: which functions, for which prompts, with which weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcore_rl.lookup import MISSING, look_up
from mcore_rl.terminal import joined, quoted
from mcore_rl.types import Prompt

TIMEOUT = "MCORE_RL_REWARD_TIMEOUT"
"""environment variable of a worker: seconds of one call"""
PROCESSES = "MCORE_RL_REWARD_PROCESSES"
"""environment variable of a worker: workers of all replicas, at most"""


@dataclass(frozen=True)
class RewardFunction:
    """One function, and where it applies."""

    function: str
    """`module:function`"""
    name: str = ""
    """of its part in the sum; empty for the only function of a run, whose parts keep their own names"""
    weight: float = 1.0
    """in the sum"""
    when: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """field of the prompt's metadata, dots look into objects -> its values here; empty: every prompt"""
    arguments: Mapping[str, Any] | None = None
    """keyword arguments of every call"""
    key: str = "reward.function"
    """of the configuration, in which it is named"""

    def applies(self, prompt: Prompt) -> bool:
        """Whether every field of `when` has one of its values."""
        return all(
            any(type(value) is type(one) and value == one for one in values)
            for value, values in (
                (look_up(prompt.metadata, name), values) for name, values in self.when.items()
            )
        )


@dataclass(frozen=True)
class Task:
    """What the workers of a pool do; it travels to them once."""

    functions: tuple[RewardFunction, ...]
    weights: Mapping[str, float]
    """of the parts of the reward, by their whole name"""
    memory: float
    """GiB of address space of a worker"""
    model: Path | None
    """directory of the policy's tokenizer"""
    timeout: float = 60.0
    """seconds of one call"""
    processes: int = 1
    """workers of all replicas, at most"""
    path: Sequence[str] = ()
    """where modules are found"""

    def no_function(self, prompt: Prompt) -> str:
        """Why no table of reward.functions is for a prompt, for a message."""
        fields = dict.fromkeys(name for one in self.functions for name in one.when)
        found = {name: look_up(prompt.metadata, name) for name in fields}
        has = joined(
            f"no {n}" if value is MISSING else f"{n} = {quoted(value)}" for n, value in found.items()
        )
        return f"has no function for {has}"
