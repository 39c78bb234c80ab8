"""`mcore-rl convert`: a conversion with its summary, manifest and certificate."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mcore_rl.checkpoint import manifest
from mcore_rl.convert.certify import Certificate, certify
from mcore_rl.convert.merge import adapters_in, write_alone, write_merged
from mcore_rl.convert.output import ConversionProgress, whole_directory
from mcore_rl.convert.to_hf import write_hf
from mcore_rl.convert.to_mcore import write_torch_dist
from mcore_rl.directories import files_in
from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.torch_dist import CRITIC, holds_classifier
from mcore_rl.terminal import printable
from mcore_rl.weights.encoding import ENCODINGS, check_encoding

_MOST_SHARD_GB = 1e9
"""an exabyte in 10^9 bytes: no file system has larger files"""


def hf_to_mcore(
    source: Path, target: Path, *, tensor: int = 1, pipeline: int = 1, certified: bool = False
) -> dict[str, Any]:
    """Convert an HF directory to torch_dist; the summary that also goes into the manifest.

    Args:
        tensor, pipeline: their product is the number of files; any layout reads them.
        certified: compare both models' logits on the same tokens before `target` appears.

    Raises:
        ConfigError, CheckpointError, NumericsError: nothing is left at `target`.
    """

    if certified and read_architecture(source).quantized is not None:
        raise ConfigError(
            f"--certify asks for equal logits, and {source} has weights in FP8, which are rounded as "
            "they are multiplied out; convert it without"
        )

    def write(directory: Path) -> ConversionProgress:
        return write_torch_dist(source, directory, tensor=tensor, pipeline=pipeline)

    return _convert(
        "hf-to-mcore", source, target, write, (lambda new: certify(source, new)) if certified else None
    )


def mcore_to_hf(
    source: Path,
    target: Path,
    *,
    config: Path | None = None,
    shard_gb: float = 5.0,
    quantize: str = "none",
    critic: bool = False,
    certified: bool = False,
) -> dict[str, Any]:
    """Convert the model part of a torch_dist directory to an HF directory; see `hf_to_mcore`.

    Args:
        config: HF directory with config.json and tokenizer, where `source` has none (a training checkpoint).
        shard_gb: largest safetensors file, in 10^9 bytes.
        quantize: a key of weights.encoding.ENCODINGS; `fp8` is for servers.
        critic: convert the critic of a training checkpoint in the place of its policy.
    """
    if quantize != "none" and certified:
        raise ConfigError(
            "--certify asks for equal logits, and weights in FP8 have others; convert without it, or without "
            "--quantize"
        )
    prefix = CRITIC if critic else ""
    if certified and (critic or holds_classifier(source)):
        what = "a critic" if critic else "a reward model"
        raise ConfigError(f"--certify: {source} is {what}, which has no logits; convert it without")
    if not 0 < shard_gb <= _MOST_SHARD_GB:
        raise ConfigError(f"--shard-gb {shard_gb:g}: give a number above 0, at most {_MOST_SHARD_GB:g}")
    where = source if config is None else config
    if quantize != "none":
        check_encoding(read_architecture(where), quantize, "--quantize")

    def write(directory: Path) -> ConversionProgress:
        size, encoding = int(shard_gb * 1e9), ENCODINGS[quantize]
        return write_hf(source, directory, config=where, shard_bytes=size, encoding=encoding, prefix=prefix)

    def check(new: Path) -> Certificate:
        return certify(new, source, config=where)

    return _convert("mcore-to-hf", source, target, write, check if certified else None)


def merge(
    source: Path, target: Path, *, model: Path, shard_gb: float = 5.0, certified: bool = False
) -> dict[str, Any]:
    """Join the adapters in `source`, a checkpoint or PEFT's, with their model; see `hf_to_mcore`.

    Args:
        model: the directory of the model that they were trained beside.
        shard_gb: largest safetensors file, in 10^9 bytes.
        certified: compare the new model's logits with those of the model and its adapters, kept apart.
    """
    if not 0 < shard_gb <= _MOST_SHARD_GB:
        raise ConfigError(f"--shard-gb {shard_gb:g}: give a number above 0, at most {_MOST_SHARD_GB:g}")
    lora = adapters_in(source, model)

    def write(directory: Path) -> ConversionProgress:
        return write_merged(lora, directory, model=model, shard_bytes=int(shard_gb * 1e9))

    def check(new: Path) -> Certificate:
        return certify(new, model, lora=lora)

    return _convert("merge", source, target, write, check if certified else None)


def adapter(source: Path, target: Path, *, model: Path) -> dict[str, Any]:
    """Write the adapters of a checkpoint in PEFT's format; see `merge`."""
    lora = adapters_in(source, model)
    return _convert("adapter", source, target, lambda new: write_alone(lora, new, model=model), None)


def _convert(
    direction: str,
    source: Path,
    target: Path,
    write: Callable[[Path], ConversionProgress],
    check: Callable[[Path], Certificate] | None,
) -> dict[str, Any]:
    with whole_directory(target) as directory:
        done = write(directory)
        summary: dict[str, Any] = {
            "direction": direction,
            "source": Path(source).resolve().name,
            "parameters": done.parameters,
            "bytes": done.bytes,
            "seconds": round(done.seconds, 2),
        }
        if check is not None:
            print("comparing the logits of both sides", file=sys.stderr, flush=True)
            summary["certificate"] = asdict(check(directory))
        files = [manifest.checksum(directory, name) for name in files_in(directory)]
        manifest.commit(directory, files, conversion=summary)
    return summary


def print_summary(target: Path, summary: dict[str, Any], *, as_json: bool) -> None:
    """One table on stderr or stdout, or the summary as the last line of stdout."""
    certificate = summary.get("certificate")
    text = (
        f"{target}: {summary['parameters']} parameters, {summary['bytes'] / 1e9:.2f} GB "
        f"in {summary['seconds']:.1f} s"
    )
    if certificate:
        text += (
            f"; largest logit difference {certificate['max_abs_logit_difference']:.2e} "
            f"over {certificate['tokens']} tokens ({certificate['precision']})"
        )
    print(printable(text), file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(summary))
