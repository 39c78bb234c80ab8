"""Run the cases of a directory, compare every output array, report."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mcore_rl.errors import ConfigError
from mcore_rl.parallel.pool import spawn
from mcore_rl.terminal import CommandParser, printable
from mcore_rl.verify.golden import distillation, entries, losses, samples, trajectories
from mcore_rl.verify.golden.inputs import BATCH_INPUTS, Arrays, GoldenInputs, Outputs, load

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
"""largest |difference| allowed, relative to max|x| of the array"""

INPUTS: Mapping[str, frozenset[str]] = {
    "batch": BATCH_INPUTS,
    "value_gae": frozenset({"kl_coef", "gamma", "lam", "last_index"}),
    "preference": frozenset({"pairs", "beta", "label_smoothing", "rm_score", "rm_margin", "rm_center_coef"}),
    "mismatch": frozenset({"opsm_delta"}),
    "layout": frozenset({"owner3"}),
    "trajectories": trajectories.INPUTS,
    "distillation": distillation.INPUTS,
    "entries": entries.INPUTS,
}
"""file -> arrays that are inputs and not cases"""

CASES: Mapping[str, Mapping[str, samples.Case]] = {
    "batch": samples.BATCH,
    "advantages": samples.ADVANTAGES,
    "value_gae": samples.VALUES,
    "kl_entropy": samples.KL_ENTROPY,
    "mismatch": samples.MISMATCH,
    "layout": samples.LAYOUT,
    "trajectories": trajectories.CASES,
    "distillation": distillation.CASES,
    "policy_losses": {name: partial(losses.policy_case, name=name) for name in losses.POLICY_LOSSES},
    "entries": {name: partial(entries.entry_case, name=name) for name in entries.NAMES},
    "preference": {
        **{name: partial(losses.preference_case, name=name) for name in losses.PREFERENCES},
        **losses.REWARD_MODELS,
    },
}
"""file -> pattern of the case's name -> how to compute it"""

DIFFERENTIATED = ("policy_losses", "preference", "trajectories", "entries")
"""files whose cases go through the backward pass of the head: in both of its modes"""

DEADLINE_SECONDS = 300.0


@dataclass(frozen=True)
class CaseReport:
    """One case: the largest relative error of each output array, per precision."""

    name: str
    """`<file>/<case>`"""
    errors: Mapping[str, Mapping[str, float]]
    """precision, and mode of the head -> array -> error; empty for a case that the library does not know"""
    passed: bool


@dataclass(frozen=True)
class Report:
    """All cases of a directory, in the order of their names."""

    cases: tuple[CaseReport, ...]

    @property
    def failed(self) -> tuple[CaseReport, ...]:
        """Cases above tolerance, with an array that is not computed, or unknown."""
        return tuple(case for case in self.cases if not case.passed)

    @property
    def max_error(self) -> float:
        """Over all cases, arrays and precisions; relative to max|x| of the array."""
        arrays = (errors for case in self.cases for errors in case.errors.values())
        return max((error for errors in arrays for error in errors.values()), default=0.0)

    def summary(self) -> dict[str, int | float | None]:
        """What the last line says; an infinite error has no JSON number and becomes null."""
        error = self.max_error if math.isfinite(self.max_error) else None
        return {"cases": len(self.cases), "failed": len(self.failed), "max_error": error}


def verify_golden(directory: str | Path, *, tp: int = 1) -> Report:
    """Every golden case of `directory`, in float64 and float32; of several ranks the worst report.

    Args:
        tp: size of the tensor-parallel group that shares the head; above 1 in as many processes of this
            machine.

    Raises:
        DataError: no such directory, or a file in it that cannot be used.
        ConfigError: tp below 1.
        RankError: a process died, or the deadline passed.
    """
    files = load(Path(directory))
    if tp < 1:
        raise ConfigError(f"verify golden --tp {tp}: use 1 or more")
    if tp == 1:
        return run_cases(files, None)
    reports = spawn(_run_rank, tp, str(directory), timeout=DEADLINE_SECONDS)
    return max(reports, key=lambda report: (len(report.failed), report.max_error))


