"""Conversations of a file, checked and brought to the form that chat templates are written for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mcore_rl import strict_json
from mcore_rl.data.tables import kind
from mcore_rl.errors import DataError
from mcore_rl.terminal import quoted

Message = Mapping[str, Any]
LastAssistant = Literal["refuse", "drop", "continue"]
"""what becomes of an assistant's turn that ends a conversation"""


def read_messages(place: str, value: Any) -> list[Message]:
    """The messages of `value`, each with a string as its content.

    Content parts of text are joined. Content that is null or absent beside tool calls is empty text, as
    SGLang has it.

    Raises:
        DataError: `place[index]: what, remedy` for anything else.
    """
    if not isinstance(value, list):
        raise DataError(f"{place}: a {kind(value)}; expected a string or a list of messages")
    if not value:
        raise DataError(f"{place}: empty list of messages; give at least one")
    return [_message(f"{place}[{index}]", message) for index, message in enumerate(value)]


def _message(place: str, message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f'{place}: expected {{"role": string, "content": string}}; write the message so')
    return message | {"content": _content(place, message)}


def _content(place: str, message: Message) -> str:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(
            f'{place}: expected {{"role": string, "content": string}}, and the content is a {kind(content)}; '
            "write the message so"
        )
    return "".join(_part(f"{place}.content[{index}]", part) for index, part in enumerate(content))


def _part(place: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise DataError(f'{place}: a {kind(part)}; write the part as {{"type": "text", "text": string}}')
    if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        raise DataError(
            f"{place}: a part of type {quoted(part.get('type'))}, and models of text read parts of text "
            f"alone; "
            'write {"type": "text", "text": string}, or take it out'
        )
    return part["text"]


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages after a system turn, where they have none of their own."""
    if system is None or messages[0]["role"] in ("system", "developer"):
        return [*messages]
    return [{"role": "system", "content": system}, *messages]


def without_last_answer(
    place: str, messages: Sequence[Message], rule: LastAssistant, *, trained: bool = False
) -> tuple[Sequence[Message], str | None]:
    """(the messages up to where the assistant answers, what it said in a turn that was dropped).

    `trained`: the label behind the messages is trained on, which the error's remedy depends on.

    Raises:
        DataError: the conversation ends with the assistant's turn and `rule` is `refuse`, or nothing but such
            turns is left.
    """
    if messages[-1]["role"] != "assistant" or rule == "continue":
        return messages, None
    if rule == "refuse":
        whole = (
            'set supervised.target to "all" or "last" to train on the conversation\'s own turns, '
            if trained
            else ""
        )
        raise DataError(
            f"{place}[{len(messages) - 1}]: ends with the assistant's turn, and the response would be one "
            f'more; {whole}take the turn out, or set data.last_assistant to "drop" or "continue"'
        )
    before = list(messages)
    while before and before[-1]["role"] == "assistant":
        before.pop()
    if not before:
        raise DataError(f"{place}: nothing but turns of the assistant, which are dropped; take the row out")
    return before, messages[len(before)]["content"]


def read_tools(place: str, value: Any) -> list[Any] | None:
    """A list of tools, or the JSON text of one, in which Arrow can fill up nothing; None where there are
    none.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, str) and value.strip():
        value = _parsed(place, value)
    if value in (None, "", []):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{place}: expected a list of tools, each an object; write their JSON schemas")
    return value


def read_template_kwargs(place: str, value: Any) -> dict[str, Any]:
    """What a row gives its chat template besides messages and tools.

    Raises:
        DataError: it is no object, or has a name that rendering itself decides.
    """
    if isinstance(value, str) and value.strip():
        value = _parsed(place, value)
    if value in (None, ""):
        return {}
    if not isinstance(value, dict):
        raise DataError(f"{place}: a {kind(value)}; expected an object of the template's variables")
    taken = sorted(RESERVED & value.keys())
    if taken:
        raise DataError(f"{place}.{taken[0]}: is decided by what is asked of the template; take it out")
    return value


RESERVED = frozenset(
    {
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "processor_kwargs",
        "load_audio_from_video",
        "sanitize_control_tokens",
    }
)
"""names in chat_template_kwargs that would change more than the template's variables"""


def _parsed(place: str, text: str) -> Any:
    try:
        return strict_json.parse(text.encode(errors="surrogatepass"))
    except strict_json.JsonError as error:
        raise DataError(f"{place}: {error}") from None
