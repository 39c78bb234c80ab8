"""The directory of an evaluation: what was asked, every sample as it comes, and the results.

settings.json          what was asked of which weights; an evaluation that was cut off goes on by it
NAME.partial.jsonl     the samples that there are, while the set is being sampled
NAME.jsonl             all samples of a set, in the order of its prompts
results.json           all numbers; written last
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcore_rl import strict_json
from mcore_rl.directories import append_line, check_free, locked, mark, storage_error, write_whole
from mcore_rl.errors import ConfigError, DataError
from mcore_rl.training.evaluation_sets import EvalSet, Record, as_lines

REMEDY = "name another directory with --out"
_SETTINGS, RESULTS = "settings.json", "results.json"


@contextmanager
def open_evaluation(directory: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold `directory`, new, or where an evaluation by the same `settings` was cut off or has ended.

    Raises:
        ConfigError: it holds what something else wrote, or another evaluation.
        StorageError: another process evaluates there, or it cannot be written.
    """
    check_free(directory, REMEDY, kind="evaluation")
    with locked(directory, REMEDY):
        try:
            mark(directory, "evaluation")
        except OSError as error:
            raise storage_error(directory, error, remedy=REMEDY) from error
        path = directory / _SETTINGS
        known = _read(path) if path.exists() else None
        if known is not None and known != json.loads(json.dumps(settings)):
            differing = [key for key in settings if known.get(key) != json.loads(json.dumps(settings[key]))]
            raise ConfigError(
                f"{directory} holds an evaluation of other {', '.join(differing) or 'settings'}; {REMEDY}"
                ", or remove it"
            )
        if known is None:
            write_whole(path, json.dumps(settings, indent=1) + "\n")
        yield


def results_of(directory: Path) -> dict[str, Any] | None:
    """The results of an evaluation that has ended there."""
    path = directory / RESULTS
    return _read(path) if path.exists() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = strict_json.parse(path.read_bytes())
    except (OSError, strict_json.JsonError) as error:
        raise DataError(f"{path}: {error}; remove the directory, or {REMEDY}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not an object; remove the directory, or {REMEDY}")
    return content


class SampleFile:
    """The samples of one set, as they come."""

    def __init__(self, directory: Path, one: EvalSet) -> None:
        """Those of an earlier attempt are taken, of prompts that were sampled as often as is asked."""
        self._one, self._whole = one, directory / f"{one.name}.jsonl"
        self._partial = directory / f"{one.name}.partial.jsonl"
        path = self._whole if self._whole.exists() else self._partial
        found: dict[str, list[Record]] = defaultdict(list)
        for record in _lines(path) if path.exists() else ():
            found[record["prompt_id"]].append(record)
        self._records = {prompt: its for prompt, its in found.items() if len(its) == one.samples}
        if len(self._records) < len(found):  # the others are asked again, and would be there twice
            write_whole(self._partial, as_lines(self.records))

    @property
    def records(self) -> list[Record]:
        """In the order of the set's prompts."""
        order = [prompt.id for prompt in self._one.prompts if prompt.id in self._records]
        return [record for prompt in order for record in self._records[prompt]]

    @property
    def sampled(self) -> set[str]:
        """Ids of the prompts that are done."""
        return set(self._records)

    def add(self, records: Sequence[Record]) -> None:
        """Keep the records of prompts that are done now. Raises StorageError; what was there stays."""
        if records:
            append_line(self._partial, as_lines(records).encode())
        for record in records:
            self._records.setdefault(record["prompt_id"], []).append(record)

    def finish(self) -> None:
        """All are there: the file takes its name."""
        write_whole(self._whole, as_lines(self.records))
        self._partial.unlink(missing_ok=True)


def _lines(path: Path) -> Iterator[Record]:
    """The records of a file; a line that a crash cut is none."""
    for line in path.read_bytes().splitlines():
        try:
            record = strict_json.parse(line)
        except strict_json.JsonError:
            continue
        if isinstance(record, dict) and isinstance(record.get("prompt_id"), str):
            yield record
