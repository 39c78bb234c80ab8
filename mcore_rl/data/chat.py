"""Chat messages to text by the tokenizer's template: a program of a model's maker, which may fail or hang."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from mcore_rl.errors import DataError
from mcore_rl.terminal import escaped

RENDER_SECONDS = 20.0
"""of CPU time for one prompt; a template takes a fraction of a millisecond"""
_RENDER_WALL_SECONDS = 300.0
"""whatever it has had of the CPU: a machine that is busy with other things is no fault of a template"""
MAX_CHARACTERS = 1 << 24
"""of one rendered prompt: more than any model reads, and minutes of work for a tokenizer"""
_LEAST_ALARM = 0.01
"""seconds between two looks at the clocks"""
_SHOWN = 300
"""characters of what a template says when it fails"""


class _TooSlowError(Exception):
    """The template did not end in time."""


def render(
    place: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
    asks: bool = True,
) -> str:
    """The text of a conversation, up to where the assistant answers.

    Where the last turn is the assistant's, the text ends inside it, and the answer continues it.

    Args:
        tools: JSON schemas of what the assistant may call.
        variables: what else the template is given, such as `enable_thinking`.
        asks: False for the text of the whole conversation, its last turn ended.

    Raises:
        DataError: `place: what, remedy` for whatever the template does but give a text: it raises, by itself
            or on purpose (raise_exception), asks for what the sandbox refuses, or does not end in time.
    """
    continued = messages[-1]["role"] == "assistant"
    with _guarded(place):
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else list(tools),
            tokenize=False,
            add_generation_prompt=asks and not continued,
            continue_final_message=asks and continued,
            **(variables or {}),
        )
    return _checked(place, text)


def render_marked(
    place: str,
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a whole conversation, and the [start, end) characters that its template marks.

    A template marks what the assistant says with `{% generation %}`. Raises DataError as `render`.
    """
    with _guarded(place):
        texts, marked = render_jinja_template(
            [[dict(message) for message in messages]],
            tools=None if tools is None else list(tools),
            chat_template=tokenizer.get_chat_template(tools=None if tools is None else list(tools)),
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **(variables or {})},
        )
    return _checked(place, texts[0]), [(int(start), int(end)) for start, end in marked[0]]


@contextmanager
def _guarded(place: str) -> Iterator[None]:
    """Run a template. Raises DataError whatever it does but end in time and without an error."""
    try:
        with _deadline(RENDER_SECONDS, _RENDER_WALL_SECONDS):
            yield
    except _TooSlowError as late:
        raise DataError(
            f"{place}: the chat template does not end within {late} on it; use the template that belongs to "
            "the model"
        ) from None
    except Exception as error:  # a template is a program: it may raise anything
        raise DataError(
            f"{place}: the chat template fails on it ({type(error).__name__}: "
            f"{escaped(str(error)[:_SHOWN])}); change the conversation, or use the template that belongs to "
            "the model"
        ) from error


def _checked(place: str, text: object) -> str:
    if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
        raise DataError(
            f"{place}: the chat template makes more than {MAX_CHARACTERS} characters of it; use the template "
            "that belongs to the model"
        )
    return text


def is_read(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template has a word `name`: without it, a variable of that name changes nothing."""
    template = tokenizer.chat_template  # one, or several by name
    return re.search(rf"\b{re.escape(name)}\b", str(template)) is not None


@contextmanager
def _deadline(cpu_seconds: float, wall_seconds: float) -> Iterator[None]:
    """Raises _TooSlowError in the code inside once that has had so much of the CPU, or of the clock.

    Only the main thread can be interrupted, and only between two instructions of Python; elsewhere, and
    within one long call of C, the run's watchdog is what ends a hang.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    cpu_end, wall_end = time.thread_time() + cpu_seconds, time.monotonic() + wall_seconds

    def stop(_number: int, _frame: FrameType | None) -> None:
        cpu, wall = cpu_end - time.thread_time(), wall_end - time.monotonic()
        if cpu <= 0:
            raise _TooSlowError(f"{cpu_seconds:g} s of CPU time")
        if wall <= 0:
            raise _TooSlowError(f"{wall_seconds:g} s")
        signal.setitimer(signal.ITIMER_REAL, max(min(cpu, wall), _LEAST_ALARM))

    before = signal.signal(signal.SIGALRM, stop)
    others_alarm = signal.setitimer(signal.ITIMER_REAL, min(cpu_seconds, wall_seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *others_alarm)
        signal.signal(signal.SIGALRM, before)
