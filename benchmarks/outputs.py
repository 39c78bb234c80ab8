"""Where a benchmark writes: refused where it cannot, before hours of work.

parser.add_argument("--out", type=output_file)
parser.add_argument("--out", type=output_directory, default=ROOT / "benchmarks")
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def output_file(text: str) -> Path:
    """The path of a file to be written. Raises ArgumentTypeError where there can be none."""
    path = Path(text)
    parent = path.absolute().parent
    if path.is_dir() or not (parent.is_dir() and os.access(path if path.exists() else parent, os.W_OK)):
        raise argparse.ArgumentTypeError(
            f"{path}: name a file in a directory that is there and can be written"
        )
    return path


def output_directory(text: str) -> Path:
    """The path of a directory to be written into. Raises ArgumentTypeError where it is none."""
    path = Path(text)
    if not (path.is_dir() and os.access(path, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{path}: name a directory that is there and can be written")
    return path
