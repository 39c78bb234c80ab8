"""Reading prompt files: what is kept, and that every mistake is a DataError `file:line:field`."""

import json
import re
import signal
import time
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcore_rl.data import chat
from mcore_rl.data.examples import ExampleFormat, Limit
from mcore_rl.data.prompts import Response, open_prompts
from mcore_rl.data.reader import RowFormat
from mcore_rl.errors import DataError
from tests.any_json import examples, json_values

GOOD = {"id": "a", "prompt": "1+2=", "label": "3"}


@pytest.fixture
def load(tmp_path, tokenizer):
    def write_and_load(*lines, name="p.jsonl", max_prompt_tokens=16, **keys):
        path = tmp_path / name
        if name.endswith("jsonl"):
            path.write_bytes(
                b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
            )
        rules = {key: keys.pop(key) for key in ("response", "whole") if key in keys}
        return open_prompts(
            [path],
            tokenizer,
            keys.pop("form", RowFormat)(**keys),
            max_prompt_tokens=max_prompt_tokens,
            **rules,
        )

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


CHAT = {**GOOD, "prompt": [{"role": "user", "content": "1"}]}
BROKEN = {
    "a syntax error": ("{% if", "TemplateSyntaxError"),
    "on purpose": ("{{ raise_exception('alternate') }}", "TemplateError: alternate"),
    "outside the sandbox": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "more than the sandbox counts": ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
    "a type error": ("{{ messages + 1 }}", "TypeError"),
    "a division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "an unknown filter": ("{{ messages | nothing }}", "TemplateAssertionError"),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "an integer of many digits": ("{{ (10**5000) | string }}", "ValueError"),
    "no template at all": (5, ""),
}


@pytest.fixture
def template(tokenizer):
    def use(text):
        tokenizer.chat_template = text

    yield use
    tokenizer.chat_template = None


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_fails_is_named_with_the_line_that_it_fails_on(load, template, name):
    text, reason = BROKEN[name]
    template(text)
    with pytest.raises(
        DataError, match=r"p.jsonl:2:prompt: the chat template fails on it \(.*; change"
    ) as raised:
        load(GOOD, {**CHAT, "id": "b"})
    assert reason in str(raised.value)


def test_a_tokenizer_without_a_template_is_named_with_the_line_and_the_remedy(load, template):
    template(None)
    with pytest.raises(DataError, match=r"p.jsonl:2:prompt: .*chat.template"):
        load(GOOD, {**CHAT, "id": "b"})


def test_a_template_without_an_end_is_ended(load, template, monkeypatch):
    template("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}1")
    monkeypatch.setattr(chat, "RENDER_SECONDS", 0.3)
    heard, (timer, _) = [], signal.getitimer(signal.ITIMER_REAL)
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    try:
        with pytest.raises(
            DataError, match=r"p.jsonl:1:prompt: the chat template does not end within 0.3 s of CPU"
        ):
            load(CHAT)
        after, _ = signal.getitimer(signal.ITIMER_REAL)
        assert timer - 60 < after <= timer, "an alarm that somebody else has set goes on"
        signal.raise_signal(signal.SIGALRM)
        assert heard == [1], "whose alarm it was before, has it again"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_template_that_the_machine_keeps_waiting_is_not_late(monkeypatch):
    """Its deadline is of its own CPU time; the control: the clock has the last word."""

    def wait():
        until = time.monotonic() + 0.5
        with chat._guarded("p"):
            while time.monotonic() < until:
                time.sleep(0.05)

    monkeypatch.setattr(chat, "RENDER_SECONDS", 0.2)
    wait()
    monkeypatch.setattr(chat, "_RENDER_WALL_SECONDS", 0.3)
    with pytest.raises(DataError, match=r"p: the chat template does not end within 0.3 s on it"):
        wait()


def test_a_template_that_makes_too_much_is_named(load, template):
    template("{{ '1' * 20000000 }}")
    with pytest.raises(DataError, match=r"p.jsonl:1:prompt: the chat template makes more than 16777216 char"):
        load(CHAT)


