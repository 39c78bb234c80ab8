"""Rows that are trained as they are: which tokens of a conversation, a pair or a verdict are trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mcore_rl.data.examples import Example, ExampleFormat, Limit
from mcore_rl.data.prompts import Response, open_prompts
from mcore_rl.errors import DataError

ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
CHATML = HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}" + ASKS
MARKED = (
    HEAD + "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}" + ASKS
)
THOUGHT = "{% if m.role == 'assistant' and loop.last %}<think>{% endif %}"
FORGETS = HEAD + THOUGHT + "{{ m.content }}<|im_end|>\n{% endfor %}" + ASKS
HALF = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last")
ASK, SAY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
MORE, FINE = {"role": "user", "content": "more"}, {"role": "assistant", "content": "fine"}
TALK = [ASK, SAY, MORE, FINE]


def tokenizer(template: str = CHATML, *, spaced: bool = False) -> PreTrainedTokenizerFast:
    """A token per byte; `spaced` puts a space in front of every text, as some families do."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if spaced:
        made.normalizer = normalizers.Prepend(" ")
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **special)


def read(folder: Path, row: dict, tokens=None, limits=(), **form) -> Example:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    form = ExampleFormat(**{"last_assistant": "continue", **form})
    tokens = tokenizer() if tokens is None else tokens
    found = open_prompts([path], tokens, form, max_prompt_tokens=500, response=Response(None, limits))
    example = found.prompts[0]
    assert isinstance(example, Example)
    return example


def shown(example: Example, number: int = 0, tokens=None) -> tuple[str, str]:
    """(the context, what follows it with `.` for every token that is not trained) of a sequence."""
    tokens = tokenizer() if tokens is None else tokens
    one = example.sequences[number]
    mask = [True] * len(one.response) if one.loss_mask is None else one.loss_mask
    follows = (tokens.decode([i]) if kept else "." for i, kept in zip(one.response, mask, strict=True))
    return tokens.decode(list(one.prompt)), "".join(follows)


ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
BETWEEN = "." * len("\n_user\nmore_\n_assistant\n")


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marked"])
@pytest.mark.parametrize("end", [[], [ASK]], ids=["answered", "asked again"])
def test_all_turns_of_the_assistant_are_trained_and_nothing_else(tmp_path, template, end) -> None:
    example = read(tmp_path, {"prompt": [*TALK, *end]}, tokenizer(template), target="all")
    assert shown(example) == (ASKED, f"yo<|im_end|>{BETWEEN}fine<|im_end|>")
    assert example.tokens == len("yo_fine_")


@pytest.mark.parametrize("template", [CHATML, MARKED, FORGETS], ids=["prefixes", "marked", "forgets"])
def test_the_last_turn_is_trained_as_it_is_sampled(tmp_path, template) -> None:
    thought = "<think>" if template == FORGETS else ""
    context, trained = shown(read(tmp_path, {"prompt": TALK}, tokenizer(template), target="last"))
    assert context == f"{ASKED}yo<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    assert trained == f"{thought}fine<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (TALK, FORGETS, r"prompt\[1\]: the chat template writes this turn otherwise .* mark what the assist"),
        (TALK, HALF, "marks 1 generations in a conversation with 2 turns"),
        ([SAY, ASK, FINE], CHATML, r"prompt\[0\]: a turn of the assistant that nothing asks for"),
        ([ASK, SAY, FINE], CHATML, r"prompt\[2\]: a turn of the assistant that nothing asks for"),
        ([ASK], CHATML, "no turn of the assistant"),
        ("hi", CHATML, 'a string; supervised.target = "all" takes a list'),
        ([], CHATML, "empty list of messages"),
        (TALK, "", "the tokenizer has no chat template"),
    ],
)
def test_what_cannot_be_told_is_refused_and_never_guessed(tmp_path, messages, template, message) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl:1:.*{message}"):
        read(tmp_path, {"prompt": messages}, tokenizer(template), target="all")


def test_a_tokenizer_that_writes_a_turn_otherwise_alone_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="writes other text when it encodes a turn by itself"):
        read(tmp_path, {"prompt": TALK}, tokenizer(spaced=True), target="all")


GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "hi", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        {"prompt": [ASK], "chosen": [GOOD], "rejected": "bad"},
    ],
    ids=["completions", "ultrafeedback", "no prompt", "mixed"],
)
def test_a_pair_of_conversations_in_every_form(tmp_path, row) -> None:
    example = read(tmp_path, row, target="pair")
    assert [shown(example, i) for i in (0, 1)] == [(ASKED, "good<|im_end|>"), (ASKED, "bad<|im_end|>")]


def test_a_pair_of_texts_has_a_margin_and_ends_with_the_end_token(tmp_path) -> None:
    row = {"prompt": "1+1=", "chosen": "2", "rejected": "3<|im_end|>", "by": 2}
    example = read(tmp_path, row, target="pair", margin_key="by")
    assert [shown(example, i) for i in (0, 1)] == [("1+1=", "2<|im_end|>"), ("1+1=", "3<|im_end|>")]
    assert example.margin == 2.0


def test_answers_of_several_turns_are_trained_behind_what_they_share(tmp_path) -> None:
    row = {"chosen": [*TALK, ASK, GOOD], "rejected": [*TALK[:3], BAD]}
    example = read(tmp_path, row, target="pair")
    contexts, answers = zip(*(shown(example, i) for i in (0, 1)), strict=True)
    assert contexts[0] == contexts[1]
    assert answers[0].replace(".", "") == "fine<|im_end|>good<|im_end|>"
    assert answers[1] == "bad<|im_end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, "prompt: missing"),
        ({"prompt": "x", "rejected": "b"}, "chosen: missing"),
        ({"prompt": "x", "chosen": 1, "rejected": "b"}, "chosen: a number"),
        ({"prompt": "x", "chosen": "", "rejected": "b"}, "chosen: an empty string"),
        (
            {"prompt": [ASK], "chosen": [GOOD, ASK], "rejected": [BAD]},
            "chosen: .* has to begin and end with a turn",
        ),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "by": True}, "by: .*expected a finite number"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "by": 10**400}, "by: beyond float32; expected"),
        ({"prompt": "x", "chosen": "a", "rejected": "b", "by": -1e39}, "by: beyond float32; expected"),
    ],
)
def test_a_pair_that_is_none_is_refused(tmp_path, row, message) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl:1:{message}"):
        read(tmp_path, row, target="pair", margin_key="by" if "by" in row else "")


@pytest.mark.parametrize("label", [True, False])
def test_a_verdict_on_an_answer(tmp_path, label) -> None:
    row = {"prompt": [ASK], "completion": [GOOD], "label": label}
    example = read(tmp_path, row, target="verdict")
    assert (shown(example), example.desirable) == ((ASKED, "good<|im_end|>"), label)
    with pytest.raises(DataError, match=r"rows.jsonl:1:label: a string; expected true"):
        read(tmp_path, {**row, "label": "yes"}, target="verdict")


def test_what_is_too_long_is_refused_when_it_is_read(tmp_path) -> None:
    row = {"prompt": "1+1=", "chosen": "2" * 5, "rejected": "3"}
    room = Limit(16, "there is room for 16", "raise it", align=4, together=True)
    assert read(tmp_path, {**row, "chosen": "2"}, target="pair", limits=[room]).tokens == 4
    whole = {**row, "chosen": "2" * 3, "rejected": "3" * 3}  # 8 tokens each
    assert read(tmp_path, whole, target="pair", limits=[room]).tokens == 8
    with pytest.raises(DataError, match="both answers of '1' make 24 tokens"):
        read(tmp_path, whole, target="pair", limits=[replace(room, behind=1)])
    with pytest.raises(
        DataError, match=r"both answers of '1' make 20 tokens .*, and there is room for 16; raise it"
    ):
        read(tmp_path, row, target="pair", limits=[room])
    with pytest.raises(DataError, match="chosen: prompt '1' of 4 tokens and its chosen answer of 6 make 10"):
        read(tmp_path, row, target="pair", limits=[Limit(8, "the model has 8 positions", "shorten it")])
