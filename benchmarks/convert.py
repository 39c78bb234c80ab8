"""Memory and speed of `mcore-rl convert` on a generated Llama checkpoint, both ways, and that it is bitwise.

    python benchmarks/convert.py [--layers 10] [--shard-gb 0.5] [--dir DIR] [--out FILE.json]

Each direction is a process of its own, watched from outside: `peak_anonymous` is the largest RssAnon seen in
/proc, sampled every 2 ms, in bytes; pages of the files themselves do not count. `limit` is twice the largest
shard plus 1 GiB, and the command fails above it. The generated files are removed at the end.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.outputs import output_file
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.files import SafetensorsWriter, hf_reader
from mcore_rl.model.hf.parameters import ParameterMap

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
GIB = 1 << 30


def generate(directory: Path, layers: int, shard_bytes: float) -> None:
    """Random finite bf16 weights, |x| < 2, in an index of safetensors files."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    arch = read_architecture(directory)
    shapes = ParameterMap(arch, arch.vocab).hf_shapes()
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if held + size > shard_bytes and shards[-1]:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsWriter(directory / file, {n: (shapes[n], torch.bfloat16) for n in names}) as out:
            for name in names:
                bits = torch.randint(-(1 << 15), 1 << 15, shapes[name], dtype=torch.int16)
                out.write(name, bits.bitwise_and_(~0x4000).view(torch.bfloat16))
                weight_map[name] = file
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def watched(*arguments: str) -> dict[str, Any]:
    """Run `mcore-rl convert ARGUMENTS --json`; its summary, with the peak of its anonymous memory."""
    command = [sys.executable, "-m", "mcore_rl", "convert", *arguments, "--json"]
    begin, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines: list[str] = []
        drain = threading.Thread(target=lambda: lines.extend(process.stdout or []))
        drain.start()
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.002)
        drain.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(lines[-1]) | {
        "peak_anonymous": peak,
        "wall_seconds": round(time.monotonic() - begin, 1),
    }


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes; 0 once it has ended."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def same(one: Path, other: Path) -> bool:
    """All tensors of two HF directories are equal."""
    arch = read_architecture(one)
    mapping = ParameterMap(arch, arch.vocab)
    left, right = hf_reader(one, mapping), hf_reader(other, mapping)
    return all(torch.equal(left(name), right(name)) for name in mapping.hf_shapes())


def largest(directory: Path, pattern: str) -> int:
    """Bytes of the largest file."""
    return max(path.stat().st_size for path in directory.glob(pattern))


def main() -> int:
    """Measure, write the json, fail above the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--shard-gb", type=float, default=0.5)
    parser.add_argument("--dir", type=Path, help="for some 15 GB (default: a temporary directory)")
    parser.add_argument("--out", type=output_file)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="convert_", dir=arguments.dir))
    hf, mcore, back = (root / name for name in ("hf", "mcore", "back"))
    try:
        generate(hf, arguments.layers, arguments.shard_gb * 1e9)
        shard = largest(hf, "*.safetensors")
        runs = [
            watched("hf-to-mcore", str(hf), str(mcore)),
            watched("mcore-to-hf", str(mcore), str(back), "--shard-gb", str(arguments.shard_gb)),
        ]
        equal = same(hf, back)
    finally:
        shutil.rmtree(root)
    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "checkpoint_bytes": runs[0]["bytes"],
        "largest_shard": shard,
        "limit": 2 * shard + GIB,
        "bitwise": equal,
        "runs": [{name: value for name, value in run.items() if name != "source"} for run in runs],
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if equal and all(run["peak_anonymous"] <= result["limit"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
