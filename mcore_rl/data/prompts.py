"""The prompts of a run's files: opened at once, rendered and encoded one by one when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from mcore_rl.data.examples import Example, ExampleFormat, ExampleReader, Limit, check_example
from mcore_rl.data.fingerprint import (
    Fingerprint,
    fingerprint_around,
    fingerprint_form,
    fingerprint_rows,
)
from mcore_rl.data.locate import identity_of, locate
from mcore_rl.data.opening import open_table
from mcore_rl.data.reader import RowFormat, RowReader
from mcore_rl.data.tables import Records, Table
from mcore_rl.errors import ChangedFileError, DataError, MalformedRowError
from mcore_rl.terminal import quoted
from mcore_rl.types import Prompt

MOST_DROPPED = 0.9
"""Share of over-long prompts above which a file is refused. Many are a filter at work, which is said and
counted; where next to nothing is left, the limit is in another unit, or tokenizer or key are wrong ones."""
EXAMINED_CHARACTERS = 1 << 21
"""of rendered prompts, shared by the paths of a set, that are examined before a run begins: all of a file of
some thousand prompts, and the beginning of one of a million. A constant: which prompts are known to be
over-long decides the order of all"""
SPREAD = 512
"""rows of each path that are examined beyond these, evenly spread, for mistakes alone"""
_SUSPECTS = 1024
"""rows of each path, at most, that are examined because something about them looks wrong"""


_DEFAULT_FORMAT = RowFormat()


@dataclass(frozen=True)
class Response:
    """What follows a prompt in a sequence: at most so many sampled tokens, or what the row itself has."""

    sampled: int | None
    """None: rows are trained as they are (data.examples)"""
    limits: Sequence[Limit] = ()


@dataclass(frozen=True)
class Examined:
    """What was found in the rows that were read when the files were opened."""

    rows: int = 0
    longest: int = 0
    """tokens of the longest prompt that is kept"""
    too_long: tuple[str, ...] = ()
    """ids of the prompts that exceed the token limit"""
    too_long_at: str = ""
    """`file:line` of the first of them; empty where there are none"""
    without_beginning: str = ""
    """`file:line` of the first conversation that its template begins without the token (<s>, bos) that the
    tokenizer puts in front of every text; empty where there is none"""


class PromptSet:
    """The prompts of one or several paths, in file order.

    A prompt has a number, under which it is found again. Those that were examined and are over-long have
    none.
    """

    def __init__(
        self,
        records: Records,
        reader: RowReader,
        max_prompt_tokens: int,
        response: Response | None,
        examined: Examined,
        parts: Sequence[npt.NDArray[np.int64]],
    ) -> None:
        self.records, self.examined = records, examined
        self._reader, self._limit, self._response = reader, max_prompt_tokens, response
        self._rows = np.concatenate(parts)
        self.part_ends = tuple(np.cumsum([len(part) for part in parts]).tolist())
        """where the prompts of each path end, by number"""

    @property
    def read(self) -> int:
        """Rows of the files, those of over-long prompts included."""
        return len(self.records)

    @property
    def too_long(self) -> tuple[str, ...]:
        """Ids of the examined prompts that exceed the token limit."""
        return self.examined.too_long

    @property
    def prompts(self) -> Prompts:
        """All prompts, read when they are asked for."""
        return Prompts(self)

    @property
    def beginning_token(self) -> str:
        """What the tokenizer puts in front of every text; empty where it puts nothing."""
        return str(self._reader.tokenizer.decode(list(self._reader.begins_with)))

    def __len__(self) -> int:
        """Prompts that are not known to be over-long."""
        return len(self._rows)

    def first(self, count: int) -> tuple[Prompt, ...]:
        """The first `count` prompts that are not over-long; fewer where there are not as many.

        Raises:
            DataError: see find; or two of them have one id.
        """
        found, at = list[Prompt](), dict[str, int]()
        for number in range(len(self)):
            if len(found) == count:
                break
            prompt = self.find(number)
            if prompt is None:
                continue
            if at.setdefault(prompt.id, number) != number:
                raise twice(
                    self.place(number), self._reader.form.id_key, prompt.id, self.place(at[prompt.id])
                )
            found.append(prompt)
        return tuple(found)

    def row(self, number: int) -> int:
        """Where a prompt is among all rows of the files."""
        return int(self._rows[number])

    def place(self, number: int) -> str:
        """`file:line` of a prompt."""
        return self.records.place(self.row(number))

    def find(self, number: int) -> Prompt | None:
        """The prompt of a number; None where it turns out to be over-long.

        Raises:
            MalformedRowError: its row is malformed, or it exceeds a limit of the response.
        """
        row = self.row(number)
        try:
            prompt = read_row(self.records, self._reader, row)
            if len(prompt.token_ids) > self._limit:
                return None
            if self._response is not None:
                check_length(self.records.place(row), prompt, self._response, self._reader)
        except ChangedFileError:
            raise
        except DataError as error:
            raise MalformedRowError(str(error), row) from error
        return prompt

    def around(self, rows: Iterable[int]) -> str:
        """The fingerprint of all rows but these."""
        return fingerprint_around(self.records, rows)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of everything in the files and the configuration that reaches training."""
        return fingerprint_rows(self.records, self._form)

    def beginning(self, count: int) -> Fingerprint:
        """The fingerprint of the first `count` rows alone."""
        return fingerprint_rows(self.records, self._form, count)

    @cached_property
    def _form(self) -> str:
        return fingerprint_form(self._reader, self._limit)


