"""The command line of `mcore-rl serve` and of `python -m mcore_rl.server`; imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mcore_rl.imports import uncollected
from mcore_rl.weight_files import check_model_directory


def add_options(parser: argparse.ArgumentParser, model: str = "MODEL_DIR") -> None:
    """Add the arguments of `server.serve`, which says what they mean in full; `model`: what is served."""
    add = parser.add_argument
    add("model_dir", type=Path, metavar=model, help="config.json, safetensors, and a tokenizer if any")
    add(
        "--host",
        default="127.0.0.1",
        help="default %(default)s; one beyond this machine needs a key",
    )
    add("--port", type=int, default=0, help="default: the system chooses; said on stderr")
    add("--api-key-env", metavar="NAME", help="environment variable of the key (default: no key is asked)")
    add("--threads", type=int, default=2, help="CPU threads of the model (default %(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    add(
        "--max-running-requests",
        type=int,
        default=1024,
        metavar="N",
        help="decoded together (%(default)s)",
    )
    add("--max-length", type=int, metavar="N", help="longest prompt plus response, in tokens")
    add(
        "--kv-tokens",
        type=int,
        metavar="N",
        help="KV cache size in tokens, and again for what sessions keep (default: 1 GiB each)",
    )
    add(
        "--random-seed",
        type=int,
        default=0,
        metavar="N",
        help="where a request brings none (%(default)s)",
    )
    add("--address-file", type=Path, metavar="FILE", help="holds the address while the server answers")
    add("--max-body-mib", type=int, metavar="N", help="longest request body (default: that of a full batch)")


def run_server(arguments: argparse.Namespace, extend: Any = None) -> int:
    """Serve by these arguments, until SIGTERM or SIGINT; errors as `server.serve`, and `extend` too."""
    check_model_directory(arguments.model_dir)
    with uncollected():
        from mcore_rl.server.server import serve

    options = {name: value for name, value in vars(arguments).items() if name not in ("command", "model_dir")}
    serve(arguments.model_dir, extend=extend, **options)
    return 0
