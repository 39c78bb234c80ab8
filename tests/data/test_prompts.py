"""Reading prompt files: what is kept, and that every mistake is a DataError `file:line:field`."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcore_rl.data.prompts import load_prompts
from mcore_rl.errors import DataError

GOOD = {"id": "a", "prompt": "1+2=", "label": "3"}


@pytest.fixture
def load(tmp_path, tokenizer):
    def write_and_load(*lines, name="p.jsonl", max_prompt_tokens=16, **keys):
        path = tmp_path / name
        if name.endswith("jsonl"):
            path.write_bytes(
                b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
            )
        return load_prompts(path, tokenizer, max_prompt_tokens=max_prompt_tokens, **keys)

    return write_and_load


def test_string_prompts_are_encoded_as_they_stand(load):
    data = load(GOOD, b"", {**GOOD, "id": "b", "prompt": "12", "difficulty": 3})
    first, second = data.prompts
    assert (first.id, first.text, first.label, first.metadata) == ("a", "1+2=", "3", {})
    assert first.token_ids == (3, 12, 4, 14)
    assert second.metadata == {"difficulty": 3}
    assert data.too_long == ()


def test_keys_can_be_named_and_ids_default_to_the_line(load):
    data = load({"q": "1", "a": "2"}, {"q": "2", "a": "3"}, prompt_key="q", label_key="a")
    assert [(p.id, p.text, p.label) for p in data.prompts] == [("1", "1", "2"), ("2", "2", "3")]


def test_where_no_label_is_needed_a_prompt_may_have_none(load):
    data = load({"prompt": "1"}, GOOD, needs_label=False)
    assert [p.label for p in data.prompts] == ["", "3"]


def test_messages_are_rendered_by_the_chat_template(load, tokenizer):
    messages = {**GOOD, "prompt": [{"role": "user", "content": "1+2="}]}
    with pytest.raises(DataError, match=r"p.jsonl:1:prompt: .*no chat template"):
        load(messages)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}ab{% endif %}"
    )
    try:
        (prompt,) = load(messages).prompts
    finally:
        tokenizer.chat_template = None
    assert prompt.text == "1+2=ab"
    assert len(prompt.token_ids) == 6


def test_parquet(load, tmp_path):
    pq.write_table(
        pa.Table.from_pylist([GOOD, {"id": "b", "prompt": "1", "label": "2"}]), tmp_path / "p.parquet"
    )
    assert [p.id for p in load(name="p.parquet").prompts] == ["a", "b"]
    pq.write_table(
        pa.Table.from_pylist([GOOD, {"id": "b", "prompt": None, "label": "2"}]), tmp_path / "p.parquet"
    )
    with pytest.raises(DataError, match=r"p.parquet:2:prompt: missing"):
        load(name="p.parquet")
    (tmp_path / "p.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"p.parquet: .*readable parquet"):
        load(name="p.parquet")


def test_long_prompts_are_dropped_and_named(load):
    data = load(GOOD, {**GOOD, "id": "long", "prompt": "1" * 5}, max_prompt_tokens=4)
    assert [p.id for p in data.prompts] == ["a"]
    assert data.too_long == ("long",)
    with pytest.raises(
        DataError, match=r"all 2 prompts exceed 3 tokens \(the shortest has 4\); raise data.max"
    ):
        load(GOOD, {**GOOD, "id": "long", "prompt": "1" * 5}, max_prompt_tokens=3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'id': 1}", r":2: not JSON at column 2"),
        (b'{"id": "b", "prompt"', r":2: not JSON"),
        (b"\xff{}", r":2: byte 0 is not UTF-8"),
        (b"[" * 100_000, r":2: (nested too deeply|not JSON)"),
        (b"3", r":2: a JSON number, expected an object"),
        ({"id": "b", "label": "3"}, r":2:prompt: missing \(keys here: id, label\)"),
        ({"id": "b", "prompt": "1"}, r":2:label: missing"),
        ({**GOOD, "id": "b", "label": 3}, r":2:label: a number; expected a string"),
        ({**GOOD, "id": "b", "label": None}, r":2:label: a null"),
        ({**GOOD, "id": 7}, r":2:id: a number"),
        ({**GOOD, "id": "b", "prompt": True}, r":2:prompt: a boolean; expected a string or a list"),
        ({**GOOD, "id": "b", "prompt": ""}, r":2:prompt: empty prompt"),
        ({**GOOD, "id": "b", "prompt": []}, r":2:prompt: empty list"),
        ({**GOOD, "id": "b", "prompt": [{"role": "user"}]}, r":2:prompt\[0\]: expected"),
        ({**GOOD, "id": "b", "prompt": "1z"}, r":2:prompt: the tokenizer refuses it"),
        ({**GOOD, "id": "b", "prompt": "\ud800"}, r":2:prompt: the tokenizer refuses it"),
        ({**GOOD, "sampling_params": {"top_p": 0.9}}, r":2:sampling_params: no prompt .*; remove it"),
        (GOOD, r":2:id: 'a' is already the id at .*p.jsonl:1"),
    ],
)
def test_a_bad_line_is_named(load, line, message):
    with pytest.raises(DataError, match=r"p\.jsonl" + message):
        load(GOOD, line)


def test_files_without_prompts(load, tmp_path, tokenizer):
    with pytest.raises(DataError, match="no prompts in the file"):
        load(b"", b" ")
    with pytest.raises(DataError, match="No such file"):
        load_prompts(tmp_path / "absent.jsonl", tokenizer, max_prompt_tokens=4)
    with pytest.raises(DataError, match="Is a directory"):
        load_prompts(tmp_path, tokenizer, max_prompt_tokens=4)
