"""What publishing by the `tensor` transport costs the sender beside a plain copy of the same bytes.

    python benchmarks/publish.py --python .venv-sglang/bin/python [--gib 2.0] [--rounds 5] [--out FILE.json]

One rank publishes a model of about `--gib` GiB in float32 to a real SGLang server on CPU, in 512 MiB buckets.
Three CPU times of the trainer's process, all threads, that take turns:

memcpy    the tensors copied, one after the other, into a bucket of memory that was touched before
layout    the same by the publisher's own code: its plan, and Megatron's tensors cut into Hugging Face's
publish   a whole publish, HTTP calls included, into memory that the server reads

`sender` is a publish less what cutting costs beyond copying: publish - (layout - memcpy). Medians, and the
ratio of theirs to memcpy's; fails above the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import torch

from benchmarks.outputs import output_file
from mcore_rl.model.build import build_policy
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import build_mesh
from mcore_rl.parallel.pool import spawn
from mcore_rl.rollout.fleet import Fleet
from mcore_rl.rollout.processes import LocalServer, SGLang
from mcore_rl.rollout.reply import ANY_VOCABULARY
from mcore_rl.weights.buckets import Bucket, export_of, plan_of, take_turn
from mcore_rl.weights.disk import export as export_files
from mcore_rl.weights.shared import SharedTensor

LIMIT = 1.3
BUCKET = 512 << 20
CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}
LAYER_BYTES = 4 * 2048 * (3 * 8192 + 3 * 2048)
"""of one layer: three matrices of the MLP, and attention's"""
ON_CPU = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-overlap-schedule", "--disable-cuda-graph", "--sleep-on-idle", "--skip-tokenizer-init"),
    *("--max-total-tokens", "1024", "--max-running-requests", "4", "--mem-fraction-static", "0.3"),
)


class Nowhere:
    """A channel to no server, in memory that was touched before."""

    def __init__(self) -> None:
        self.failed: dict[str, str] = {}
        self._memory = [torch.zeros(BUCKET, dtype=torch.uint8) for _ in range(2)]

    def buffer(self, number: int) -> torch.Tensor:
        """Memory for bucket `number`."""
        return self._memory[number % 2]

    def send(self, bucket: Bucket, number: int, *, last: bool) -> None:
        """Drop the bucket."""

    def close(self) -> None:
        """Keep the memory."""


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process, all threads, during one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def export(source: Path, target: Path) -> None:
    """Random weights, for the server to start on."""
    export_files(build_policy(source, build_mesh(Layout()), random_seed=0), target)


def measure(source: Path, url: str, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """Bytes of the model, and CPU seconds of every round by what was done."""
    model = build_policy(source, build_mesh(Layout()), random_seed=1)
    fleet = Fleet([url], vocabulary=ANY_VOCABULARY, timeout=600.0)
    transport = SharedTensor(BUCKET)
    tensors = [tensor.detach() for tensor in global_parameters(model.unwrapped).values()]
    host = torch.zeros(BUCKET // 4)

    def copy() -> None:
        begin = 0
        for tensor in tensors:
            begin = begin if begin + tensor.numel() <= len(host) else 0
            host[begin : begin + tensor.numel()].copy_(tensor.view(-1))
            begin += tensor.numel()

    nowhere = Nowhere()

    def layout() -> None:
        weights = export_of(model)
        take_turn(weights, plan_of(weights, BUCKET), 0, nowhere)

    times: dict[str, list[float]] = {"memcpy": [], "layout": [], "publish": []}
    for number in range(rounds + 1):
        publish = cpu_seconds(lambda number=number: transport.publish(model, fleet, str(number)))
        others = {"memcpy": cpu_seconds(copy), "layout": cpu_seconds(layout)}
        if number:  # the first one imports, and takes the memory that the others use again
            for name, seconds in (others | {"publish": publish}).items():
                times[name].append(seconds)
    return sum(tensor.nbytes for tensor in tensors), times


def main() -> int:
    """0 when the limit holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="interpreter that SGLang is installed for")
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=output_file, default=Path(f"benchmarks/publish_{date.today()}.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source = root / "config"
        source.mkdir()
        layers = max(1, round(options.gib * 2**30 / LAYER_BYTES))
        (source / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
        spawn(export, 1, source, root / "weights", timeout=900.0)
        program = SGLang(options.python, dtype="float32", options=ON_CPU)
        with LocalServer(
            root / "weights", program, log_file=root / "server.log", start_timeout=900.0
        ) as server:
            ((nbytes, times),) = spawn(measure, 1, source, server.url, options.rounds, timeout=1800.0)
    middle = {name: median(values) for name, values in times.items()}
    middle["sender"] = middle["publish"] - (middle["layout"] - middle["memcpy"])
    ratio = middle["sender"] / middle["memcpy"]
    result = {
        "date": str(date.today()),
        "machine": f"{machine.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "gib": round(nbytes / 2**30, 3),
        "bucket_mib": BUCKET >> 20,
        "cpu_seconds": {name: [round(value, 4) for value in values] for name, values in times.items()},
        "median": {name: round(value, 4) for name, value in middle.items()},
        "sender / memcpy": round(ratio, 4),
        "publish / memcpy": round(middle["publish"] / middle["memcpy"], 4),
        "limit": LIMIT,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["median"] | {name: result[name] for name in result if "/" in name}))
    return int(ratio > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
