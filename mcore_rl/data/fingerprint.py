"""What tells one set of prompts from another, so that a resumed run goes on with the data that it had."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from mcore_rl.data.reader import RowFormat, RowReader
from mcore_rl.data.tables import Records
from mcore_rl.types import Prompt

_HEX = 16
"""characters of a digest"""


@dataclass(frozen=True)
class Fingerprint:
    """A set of rows and what makes prompts of them; digests in hex."""

    count: int
    """rows, over-long ones included"""
    content: str
    """of the rows in order, as the files hold them"""
    unordered: str
    """of the same in any order"""
    form: str
    """of all that decides how a row becomes tokens: tokenizer, chat template, keys and limits"""


def fingerprint_rows(records: Records, form: str, count: int | None = None) -> Fingerprint:
    """The fingerprint of the first `count` rows (None: all), which are read once."""
    count = len(records) if count is None else count
    rows = records.digests(range(count))
    total = int(np.sum(rows, dtype=np.uint64))  # modulo 2^64; rows that are there twice count
    content, unordered = hashlib.sha256(rows.tobytes()), hashlib.sha256(total.to_bytes(8, "big"))
    return Fingerprint(count, content.hexdigest()[:_HEX], unordered.hexdigest()[:_HEX], form)


@dataclass(frozen=True)
class BadRows:
    """Rows that were found malformed one after another, and what else there was."""

    rows: tuple[int, ...]
    contents: tuple[str, ...]
    """`Fingerprint.content` of the whole, before each of them was mended"""
    around: str
    """`fingerprint_around` them, which mending does not change"""


def fingerprint_around(records: Records, rows: Iterable[int]) -> str:
    """A digest of all rows but these, as the files hold them."""
    edges = [-1, *sorted(rows), len(records)]
    parts = [records.digests(range(before + 1, after)) for before, after in pairwise(edges)]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:_HEX]


def fingerprint_form(reader: RowReader, max_prompt_tokens: int) -> str:
    """The digest of all that decides how a row becomes tokens."""
    tokenizer = reader.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = sorted(tokenizer.get_vocab().items())
    parts = {
        "tokenizer": vocabulary if backend is None else _without_state(json.loads(backend.to_str())),
        "template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "format": _of_form(reader.form),
        "max_prompt_tokens": max_prompt_tokens,
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:_HEX]


def _of_form(form: RowFormat) -> dict[str, object]:
    """The keys of a form; one that has the meaning of earlier versions is left out, so that it is theirs."""
    keys = asdict(form) | {"needs_label": None}
    earlier = {"target": "label"} | ({} if form.choice_key else {"choice_key": "", "choices": form.choices})
    return {key: value for key, value in keys.items() if key not in earlier or value != earlier[key]}


def _without_state(backend: dict[str, object]) -> dict[str, object]:
    """A tokenizer without what a call to it leaves behind."""
    return {name: value for name, value in backend.items() if name not in ("truncation", "padding")}


@dataclass(frozen=True)
class RenderedFingerprint:
    """What checkpoints of earlier versions hold: of prompts as they were rendered."""

    count: int
    ids: str
    content: str
    unordered: str


def fingerprint_rendered(prompts: Iterable[Prompt]) -> RenderedFingerprint:
    """The fingerprint that earlier versions took of their prompts; renders all of them."""
    ids, content, total, count = hashlib.sha256(), hashlib.sha256(), 0, 0
    for prompt in prompts:
        ids.update((b"\0" if count else b"") + prompt.id.encode(errors="surrogatepass"))
        row = _digest(prompt)
        content.update(row)
        total += int.from_bytes(row, "big")
        count += 1
    unordered = hashlib.sha256(total.to_bytes(64, "big"))
    return RenderedFingerprint(count, *(digest.hexdigest()[:_HEX] for digest in (ids, content, unordered)))


def _digest(prompt: Prompt) -> bytes:
    metadata = json.dumps(prompt.metadata, sort_keys=True, default=str) if prompt.metadata else ""
    texts = [
        part.encode(errors="surrogatepass") for part in (prompt.id, prompt.text, prompt.label_text, metadata)
    ]
    parts = [array("q", prompt.token_ids).tobytes(), *texts]
    return hashlib.sha256(b"".join([array("q", map(len, parts)).tobytes(), *parts])).digest()
