"""`mcore-rl chat`: a conversation with a model in the terminal, or one answer for every line of a pipe."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mcore_rl.environments.policy import AbortedError, LimitReached, Policy
from mcore_rl.errors import DataError
from mcore_rl.log import tell
from mcore_rl.rollout.client import RolloutClient, call
from mcore_rl.rollout.processes import Embedded, LocalServer
from mcore_rl.server.tokenizer import load_tokenizer
from mcore_rl.talk.policy import chat_template, policy_of
from mcore_rl.talk.weights import model_of
from mcore_rl.terminal import escaped, printable

NEW = "/new"
"""what a person types to begin another conversation"""


class Talk:
    """What was said so far; every call opens the client anew, so that the terminal waits for nothing."""

    def __init__(self, url: str, model: Path, system: str | None, sampling: Mapping[str, Any]) -> None:
        self._url, self._system, self._sampling = url, system, dict(sampling)
        self._most = self._sampling.pop("max_tokens")
        self._template = chat_template(load_tokenizer(model), str(model))
        self._context = int(call(RolloutClient(url), lambda client: client.server_info())["context_length"])
        self.begin()

    @property
    def has_template(self) -> bool:
        """Without a chat template a line is the whole prompt, as in a base model or the demo's."""
        return bool(self._template.tokenizer.chat_template)

    def begin(self) -> None:
        """Forget what was said."""
        self._client = RolloutClient(self._url)
        self._policy: Policy = policy_of(self._client, self._template, self._context, self._sampling)
        self._messages: list[Mapping[str, Any]] = []
        if self._system is not None and self.has_template:
            self._messages.append({"role": "system", "content": self._system})

    def say(self, text: str) -> str:
        """The model's answer. Raises LimitReached, AbortedError, DataError, RolloutError."""
        asked: Any = self._policy.encode(text)
        if self.has_template:
            asked = [*self._messages, {"role": "user", "content": text}]
        turn = call(self._client, lambda _: self._policy.generate(asked, max_new_tokens=self._most))
        if self.has_template:
            self._messages = [*asked, turn.message]
        return turn.text


def chat(target: Path, *, checkpoint: str | None, system: str | None, threads: int, **sampling: Any) -> int:
    """Talk to the model that `target` means until the input ends; errors as `model_of`.

    Args:
        sampling: temperature, and max_tokens of one answer.
    """
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(model_of(target, checkpoint))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mcore_rl_chat_")))
        tell(f"loading {model} ...", is_main=True)
        program = Embedded(threads=threads)
        server = stack.enter_context(LocalServer(model, program, log_file=scratch / "server.log"))
        talk = Talk(server.url, model, system, sampling)
        _in_terminal(talk) if sys.stdin.isatty() else _piped(talk)
    return 0


def _in_terminal(talk: Talk) -> None:
    kind = "" if talk.has_template else "; it has no chat template, and each line is a whole prompt"
    tell(f"{NEW} begins another conversation, Ctrl-D ends{kind}", is_main=True)
    while (line := _line()) is not None:
        if line.strip() == NEW:
            talk.begin()
        elif line.strip():
            for said in _answer(talk, line).split("\n"):
                print(printable(said), flush=True)


def _line() -> str | None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lines can be edited
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _piped(talk: Talk) -> None:
    """Every line is a conversation of its own, and its answer is one line, with `\\n` for its line feeds."""
    for line in _lines():
        talk.begin()
        print(printable(escaped(_answer(talk, line))), flush=True)


def _lines() -> Iterator[str]:
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")


def _answer(talk: Talk, line: str) -> str:
    try:
        return talk.say(line)
    except (LimitReached, AbortedError, DataError) as error:
        tell(f"no answer: {error}; {NEW} begins another conversation", is_main=True)
        return ""