class Prompts(Sequence[Prompt]):
    """The prompts of a set by number; iteration and slices leave out those that turn out to be over-long."""

    def __init__(self, data: PromptSet) -> None:
        self._data = data

    def __len__(self) -> int:
        """Those that are not known to be over-long."""
        return len(self._data)

    def __iter__(self) -> Iterator[Prompt]:
        found = map(self._data.find, range(len(self)))
        return (prompt for prompt in found if prompt is not None)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Prompt, ...]: ...
    def __getitem__(self, index: int | slice) -> Prompt | tuple[Prompt, ...]:
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            found = map(self._data.find, numbers)
            return tuple(prompt for prompt in found if prompt is not None)
        prompt = self._data.find(numbers)
        if prompt is None:
            raise DataError(
                f"{self._data.place(numbers)}: the prompt exceeds data.max_prompt_tokens; take it out"
            )
        return prompt


def read_row(records: Records, reader: RowReader, row: int) -> Prompt:
    """The prompt of a row, however long. Raises DataError."""
    return reader.read(records.place(row), records.record(row), records.name(row), records.default_id(row))


def open_prompts(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    form: RowFormat = _DEFAULT_FORMAT,
    *,
    max_prompt_tokens: int,
    response: Response | None = None,
    whole: bool = False,
) -> PromptSet:
    """Open the files that `paths` name (data.locate) and examine their beginning.

    Ids are unique: an id is the row's own or its line, after the file's name where there are several files.

    Args:
        whole: examine every row.

    Raises:
        DataError: `file:line:key: what, remedy` for anything malformed that was examined, files without a
        row, a
            duplicate id, a prompt that makes a sequence beyond a limit of `response`, or a path of which more
            than MOST_DROPPED is longer than `max_prompt_tokens`.
    """
    located = [locate(path) for path in paths]
    names = _names([file for one in located for file in one.files])
    tables, taken = list[tuple[Table, range, str]](), list[tuple[Path, range]]()
    ends = list[int]()
    for path, one in zip(paths, located, strict=True):
        opened = [open_table(file) for file in one.files]
        chosen = _chosen([len(table) for table in opened], one.rows)
        if not any(map(len, chosen)):
            raise DataError(f"{path}: no prompts in the file; write one JSON object per line")
        taken += zip(one.files, chosen, strict=True)
        tables += [(t, its, names[f]) for t, its, f in zip(opened, chosen, one.files, strict=True) if its]
        ends.append((ends[-1] if ends else 0) + sum(map(len, chosen)))
    _check_disjoint(taken)
    kind = ExampleReader if isinstance(form, ExampleFormat) else RowReader
    records, reader = Records(tables), kind(form, tokenizer)
    examination = _Examination(records, reader, max_prompt_tokens, response)
    characters = math.inf if whole else EXAMINED_CHARACTERS / len(paths)
    parts = [
        examination.of_path(path, range(begin, end), characters)
        for path, begin, end in zip(paths, [0, *ends], ends, strict=False)
    ]
    return PromptSet(records, reader, max_prompt_tokens, response, examination.result(), parts)


