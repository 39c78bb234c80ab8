"""The section of what watches a run from outside; nothing in it changes what is computed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

from mcore_rl.config.sections import Count, Section


def _address(text: str) -> str:
    match = re.fullmatch(r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):(\d{1,5})", text)
    if not match or not 0 < int(match[2]) < 65536:
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:9400")
    return text


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class WatchConfig(Section):
    """A timeline, an endpoint for Prometheus, profilers: see docs/trackers.md."""

    timeline: bool = False
    """Keep when every rank and every server did what; `mcore-rl report` makes RUN_DIR/timeline.json of it."""
    prometheus: Annotated[str, AfterValidator(_address)] | None = None
    """HOST:PORT at which the main rank answers Prometheus with the newest metrics; unset, nowhere."""
    profile_steps: Annotated[tuple[Count, Count], BeforeValidator(_pair)] | None = None
    """First and last step that `profile` records, on every rank; unset, none."""
    profile: Annotated[tuple[Literal["torch", "memory", "nvtx"], ...], BeforeValidator(_pair)] = ("torch",)
    """What is recorded of them: `torch`, its profiler's trace; on a GPU also `memory`, the history of its
    allocator, and `nvtx`, ranges by phase for Nsight Systems."""


def wrong_watch(watch: WatchConfig, steps: int) -> Iterator[str]:
    """`watch.key: what, remedy` for what cannot be meant in a run of so many steps."""
    window = watch.profile_steps
    if window is None:
        if "profile" in watch.model_fields_set and watch.profile != ("torch",):
            yield "watch.profile: no steps are recorded; set watch.profile_steps to the first and the last"
        return
    if window[0] > window[1]:
        yield f"watch.profile_steps: {list(window)} ends before it begins; name the first and the last step"
    elif window[1] > steps:
        yield f"watch.profile_steps: the run has {steps} steps; name a first and a last step among them"
    if not watch.profile:
        yield "watch.profile: nothing is recorded of watch.profile_steps; name `torch`, or remove both"