def test_parquet_gives_the_prompts_of_jsonl_without_what_arrow_fills_up(load, template, tmp_path):
    """Rows with other arguments in one column; the control: Arrow itself hands back a null for each."""
    template("{% for m in messages %}{{ m | tojson | length }}-{% endfor %}")
    rows = []
    for number, arguments in enumerate([{"city": "Paris"}, {"query": "x", "limit": 3}, {}]):
        call = {"function": {"name": "f", "arguments": arguments}, "tags": [{"a": 1}, {"b": 2}]}
        turns = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "1"}]
        rows.append({**GOOD, "id": str(number), "prompt": turns, "extra": {"x": arguments}})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    filled = pq.read_table(tmp_path / "p.parquet").to_pylist()[0]["prompt"][0]["tool_calls"][0]["function"]
    assert filled["arguments"]["query"] is None
    from_parquet, from_jsonl = load(name="p.parquet").prompts, load(*rows).prompts
    assert [p.text for p in from_parquet] == [p.text for p in from_jsonl]
    assert from_parquet[0].metadata == from_jsonl[0].metadata == {"extra": {"x": {"city": "Paris"}}}


def test_a_null_that_somebody_wrote_in_jsonl_stays(load):
    assert load({**GOOD, "x": {"y": None}}).prompts[0].metadata == {"x": {"y": None}}


def test_bytes_in_parquet_are_called_so(load, tmp_path):
    pq.write_table(pa.table({"prompt": ["1"], "label": [b"\xff"]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"p.parquet:1:label: a byte string; expected a value of JSON"):
        load(name="p.parquet")


def test_a_sequence_beyond_a_limit_is_named_by_line_key_and_id(load):
    sampled = Response(4, [Limit(8, "the model has 8 positions", "lower it")])
    assert len(load(GOOD, response=sampled).prompts) == 1
    message = (
        r"p.jsonl:2:prompt: prompt 'b' of 5 tokens and rollout.max_new_tokens of 4 make 9 tokens, and the "
    )
    with pytest.raises(DataError, match=message + "model has 8 positions; lower it"):
        load(GOOD, {**GOOD, "id": "b", "prompt": "1" * 5}, response=sampled)
    long = {**GOOD, "id": "b", "prompt": "1" * 5}
    assert load(GOOD, long, response=sampled, max_prompt_tokens=4).too_long == ("b",), (
        "dropped, and no matter"
    )
    label, load = (
        Response(None, [Limit(8, "the model has 8 positions", "shorten it")]),
        partial(load, form=ExampleFormat, trains_label=True),
    )
    assert len(load({**GOOD, "label": "123"}, response=label).prompts) == 1
    with pytest.raises(
        DataError, match=r"p.jsonl:1:label: prompt 'a' of 4 tokens and the label .* of 5 make 9"
    ):
        load({**GOOD, "label": "1234"}, response=label)
    with pytest.raises(DataError, match=r"p.jsonl:1:label: the tokenizer refuses it"):
        load({**GOOD, "label": "12 apples"}, response=label)
    assert load({**GOOD, "label": "12 apples"}, form=RowFormat).prompts, "which only a reward reads"


def test_a_file_of_which_next_to_nothing_is_left_is_refused(load):
    lines = [{**GOOD, "id": str(n), "prompt": "1" * 5} for n in range(19)]
    kept = load(*lines[:9], GOOD, max_prompt_tokens=4)
    assert (kept.read, len(kept.too_long), kept.examined.too_long_at[-10:]) == (10, 9, "/p.jsonl:1")
    with pytest.raises(
        DataError, match=r"p.jsonl: 19 of 20 prompts exceed 4 tokens .*; raise data.max_prompt_tok"
    ):
        load(*lines, GOOD, max_prompt_tokens=4)


keys = st.sampled_from(["id", "prompt", "label", "x", "sampling_params", "role", "content"])
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text("12")})
)


def read_or_refused(load, *lines, **keys):
    try:
        found = load(*lines, **keys)
    except DataError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert re.match(r".*p\.(jsonl|parquet)(:\d+)?(:| )", refused)
        return
    assert all(prompt.token_ids and isinstance(prompt.label_text, str) for prompt in found.prompts)
    assert found.fingerprint.count == found.read


