"""Every check in turn, and the table or JSON object that tells of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from math import prod
from pathlib import Path

import torch

from mcore_rl.algo.algorithms import has_critic
from mcore_rl.config import Config, load_config, notes, warnings
from mcore_rl.config.file import separate
from mcore_rl.doctor.finding import Finding, guarded, of_error
from mcore_rl.doctor.gradient import check_gradient
from mcore_rl.doctor.inputs import check_inputs
from mcore_rl.doctor.servers import check_servers
from mcore_rl.doctor.software import check_software
from mcore_rl.doctor.storage import PUBLISHED_VERSIONS, check_disk, check_ports, weight_bytes
from mcore_rl.errors import EXIT_CONFIG, EXIT_DONE, EXIT_RETRYABLE, ConfigError
from mcore_rl.model.hf.adapters import AdapterMap
from mcore_rl.model.hf.architecture import read_architecture, read_hf_config
from mcore_rl.model.precision import check_cpu_fraction, check_precision
from mcore_rl.terminal import printable
from mcore_rl.trackers.services import check_trackers
from mcore_rl.training.layout import lora_of

_MARKS = {"ok": "ok     ", "note": "note   ", "warning": "WARNING", "error": "ERROR  "}


def main(path: Path, overrides: Sequence[str], *, as_json: bool) -> int:
    """Print each finding as it comes; the last line of stdout is a JSON object where that is asked for.

    Returns 0 without errors, 75 when only servers are at fault, else 2.
    """
    out = sys.stderr if as_json else sys.stdout
    findings = []
    for finding in examine(path, overrides):
        findings.append(finding)
        line = f"{_MARKS[finding.level]} {finding.check}: {finding.what}"
        print(printable(line), file=out, flush=True)
        if finding.remedy:
            print(printable(f"        -> {finding.remedy}"), file=out, flush=True)
    errors = [finding for finding in findings if finding.level == "error"]
    warnings = sum(finding.level == "warning" for finding in findings)
    counted = ((len(errors), "error"), (warnings, "warning"))
    said = ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counted)
    print(printable(f"{len(findings)} checks: {said}"), file=out)
    if as_json:
        counts = {"errors": len(errors), "warnings": warnings}
        print(json.dumps({**counts, "findings": [asdict(finding) for finding in findings]}))
    if not errors:
        return EXIT_DONE
    return EXIT_RETRYABLE if all(e.exit_code == EXIT_RETRYABLE for e in errors) else EXIT_CONFIG


def examine(path: Path, overrides: Sequence[str] = ()) -> Iterator[Finding]:
    """The findings, each as soon as its check is done; nothing is written and no server is changed."""
    wrong: set[str] = set()
    for findings in _checks(path, overrides):
        for finding in findings():
            if finding.level == "error":
                if finding.what in wrong:  # what several checks would read is missing once
                    continue
                wrong.add(finding.what)
            yield finding
    if wrong:
        yield Finding("gradient scale", "note", "not probed: the errors above come first")
        return
    distributed = load_config(path, overrides).optimizer.distributed
    yield from guarded("gradient scale", lambda: check_gradient(distributed))


def _checks(path: Path, overrides: Sequence[str]) -> Iterator[Callable[[], list[Finding]]]:
    yield check_software
    yield lambda: list(check_ports())
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        lines = [ConfigError(line) for line in separate(str(error))]
        yield lambda: [of_error("config", line) for line in lines]
        return
    what = config.algorithm.name if config.run.kind == "rl" else config.run.kind
    yield lambda: [Finding("config", "ok", f"{path}: {what}, no contradictions")]
    yield lambda: list(_doubts(config))
    yield lambda: _precision(config)
    yield lambda: guarded("trackers", lambda: _trackers(config))
    yield lambda: check_inputs(config, torch.cuda.device_count())
    yield lambda: guarded("disk", lambda: _disks(config))
    yield lambda: check_servers(config)


def _doubts(config: Config) -> Iterator[Finding]:
    """What the run would warn of, and note."""
    yield from (Finding("config", "note", said) for said in notes(config))
    for said in warnings(config):
        what, _, remedy = said.partition("; ")
        yield Finding("config", "warning", what, remedy)


def _precision(config: Config) -> list[Finding]:
    """Whether this machine has what they ask for; one without GPUs may not be the one that trains."""
    m = config.model
    try:
        check_precision(m.precision, m.fp8_recipe)
        check_cpu_fraction(config.optimizer.cpu_fraction)
    except ConfigError as error:
        found = of_error("precision", error)
        return [found if torch.cuda.is_available() else replace(found, level="warning")]
    return []


def _trackers(config: Config) -> Iterator[Finding]:
    """None where run.trackers names none; raises for one that is not installed."""
    check_trackers(config.run.trackers)
    if config.run.trackers:
        yield Finding("trackers", "ok", f"{', '.join(config.run.trackers)}: installed; not asked")


def _disks(config: Config) -> Iterator[Finding]:
    by_files = config.publish.transport == "disk" or not config.rollout.urls
    published = PUBLISHED_VERSIONS * weight_bytes(config.model.path) if by_files else 0
    if config.publish.transport == "adapter":
        published = (config.rollout.max_staleness + PUBLISHED_VERSIONS) * 4 * _adapter_numbers(config)
    yield from check_disk("run.dir", config.run.dir, published if config.publish.dir is None else 0)
    if config.publish.dir is not None:
        yield from check_disk("publish.dir", config.publish.dir, published)
    if config.checkpoint.saves:
        where = config.checkpoint.dir or config.run.dir / "checkpoints"
        yield from check_disk("checkpoint.dir", where, _checkpoint_bytes(config))


def _checkpoint_bytes(config: Config) -> int:
    """Bytes of the checkpoints kept and the one being written: weights, Adam's moments and fp32 weights."""
    half = read_hf_config(config.model.path).get("torch_dtype") in ("bfloat16", "float16")
    models = [config.critic.path or config.model.path] if _has_critic(config) else []
    adapters = 0
    if lora_of(config) is None:
        models.append(config.model.path)
    else:
        adapters = (12 if config.model.precision == "fp32" else 14) * _adapter_numbers(config)
    whole = (7 if half else 3) * sum(map(weight_bytes, models))
    return (config.checkpoint.keep + 1) * (whole + adapters)


def _adapter_numbers(config: Config) -> int:
    """Numbers that [lora] trains."""
    lora = lora_of(config)
    assert lora is not None
    return sum(map(prod, AdapterMap(read_architecture(config.model.path), lora).hf_shapes().values()))


def _has_critic(config: Config) -> bool:
    return has_critic(config.algorithm.name)
