"""RUN_DIR/bad_rows.json: rows that ended a run, so that it goes on once they are mended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from mcore_rl import strict_json
from mcore_rl.data.fingerprint import BadRows
from mcore_rl.data.prompts import PromptSet
from mcore_rl.directories import write_whole
from mcore_rl.errors import MalformedRowError, StorageError

_FILE = "bad_rows.json"


@contextmanager
def noting_bad_rows(run_dir: Path, data: PromptSet, *, is_main: bool) -> Iterator[None]:
    """Write down which row of the training prompts ends the run inside, if one does."""
    try:
        yield
    except MalformedRowError as error:
        if is_main:
            with suppress(StorageError):  # the row is what has to be said
                _note(run_dir, data, error.row)
        raise


def read_bad_rows(run_dir: Path) -> BadRows | None:
    """What was written there; None where nothing was, or nothing that can be read."""
    try:
        found = strict_json.parse((run_dir / _FILE).read_bytes())
        rows, contents = tuple(map(int, found["rows"])), tuple(map(str, found["contents"]))
        return BadRows(rows, contents, str(found["around"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _note(run_dir: Path, data: PromptSet, row: int) -> None:
    """Add the row to those that were mended before, where nothing but these was changed since."""
    content, known = data.fingerprint.content, read_bad_rows(run_dir)
    rows, contents = (row,), (content,)
    if known is not None and data.around(known.rows) == known.around:
        rows, contents = tuple({*known.rows, row}), (*known.contents, content)
    noted = BadRows(rows, contents, data.around(rows))
    write_whole(run_dir / _FILE, json.dumps(asdict(noted)) + "\n")
