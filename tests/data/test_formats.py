"""Files as verl, slime, TRL, OpenRLHF and `datasets` document them, read unchanged."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mcore_rl.data.cursor import PromptCursor
from mcore_rl.data.prompts import open_prompts
from mcore_rl.data.reader import RowFormat
from mcore_rl.errors import DataError

CHAT = "{% for m in messages %}{{ m.content }}{% if not loop.last %}-{% endif %}{% endfor %}"
CHAT += "{% if tools %}={{ tools | length }}{% endif %}{% if enable_thinking is false %}b{% endif %}"
CHAT += "{% if add_generation_prompt %}a{% endif %}"


@pytest.fixture
def read(tmp_path, tokenizer):
    """The prompts of rows in a file of a kind; the chat template writes a turn as its content."""
    tokenizer.chat_template = CHAT

    def of(rows, kind="jsonl", **form):
        path = tmp_path / f"train.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            text = "".join(json.dumps(row) + "\n" for row in rows).encode()
            path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
        return list(open_prompts([path], tokenizer, RowFormat(**form), max_prompt_tokens=64).prompts)

    yield of
    tokenizer.chat_template = None


def user(text):
    return [{"role": "user", "content": text}]


def verl_row(index, truth):
    return {
        "data_source": "openai/gsm8k",
        "prompt": user(f"{index}+1="),
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "train", "index": index},
    }


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
def test_verl(read, kind):
    """Prepare Data for Post-Training: parquet with five fields."""
    form = {"label_key": "reward_model.ground_truth", "id_key": "extra_info.index"}
    first, second = read([verl_row(0, "1"), verl_row(1, "2")], kind, **form)
    assert (first.id, first.text, first.label) == ("0", "0+1=a", "1")
    assert second.metadata["data_source"] == "openai/gsm8k"
    assert second.metadata["reward_model"] == {"style": "rule", "ground_truth": "2"}
    assert second.messages == user("1+1=")


def test_slime(read, tmp_path, tokenizer):
    """--input-key, --label-key, --apply-chat-template, and rows of a path by `@[a:b]`."""
    rows = [{"input": f"{n}=", "label": str(n), "metadata": {"level": n}} for n in range(9)]
    plain = read(rows, prompt_key="input")
    assert [(p.text, p.label, p.metadata) for p in plain[:1]] == [("0=", "0", {"metadata": {"level": 0}})]
    assert read(rows, prompt_key="input", apply_chat_template=True)[3].text == "3=a"
    for rows_of, ids in {"@[0:2]": "12", "@[-2:]": "89", "@[3:-4]": "45", "@[:]": "123456789"}.items():
        path = tmp_path / f"train.jsonl{rows_of}"
        found = open_prompts([path], tokenizer, RowFormat(prompt_key="input"), max_prompt_tokens=8).prompts
        assert [p.id for p in found] == list(ids)
    with pytest.raises(DataError, match="no prompts in the file"):
        open_prompts([tmp_path / "train.jsonl@[9:]"], tokenizer, max_prompt_tokens=8)


def test_trl_prompt_only_and_prompt_completion(read):
    """Dataset formats and types: standard and conversational."""
    assert [p.label for p in read([{"prompt": "1"}], label_key="")] == [""]
    assert read([{"prompt": user("1"), "solution": "2"}], label_key="solution")[0].label == "2"
    (tools,) = read([{"prompt": user("1"), "tools": [{"name": "f"}], "label": ""}])
    assert tools.text == "1=1a"
    rows = [{"prompt": user("1="), "completion": [{"role": "assistant", "content": "2"}]}]
    with pytest.raises(DataError, match=r"jsonl:1:completion: .* writes the prompt in another way"):
        read(rows, label_key="completion", trains_label=True, renders_label=True)
    with pytest.raises(DataError, match=r"jsonl:1:completion: a list; expected a string"):
        read([{"prompt": user("1="), "completion": ["2"]}], label_key="completion", trains_label=True)
    with pytest.raises(DataError, match=r"jsonl:1:completion: a number; expected a string"):
        read([{"prompt": user("1="), "completion": 2}], label_key="completion", trains_label=True)
    held_out = {"label_key": "completion", "renders_label": True}
    assert [p.label for p in read([{"prompt": "1", "completion": [2]}], **held_out)] == [[2]]


def test_trl_language_modeling_is_trained_on_its_last_turn(read):
    turns = [*user("1+1="), {"role": "assistant", "content": "2"}]
    (prompt,) = read([{"messages": turns}], prompt_key="messages", last_assistant="drop", trains_label=True)
    assert (prompt.text, prompt.label) == ("1+1=a", "2")


def test_openrlhf(read):
    """--input_key input --label_key output, and --apply_chat_template."""
    rows = [{"input": "1+1=", "output": "2"}]
    assert [(p.text, p.label) for p in read(rows, prompt_key="input", label_key="output")] == [("1+1=", "2")]
    (chat,) = read(rows, prompt_key="input", label_key="output", apply_chat_template=True, system="12")
    assert chat.text == "12-1+1=a"


def saved(directory, *batches):
    """A directory as `Dataset.save_to_disk` writes it: Arrow streams and state.json."""
    directory.mkdir(parents=True)
    names = [f"data-{n:05}-of-{len(batches):05}.arrow" for n in range(len(batches))]
    for name, rows in zip(names, batches, strict=True):
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(str(directory / name), table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_format_type": None}
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "dataset_info.json").write_text("{}")


def test_a_saved_dataset(tmp_path, tokenizer, read):
    saved(tmp_path / "d" / "train", [verl_row(0, "1")], [verl_row(1, "2")])
    form = RowFormat(label_key="reward_model.ground_truth")
    found = open_prompts([tmp_path / "d" / "train"], tokenizer, form, max_prompt_tokens=8).prompts
    assert [(p.id, p.text, p.label) for p in found] == [("1", "0+1=a", "1"), ("2", "1+1=a", "2")]
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"several saved datasets, \['train', 'test'\]; name one, as in"):
        open_prompts([tmp_path / "d"], tokenizer, form, max_prompt_tokens=8)
    (tmp_path / "d" / "train" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state.json: .* is not what datasets saves; save the dataset again"):
        open_prompts([tmp_path / "d" / "train"], tokenizer, form, max_prompt_tokens=8)


def test_folders_globs_and_several_files(tmp_path, tokenizer):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(f'\n{{"prompt": "1", "label": "{name}"}}\n')
    (tmp_path / "README.md").write_text("words")
    for paths in ([tmp_path], [tmp_path / "*.jsonl"], [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]):
        found = open_prompts(paths, tokenizer, max_prompt_tokens=8)
        assert [(p.id, p.label) for p in found.prompts] == [("a.jsonl:2", "a"), ("b.jsonl:2", "b")]
    with pytest.raises(DataError, match="no file matches; check the pattern"):
        open_prompts([tmp_path / "*.parquet"], tokenizer, max_prompt_tokens=8)
    with pytest.raises(DataError, match="some of its rows are named twice"):
        open_prompts([tmp_path / "a.jsonl", tmp_path / "a.jsonl@[0:1]"], tokenizer, max_prompt_tokens=8)


@pytest.mark.parametrize("weights", [(3, 1), (0.3, 0.7), (1, 1, 1), (5, 2, 2, 1)])
def test_a_mixture_gives_exact_quotas_in_every_step(tmp_path, tokenizer, weights):
    paths = [tmp_path / f"{n}.jsonl" for n in range(len(weights))]
    for path in paths:
        path.write_text('{"prompt": "1", "label": ""}\n' * 9)
    data = open_prompts(paths, tokenizer, max_prompt_tokens=8)
    cursor, total, drawn = PromptCursor(data, 0, weights), 0, [0] * len(weights)
    for _ in range(30):
        for prompt in cursor.next(10):
            drawn[int(prompt.id.split(".")[0])] += 1
            total += 1
            for count, weight in zip(drawn, weights, strict=True):
                assert abs(count - total * weight / sum(weights)) < 1
    after = PromptCursor(data, 0, weights)
    after.restore(json.loads(json.dumps(cursor.state())))
    assert [p.id for p in after.next(10)] == [p.id for p in cursor.next(10)]
    with pytest.raises(DataError, match=r"walked .* parts of its data, this one 1"):
        PromptCursor(data, 0).restore(cursor.state())


@pytest.mark.parametrize("label", [4, 4.5, True, ["4", 5], {"a": {"b": None}}, ""])
def test_a_label_is_any_value_of_json(read, label):
    (prompt,) = read([{"prompt": "1", "label": label}])
    assert prompt.label == label
    assert prompt.label_text == (label if isinstance(label, str) else json.dumps(label))


def test_content_of_parts_and_none_beside_tool_calls(read):
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "+"}]
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    turns = [{"role": "user", "content": parts}, calls, {"role": "tool", "content": "2"}]
    assert [p.text for p in read([{"prompt": turns, "label": ""}])] == ["1+--2a"]
    picture = [{"role": "user", "content": [{"type": "image", "image": "x"}]}]
    with pytest.raises(DataError, match=r":1:prompt\[0\].content\[0\]: a part of type 'image'"):
        read([{"prompt": picture, "label": ""}])
    with pytest.raises(DataError, match=r":1:prompt\[0\]: expected .* the content is a null"):
        read([{"prompt": [{"role": "assistant", "content": None}], "label": ""}])


def test_the_last_turn_of_the_assistant_is_refused_dropped_or_continued(read):
    rows = [{"prompt": [*user("1"), {"role": "assistant", "content": "2"}], "label": "3"}]
    with pytest.raises(DataError, match="ends with the assistant's turn"):
        read(rows)
    with pytest.raises(DataError, match=r'set supervised.target to "all" or "last"'):
        read(rows, trains_label=True)
    assert [(p.text, p.label) for p in read(rows, last_assistant="drop")] == [("1a", "3")]
    assert read([{"prompt": rows[0]["prompt"]}], last_assistant="drop")[0].label == "2"
    assert [p.text for p in read(rows, last_assistant="continue")] == ["1-2"]
    with pytest.raises(DataError, match="nothing but turns of the assistant"):
        read([{"prompt": rows[0]["prompt"][1:], "label": ""}], last_assistant="drop")


def test_a_row_comes_before_the_run(read):
    run = {"system": "0", "tools": [{}, {}], "chat_template_kwargs": {"enable_thinking": False}}
    own = {"system": "9", "tools": json.dumps([{}]), "chat_template_kwargs": {"enable_thinking": True}}
    row = {"prompt": user("1"), "label": ""}
    assert [p.text for p in read([row, row | own], **run)] == ["0-1=2ba", "9-1=1a"]
    first = {"role": "system", "content": "5"}
    assert read([row | {"prompt": [first, *user("1")]}], system="0")[0].text == "5-1a"
    wrong = {"tools": [3], "system": 1, "chat_template_kwargs": {"tokenize": True}}
    for key, bad in wrong.items():
        with pytest.raises(DataError, match=rf":1:{key}"):
            read([row | {key: bad}])
    for key, value in own.items():
        with pytest.raises(DataError, match=rf":1:{key}: has no effect on a prompt that is a string; set"):
            read([row | {"prompt": "1", key: value}])
    with pytest.raises(DataError, match=r"data.system: has no effect on a prompt that is a string"):
        read([row | {"prompt": "1"}], system="0")


def test_what_a_tokenizer_puts_in_front_of_texts_is_there_once(tmp_path, tokenizer):
    from tokenizers import processors

    inner = tokenizer.backend_tokenizer
    before, path = inner.post_processor, tmp_path / "p.jsonl"
    inner.post_processor = processors.TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)]
    )
    tokenizer.chat_template = CHAT
    try:
        rows = [{"prompt": prompt, "label": ""} for prompt in ("1", "<pad>1", user("1"))]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = open_prompts([path], tokenizer, max_prompt_tokens=8)
        assert [p.token_ids for p in found.prompts] == [(0, 3), (0, 3), (3, 14 + 1)]
        assert found.examined.without_beginning == f"{path}:3"
        assert found.beginning_token == "<pad>"
    finally:
        inner.post_processor, tokenizer.chat_template = before, None
