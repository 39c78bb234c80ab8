"""Files as people have them: other kinds under a wrong name, links, marks of editors, values of Arrow."""

import bz2
import datetime
import gzip
import json
import lzma
import os
import zipfile

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from mcore_rl.data.prompts import open_prompts
from mcore_rl.data.reader import MAX_CHARACTERS, RowFormat
from mcore_rl.errors import DataError

LINE = b'{"prompt": "1", "label": "2"}\n'


@pytest.fixture
def read(tmp_path, tokenizer):
    """The prompts of paths in tmp_path; a first one may be written."""

    def of(*names, content=None, **form):
        if content is not None:
            (tmp_path / names[0]).write_bytes(content)
        paths = [tmp_path / name for name in names]
        return list(open_prompts(paths, tokenizer, RowFormat(**form), max_prompt_tokens=8).prompts)

    return of


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"\xef\xbb\xbf" + LINE * 2, 2),
        (LINE.replace(b"\n", b"\r\n") * 2, 2),
        (b"\n  \n" + LINE + b"\t\n" + LINE.strip(), 2),
    ],
    ids=["byte order mark", "lines of Windows", "blank lines"],
)
def test_marks_of_editors_are_no_rows(read, content, rows):
    assert [p.label for p in read("p.jsonl", content=content)] == ["2"] * rows


def zipped(tmp_path) -> bytes:
    with zipfile.ZipFile(tmp_path / "z", "w") as file:
        file.writestr("p.jsonl", LINE)
    return (tmp_path / "z").read_bytes()


def arrow(tmp_path) -> bytes:
    feather.write_feather(pa.table({"prompt": ["1"]}), str(tmp_path / "f"))
    return (tmp_path / "f").read_bytes()


def parquet(tmp_path) -> bytes:
    pq.write_table(pa.table({"prompt": ["1"]}), tmp_path / "q")
    return (tmp_path / "q").read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda _: gzip.compress(LINE), "a gzip file; call it .jsonl.gz"),
        (lambda _: bz2.compress(LINE), "a bzip2 file; unpack it"),
        (lambda _: lzma.compress(LINE), "an xz file; unpack it"),
        (zipped, "a zip file; unpack it"),
        (arrow, "an Arrow file; name the directory"),
        (parquet, "a parquet file; call it .parquet"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS; fetch the file"),
        (lambda _: b"[\n" + LINE + b"]", r":1: the file is one list of JSON; write an object per line \(jq"),
        (lambda _: LINE.decode().encode("utf-16"), "is not UTF-8; convert the file"),
        (lambda _: LINE + b"\0" * 9, ":2: not JSON"),
        (lambda _: b"prompt,label\n1,2\n", ":1: not JSON"),
        (lambda _: LINE + LINE[:-2] + b', "prompt": "3"}', ":2: the key 'prompt' is there twice"),
        (lambda _: LINE + b'{"prompt": "1", "x": {"y": 1, "y": 1}}', ":2: the key 'y' is there twice"),
        (lambda _: b'{"prompt": "1", "label": NaN}', ":1:label: a number that JSON has not, nan"),
        (lambda _: b'{"prompt": "1", "label": 1e999}', ":1:label: a number that JSON has not, inf"),
        (lambda _: b'{"prompt": "1", "label": "", "id": ""}', ":1:id: empty; give the row a name"),
        (
            lambda _: json.dumps({"prompt": '[{"role": "user", "content": "1"}]', "label": ""}).encode(),
            ":1:prompt: the JSON text of messages, .*; write the list itself",
        ),
    ],
)
def test_what_is_no_jsonl_is_called_by_its_name_with_the_remedy(read, tmp_path, content, message):
    with pytest.raises(DataError, match=r"p.jsonl.*" + message):
        read("p.jsonl", content=content(tmp_path))


def test_a_prompt_of_more_characters_than_any_model_reads_costs_no_memory(read):
    text = "1" * (MAX_CHARACTERS + 1)
    with pytest.raises(DataError, match=r"p.jsonl:2:prompt: 16777217 characters, and at most 16777216 are r"):
        read("p.jsonl", content=LINE + json.dumps({"prompt": text, "label": ""}).encode())
    assert read("p.jsonl", content=json.dumps({"prompt": "1", "label": text}).encode())


def test_what_is_no_plain_file_does_not_hang(read, tmp_path):
    os.mkfifo(tmp_path / "p.jsonl")
    for name in ("p.jsonl", "/dev/zero", "*.jsonl"):
        with pytest.raises(
            DataError, match="not a plain file, which is read from its middle; write the rows"
        ):
            read(name)


def test_a_file_counts_once_whatever_its_names(read, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_bytes(LINE)
    (tmp_path / "d" / "b.jsonl").hardlink_to(tmp_path / "d" / "a.jsonl")
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    for name in ("d", "d/*", "d/**/*.jsonl"):
        assert len(read(name)) == 1
    with pytest.raises(DataError, match=r"b.jsonl: some of its rows are named twice"):
        read("d/a.jsonl", "d/b.jsonl")
    (tmp_path / "d" / "c.jsonl").symlink_to(tmp_path / "gone")
    for name in ("d", "d/*.jsonl"):
        with pytest.raises(DataError, match=r"c.jsonl: No such file"):
            read(name)
    (tmp_path / "e" / "x.jsonl").mkdir(parents=True)
    with pytest.raises(DataError, match="Is a directory without a file"):
        read("e")
    (tmp_path / "self").symlink_to("self")
    with pytest.raises(DataError, match="self: Too many levels of symbolic links"):
        read("self")


def test_names_of_any_letters_and_slices(read, tmp_path):
    (tmp_path / "\u6570 [1]").mkdir()
    for name in ("\u6570 [1]/p\u00e9.jsonl", "p@[0:1].jsonl"):
        assert len(read(name, content=LINE * 3)) == 3
        assert len(read(f"{name}@[:2]")) == 2
    for wrong in ("@[1]", "@[::2]", "@[a:b]", "@[]"):
        with pytest.raises(DataError, match=r"rows are taken as PATH@\[START:END\], of whole numbers"):
            read(f"p@[0:1].jsonl{wrong}")


def test_columns_of_arrow_of_other_types(read, tmp_path):
    others = {
        "when": pa.array([1], pa.timestamp("ns")),
        "far": pa.array([2**62], pa.timestamp("us")),
        "day": pa.array([datetime.date(2020, 1, 1)]),
        "word": pa.array(["a"]).dictionary_encode(),
    }
    own = {"prompt": pa.array(["1"], pa.large_string()), "label": pa.array([[1]], pa.large_list(pa.int8()))}
    pq.write_table(pa.table({**own, **others}), tmp_path / "p.parquet")
    (prompt,) = read("p.parquet")
    assert prompt.label == [1]
    assert prompt.metadata["when"] == "1970-01-01 00:00:00.000000001", "which Python's datetime cannot hold"
    assert isinstance(prompt.metadata["far"], str)
    assert (prompt.metadata["day"], prompt.metadata["word"]) == (datetime.date(2020, 1, 1), "a")
    with pytest.raises(DataError, match=r"p.parquet:1:day: a date; expected a value of JSON"):
        read("p.parquet", label_key="day")