class _Examination:
    """Reads rows as a run will, and remembers what it finds."""

    def __init__(
        self, records: Records, reader: RowReader, max_prompt_tokens: int, response: Response | None
    ) -> None:
        self._records, self._reader = records, reader
        self._limit, self._response = max_prompt_tokens, response
        self._seen = dict[str, int]()
        self._too_long = list[int]()
        self._ids, self._longest, self._without = list[str](), 0, ""

    def of_path(self, path: Path, rows: range, characters: float) -> npt.NDArray[np.int64]:
        """The rows of `path` without the over-long ones among the first that have `characters` together."""
        before, shortest, last = len(self._too_long), 0, rows.start
        for row in rows:
            if characters <= 0:
                self._look_for_mistakes(range(row, rows.stop))
                break
            prompt = read_row(self._records, self._reader, row)
            characters, last = characters - len(prompt.text), row + 1
            self._note(row, prompt)
            tokens = len(prompt.token_ids)
            if tokens > self._limit:
                shortest = min(shortest or tokens, tokens)
        dropped, read = self._too_long[before:], last - rows.start
        if len(dropped) > MOST_DROPPED * read:
            how_many = "all" if len(dropped) == read else f"{len(dropped)} of"
            raise DataError(
                f"{path}: {how_many} {read} prompts exceed {self._limit} tokens (the shortest has "
                f"{shortest}); "
                "raise data.max_prompt_tokens, or take them out of the file"
            )
        return np.delete(np.arange(rows.start, rows.stop), np.array(dropped, np.int64) - rows.start)

    def _look_for_mistakes(self, rows: range) -> None:
        """Read some rows that are not kept in mind: those that look wrong, and others, evenly spread."""
        suspects = self._records.suspects(rows, self._reader.form.required_keys)
        chosen = {*_spread(suspects, _SUSPECTS), *_spread(np.arange(rows.start, rows.stop), SPREAD)}
        for row in sorted(chosen):
            prompt, place = read_row(self._records, self._reader, row), self._records.place(row)
            self._refuse_twice(place, prompt)
            if self._response is not None and len(prompt.token_ids) <= self._limit:
                check_length(place, prompt, self._response, self._reader)

    def _refuse_twice(self, place: str, prompt: Prompt) -> None:
        if prompt.id in self._seen:
            raise twice(
                place, self._reader.form.id_key, prompt.id, self._records.place(self._seen[prompt.id])
            )

    def _note(self, row: int, prompt: Prompt) -> None:
        place = self._records.place(row)
        self._refuse_twice(place, prompt)
        self._seen[prompt.id] = row
        if len(prompt.token_ids) > self._limit:
            self._too_long.append(row)
            self._ids.append(prompt.id)
            return
        self._longest = max(self._longest, len(prompt.token_ids))
        if prompt.messages and not self._without and not self._reader.begins(prompt.token_ids):
            self._without = place
        if self._response is not None:
            check_length(place, prompt, self._response, self._reader)

    def result(self) -> Examined:
        at = self._records.place(self._too_long[0]) if self._too_long else ""
        return Examined(len(self._seen), self._longest, tuple(self._ids), at, self._without)


def _spread(rows: npt.NDArray[np.int64], count: int) -> list[int]:
    """At most `count` of the rows, evenly spread; the first among them."""
    picked = np.arange(min(count, len(rows))) * len(rows) // max(1, min(count, len(rows)))
    return rows[picked].tolist()


def twice(place: str, key: str, name: str, other: str) -> DataError:
    """The error of an id that two rows have."""
    return DataError(f"{place}:{key}: {quoted(name)} is already the id at {other}; ids are unique")


def check_length(place: str, prompt: Prompt, response: Response, reader: RowReader) -> None:
    """Raises DataError where the prompt and its response do not fit together into a limit."""
    if isinstance(prompt, Example) and isinstance(reader.form, ExampleFormat):
        check_example(place, prompt, response.limits, reader.form)
        return
    follows = response.sampled or 0
    total = len(prompt.token_ids) + follows
    for limit in response.limits:
        if total > limit.tokens:
            raise DataError(
                f"{place}:{reader.form.prompt_key}: prompt {quoted(prompt.id)} of {len(prompt.token_ids)} "
                f"tokens and rollout.max_new_tokens of {follows} make {total} tokens, and {limit.what}; "
                f"{limit.remedy}"
            )


def _names(files: Sequence[Path]) -> dict[Path, str]:
    """What the ids of each file begin with: nothing for one file, else its name, or its path."""
    distinct = dict.fromkeys(files)
    names = [file.name for file in distinct]
    if len(distinct) == 1:
        return dict.fromkeys(distinct, "")
    return {file: str(file) if names.count(file.name) > 1 else file.name for file in distinct}


def _check_disjoint(taken: Sequence[tuple[Path, range]]) -> None:
    """Raises DataError where rows of a file are taken twice."""
    rows_of = dict[object, list[range]]()
    for file, rows in taken:
        known = rows_of.setdefault(identity_of(file), [])  # a link is no other file
        for other in known:
            if max(rows.start, other.start) < min(rows.stop, other.stop):
                raise DataError(f"{file}: some of its rows are named twice in [data]; name them once")
        known.append(rows)


def _chosen(counts: Sequence[int], rows: slice) -> list[range]:
    """The rows of each file that a slice of all of them takes."""
    taken, chosen, begin = range(sum(counts))[rows], list[range](), 0
    for count in counts:
        chosen.append(range(max(taken.start - begin, 0), min(taken.stop - begin, count)))
        begin += count
    return chosen
