"""What a prompt file of a million rows costs a rank: to open, to fingerprint, and per prompt that is drawn.

Run: python benchmarks/data.py [--rows 1000000] [--kind jsonl|jsonl.gz|parquet|saved ...]

Files are made in a temporary directory, one kind after the other, and each measurement is of a process of its
own. The exit code is 1 where a file of a million rows takes more than 5 CPU-seconds to open, or 200 bytes of
memory per row.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DRAWN = 2048
"""prompts of one step"""
KINDS = ("jsonl", "jsonl.gz", "parquet", "saved")
OPEN_SECONDS, ROW_BYTES = 5.0, 200.0
"""the limits"""


def rows(count: int):
    """Rows of a chat with a label, about 260 bytes each."""
    words = "Think step by step, then give the number. " * 3
    for n in range(count):
        prompt = [{"role": "user", "content": f"What is {n} plus {7 * n}? {words}"}]
        yield {"id": f"p{n}", "prompt": prompt, "label": str(8 * n), "data_source": "sums"}


def write(path: Path, count: int) -> None:
    """The file of `count` rows, of the kind that its name says."""
    lines = (json.dumps(row) + "\n" for row in rows(count))
    if path.suffix == ".gz":
        with gzip.open(path, "wt", compresslevel=4) as packed:
            packed.writelines(lines)
        return
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            file.writelines(lines)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows(count)))
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    path.mkdir()
    with pa.ipc.new_stream(path / "data.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)  # as `datasets` does
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))


def memory(field: str) -> int:
    """Bytes of this process that /proc calls so."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(path: Path) -> bool:
    """Print what opening, fingerprinting and drawing cost this process; whether it is within the limits."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from mcore_rl.data.cursor import PromptCursor
    from mcore_rl.data.prompts import open_prompts

    if path.suffix in (".parquet", ".saved"):
        import pyarrow.parquet  # noqa: F401  (its libraries are no memory of the rows)
    vocabulary = {chr(code): code - 32 for code in range(32, 127)} | {"<eos>": 95}
    inner = Tokenizer(models.WordLevel(vocabulary))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    resident, found = memory("VmRSS"), {}

    def timed(name: str, work):
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        found[name] = (time.process_time() - cpu, time.perf_counter() - wall)
        return result

    data = timed("open", lambda: open_prompts([path], tokenizer, max_prompt_tokens=512))
    timed("fingerprint", lambda: data.fingerprint)
    cursor = PromptCursor(data, 0)
    timed(f"draw {DRAWN}", lambda: cursor.next(DRAWN))
    cursor.keep(())
    timed(f"draw {DRAWN} more", lambda: cursor.next(DRAWN))
    cursor.keep(())
    kind = path.name.partition(".")[2]
    for name, (cpu, wall) in found.items():
        print(f"{kind:8} {name:16} {cpu:6.2f} CPU-seconds {wall:6.2f} s")
    of_row = (memory("VmRSS") - resident) / data.read
    print(f"{kind:8} {'resident':16} {of_row:6.1f} bytes a row of {data.read}")
    return found["open"][0] < OPEN_SECONDS and (of_row < ROW_BYTES or data.read < 1_000_000)


def main() -> int:
    """Make each file and measure it in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return int(not measure(arguments.measure))
    held = True
    for kind in arguments.kind:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"rows.{kind}"
            write(path, arguments.rows)
            held &= subprocess.run([sys.executable, __file__, "--measure", path]).returncode == 0
    return int(not held)


if __name__ == "__main__":
    sys.exit(main())
