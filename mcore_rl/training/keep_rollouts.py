"""Keeps every N-th step of a run on disk: its groups, and once they are trained, what came of them.

The main rank writes, all ranks call. A step that is not due costs a comparison of two numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mcore_rl.data.cursor import PromptCursor
from mcore_rl.directories import Kind, mark, storage_error, write_whole
from mcore_rl.dumps.directory import NAME, dumped_steps, remove, trained_file, write_groups
from mcore_rl.dumps.rollouts import Words, dump_bytes
from mcore_rl.dumps.trained import TrainedTokens, trained_bytes
from mcore_rl.parallel.control import on_main
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.training.recorder import Recorder
from mcore_rl.training.trainer import decode_with
from mcore_rl.types import Group


@dataclass(frozen=True)
class DumpWriter:
    """Writes the dumps of a run; every rank has one."""

    run_dir: Path
    every: int
    """steps between two dumps; 0 writes none"""
    keep: int | None
    """newest steps that stay; None: all"""
    mesh: Mesh
    temperature: float
    cursor: PromptCursor
    words: Words

    def due(self, step: int) -> bool:
        """Whether `step` is kept."""
        return self.every > 0 and step % self.every == 0

    def write(self, step: int, groups: Sequence[Group]) -> None:
        """Keep the scored groups of `step`, if it is due; collective. Raises StorageError on every rank."""
        if not self.due(step):
            return

        def work() -> None:
            cursor = self.cursor.state()
            content = dump_bytes(step, groups, temperature=self.temperature, cursor=cursor, words=self.words)
            write_groups(self.run_dir / NAME, step, content, self.keep)

        on_main(self.mesh, work)

    def write_trained(self, step: int, recorder: Recorder, tokens: TrainedTokens) -> None:
        """Keep what the trainer made of the groups of `step`; collective. Raises as `write`."""
        path = trained_file(self.run_dir / NAME, step)
        work = lambda: write_whole(path, trained_bytes(recorder.ids, recorder.ends, tokens))  # noqa: E731
        on_main(self.mesh, work)


def words_of(tokenizer: PreTrainedTokenizerBase) -> Words:
    """Texts of responses and of single tokens."""
    return Words(
        lambda ids: decode_with(tokenizer, ids),
        lambda id: str(tokenizer.decode([id], skip_special_tokens=False)),
    )


def open_dumps(run_dir: Path, kind: Kind, *, after: int) -> None:
    """RUN_DIR/rollouts, marked as of this kind, without the dumps of steps beyond `after`.

    Raises:
        StorageError: it cannot be written.
    """
    directory = run_dir / NAME
    try:
        directory.mkdir(exist_ok=True)
        mark(directory, kind)
    except OSError as error:
        raise storage_error(directory, error) from error
    remove(directory, [step for step in dumped_steps(directory) if step > after])