def _run_rank(directory: str) -> Report:
    return run_cases(load(Path(directory)), dist.group.WORLD)


def run_cases(files: Mapping[str, Arrays], group: dist.ProcessGroup | None) -> Report:
    """Collective over `group`: each rank runs every case and gets the report of its own copies."""
    problems = [GoldenInputs(files, dtype, group, fused) for dtype in TOLERANCE for fused in (False, True)]
    return Report(tuple(_run_case(problems, file, name) for file, name in _case_names(files)))


def _case_names(files: Mapping[str, Arrays]) -> Iterator[tuple[str, str]]:
    for file, arrays in files.items():
        depth = 2 if file == "trajectories" else 1
        names = {"/".join(name.split("/")[:depth]) for name in arrays} - INPUTS.get(file, frozenset())
        yield from ((file, name) for name in sorted(names))


def _run_case(problems: Sequence[GoldenInputs], file: str, name: str) -> CaseReport:
    case = samples.match(CASES.get(file, {}), name)
    if case is None:
        return CaseReport(f"{file}/{name}", {}, passed=False)
    errors = {}
    passed = True
    for problem in problems:
        if problem.fused and file not in DIFFERENTIATED:
            continue
        outputs = case(problem)
        found = _compare(problem, file, name, outputs if isinstance(outputs, dict) else {"value": outputs})
        precision = str(problem.dtype).removeprefix("torch.")
        errors[f"{precision} fused" if problem.fused else precision] = found
        passed &= all(error <= TOLERANCE[problem.dtype] for error in found.values())
    return CaseReport(f"{file}/{name}", errors, passed)


def _compare(problem: GoldenInputs, file: str, name: str, outputs: Outputs) -> dict[str, float]:
    """Array -> error. An array that the case does not compute, or of another shape, has an infinite error."""
    arrays = problem.files[file]
    prefix = f"{name}/"
    expected = {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}
    if name in arrays:
        expected["value"] = arrays[name]
    expected.pop("cfg", None)
    errors = {}
    for key, array in expected.items():
        # the loss of a masked token means nothing: only its weight, 0, does
        mask = problem.mask if key == "per_token_loss" else None
        errors[key] = _error(outputs[key], array, mask) if key in outputs else math.inf
    return errors or {"value": math.inf}


def _error(output: Tensor, expected: np.ndarray, mask: Tensor | None) -> float:
    if expected.dtype.kind not in "fiub" or tuple(output.shape) != expected.shape:
        return math.inf
    actual, target = output.detach().double(), torch.from_numpy(np.asarray(expected)).double()
    if mask is not None:
        actual, target = actual[mask], target[mask]
    if target.numel() == 0:
        return 0.0
    scale = target.abs().max().item()
    error = (actual - target).abs().max().item() / (scale or 1.0)
    return math.inf if math.isnan(error) else error


def main(argv: Sequence[str] | None = None) -> int:
    """`mcore-rl verify golden DIR [--tp N] [--json]`: 0 when every case passes, else 1.

    Prints a line per case and, last on stdout, {"cases": n, "failed": m, "max_error": x}. With --json the
    lines for people go to stderr.
    """
    parser = CommandParser(prog="mcore-rl verify golden", description=main.__doc__)
    parser.add_argument("directory", type=Path, help="holds batch.npz and the golden files")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel processes that share the head")
    parser.add_argument("--json", action="store_true", help="lines for people to stderr")
    arguments = parser.parse_args(argv)
    report = verify_golden(arguments.directory, tp=arguments.tp)
    for case in report.cases:
        print(printable(_line(case)), file=sys.stderr if arguments.json else sys.stdout)
    print(json.dumps(report.summary()), flush=True)
    return 1 if report.failed else 0


def _line(case: CaseReport) -> str:
    if not case.errors:
        return f"FAILED  {case.name}: no such case in this version of mcore_rl"
    worst = {
        precision: " ".join(f"{array} {error:.1e}" for array, error in errors.items())
        for precision, errors in case.errors.items()
    }
    return f"{'ok    ' if case.passed else 'FAILED'}  {case.name}: " + "; ".join(
        f"{precision} {text}" for precision, text in worst.items()
    )