@settings(max_examples=examples(100), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(keys, json_values() | turns, max_size=4), max_size=3), st.binary(max_size=40))
def test_any_line_of_jsonl_is_read_or_refused_with_its_place(load, template, records, content):
    template(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}{{ 1 + m.x }}{% endif %}{% endfor %}"
    )
    lines = [GOOD | record for record in records]
    for response in (None, Response(None, [Limit(9, "w", "r")]), Response(3, [Limit(9, "w", "r")])):
        read_or_refused(load, *lines, response=response)
    for line in [*records, content]:
        read_or_refused(load, GOOD, line)


@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(keys, json_values() | st.binary(max_size=4) | turns, max_size=4), max_size=3))
def test_any_row_of_parquet_is_read_or_refused_with_its_place(load, template, tmp_path, records):
    template("{% for m in messages %}{{ m.content }}{% endfor %}")
    try:
        table = pa.Table.from_pylist([GOOD | record for record in records])
        pq.write_table(table, tmp_path / "p.parquet")
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, ValueError, TypeError):
        return  # no such table
    read_or_refused(load, name="p.parquet")
    half = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "p.parquet").write_bytes(half[: len(half) // 2] + half[len(half) // 2 + 3 :])
    read_or_refused(load, name="p.parquet")


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
        ({**GOOD, "id": "b", "label": None}, r":2:label: a null"),
        ({**GOOD, "id": 7.5}, r":2:id: a number; expected a string or an integer"),
        ({**GOOD, "id": "b", "prompt": True}, r":2:prompt: a boolean; expected a string or a list"),
        ({**GOOD, "id": "b", "prompt": ""}, r":2:prompt: empty prompt"),
        ({**GOOD, "id": "b", "prompt": []}, r":2:prompt: empty list"),
        ({**GOOD, "id": "b", "prompt": [{"role": "user"}]}, r":2:prompt\[0\]: expected"),
        ({**GOOD, "id": "b", "prompt": "1z"}, r":2:prompt: the tokenizer refuses it"),
        ({**GOOD, "id": "b", "prompt": "\ud800"}, r":2:prompt: the tokenizer refuses it"),
        ({**GOOD, "sampling_params": {"top_p": 0.9}}, r":2:sampling_params: no prompt .*; remove it"),
        (b'{"id": "b", "x": ' + b"9" * 5000 + b"}", r":2: an integer of more than 4300 digits; give it as"),
        (b'{"id": "b", "x": ' + b"[" * 200 + b"]" * 200 + b"}", r":2: nested too deeply; at most 100"),
        ({**GOOD, "id": "\ud800"}, r":2:id: '\\ud800' holds half of a surrogate pair"),
        ({**GOOD, "id": "b" * 501}, r":2:id: 'bbb.* has 501 characters, and at most 500 are read; shorten"),
        (
            {
                **GOOD,
                "id": "b",
                "prompt": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}],
            },
            r":2:prompt\[1\]: ends with the assistant's turn, .*; take the turn out, or set "
            r"data.last_assistant",
        ),
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
        open_prompts([tmp_path / "absent.jsonl"], tokenizer, max_prompt_tokens=4)
    (tmp_path / "p.jsonl").unlink()
    with pytest.raises(DataError, match="Is a directory"):
        open_prompts([tmp_path], tokenizer, max_prompt_tokens=4)


@pytest.mark.parametrize(
    ("ids", "tokens"),
    [(["k" * 50_000] * 2, 16), (["\ud800" + "k" * 50_000], 16), (["k" * 50_000], 7)],
    ids=["twice", "half a pair", "beyond a limit"],
)
def test_a_message_repeats_the_beginning_of_an_id(load, ids, tokens):
    limit = Response(4, [Limit(tokens, "the model has no more", "shorten it")])
    with pytest.raises(DataError, match="kkkk") as refused:
        load(*[GOOD | {"id": name} for name in ids], response=limit)
    assert len(str(refused.value)) < 600
