"""Memory that another process opens by name: what SGLang unpickles; nothing is left behind."""

from __future__ import annotations

import base64
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mcore_rl.errors import ConfigError
from mcore_rl.weights.buckets import Bucket, Slot
from mcore_rl.weights.shared import SharedBytes, serialize

READER = """
import base64, pickle, sys
found = pickle.loads(base64.b64decode(sys.stdin.read()))
data, (one, two) = found["flattened_tensor"], found["metadata"]
print(data.sum().item(), data.numel(), one.name, one.end_idx, two.start_idx, two.dtype, tuple(two.shape))
"""
BUCKET = Bucket(0, (), (Slot("one", (2, 2), torch.float32, 0), Slot("two", (3,), torch.bfloat16, 16)))


def files(memory: SharedBytes) -> list[Path]:
    """Its own: other runs on the machine have some too."""
    return sorted(Path("/dev/shm").glob(f"*{memory._path.name}*"))


@pytest.mark.slow
def test_another_process_reads_what_was_written_and_closing_removes_it(tmp_path: Path) -> None:
    memory = SharedBytes(100_000)
    memory.data[:22] = 3
    for user in range(2):  # the first one's daemon removes its name when it has ended
        payload = serialize(BUCKET, memory.handle(BUCKET.nbytes, user))
        out = tmp_path / "out"  # a file: a daemon of torch that a user starts holds its streams
        with out.open("w") as stream:
            command = [sys.executable, "-c", READER]
            subprocess.run(command, input=payload, stdout=stream, text=True, timeout=100, check=True)
        assert out.read_text() == "66 22 one 16 16 torch.bfloat16 (3,)\n"
    first = files(memory)
    memory.renew(keep=True)  # as after a server gave no answer: what it was told of stays
    assert files(memory) == first
    memory.handle(1, 1)
    assert len(files(memory)) == len(first) + 1, "a name that was handed out was used again"
    memory.renew(keep=False)
    assert files(memory) == first
    memory.close()
    memory.close()
    assert files(memory) == []


def test_the_payload_names_nothing_that_sglang_does_not_allow() -> None:
    """Exactly these, so that neither side needs a class of the other (SafeUnpickler of 0.5.21 to 0.5.23)."""
    memory = SharedBytes(100)
    names = set()

    class Listing(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            names.add((module, name))
            return super().find_class(module, name)

    Listing(io.BytesIO(base64.b64decode(serialize(BUCKET, memory.handle(22, 0))))).load()
    memory.close()
    assert names == {
        ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
        ("torch.multiprocessing.reductions", "rebuild_typed_storage"),
        ("torch.multiprocessing.reductions", "rebuild_tensor"),
        ("torch.storage", "UntypedStorage"),
        ("torch", "Tensor"),
        ("torch", "Size"),
        ("torch", "uint8"),
        ("torch", "float32"),
        ("torch", "bfloat16"),
        ("types", "SimpleNamespace"),
    }


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed_by_the_next_one() -> None:
    code = (
        "import os; from mcore_rl.weights.shared import SharedBytes as S; m = S(9); "
        "print(m._path, flush=True); os._exit(1)"
    )
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, timeout=100, check=False, stdout=subprocess.PIPE, text=True)
    left = Path(run.stdout.strip())
    assert left.name.startswith("mcore_rl_")
    living = SharedBytes(9)
    assert not left.exists()
    SharedBytes(9).close()
    assert len(files(living)) == 1, "one that is in use was removed"
    living.close()


def test_too_little_shared_memory_is_an_error_with_the_remedy() -> None:
    """Without it, the first write to what is not there would end the process."""
    with pytest.raises(ConfigError, match=r"publish\.bucket_mib"):
        SharedBytes(1 << 50)
    assert list(Path("/dev/shm").glob(".mcore_rl_*")) == []
