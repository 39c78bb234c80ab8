"""`mcore-rl train CONFIG.toml --replay DUMP`: one recorded micro-batch alone, and its first non-finite value.

No servers, no optimizer, nothing written but events.jsonl. DUMP is what train.dump kept.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mcore_rl.algo.algorithms import configure
from mcore_rl.algo.sequences import ScoreLoss
from mcore_rl.checkpoint import Checkpoints, Saved, find, fp8_pieces, model_pieces
from mcore_rl.config import Config
from mcore_rl.errors import ConfigError, NumericsError
from mcore_rl.model.build import Model
from mcore_rl.model.residency import Residency
from mcore_rl.model.step import Loss, forward_backward
from mcore_rl.parallel.control import gather_ranks
from mcore_rl.parallel.head.divergence import Against
from mcore_rl.parallel.mesh import Mesh, build_mesh, destroy_mesh
from mcore_rl.precision import token_multiple
from mcore_rl.terminal import printable
from mcore_rl.training.assemble import build_critic_of
from mcore_rl.training.batch import align_of
from mcore_rl.training.distill import divergence_of, objective_of
from mcore_rl.training.faults.dump import alone, from_json
from mcore_rl.training.faults.exits import recorded
from mcore_rl.training.faults.inspect import Inspector, NonFiniteTensor
from mcore_rl.training.faults.watchdog import collective_timeout
from mcore_rl.training.layout import layout_of
from mcore_rl.training.objective import PolicyObjective, ValueObjective
from mcore_rl.training.preference import loss_of
from mcore_rl.training.reward_model import TOTAL
from mcore_rl.training.sequence_objective import SequenceObjective
from mcore_rl.training.setup import (
    build_trained,
    process_group,
    shares_prompts,
    watched,
    world_size,
)
from mcore_rl.training.supervised import NegativeLogLikelihood
from mcore_rl.training.teachers import start_teachers
from mcore_rl.types import PackedBatch


def replay_dump(config: Config, path: Path) -> None:
    """Run the micro-batch of `path` with the weights of `path`, every replica the same one.

    Raises:
        NumericsError: on every rank: the first value that is not finite, and where it is.
        ConfigError: `path` is no dump, or is cut for another layout.
    """
    saved = find(path.parent, str(path))
    if "numerics" not in saved.document:
        raise ConfigError(f"--replay: {path} holds no micro-batch; name a directory RUN_DIR/numerics/step_N")
    dump = saved.document["numerics"]
    layout = layout_of(config, world_size())
    layout.check(world_size())
    timeout = collective_timeout(config.train.step_timeout)
    with process_group(timeout):
        mesh = build_mesh(layout, timeout=timeout)
        try:
            with recorded(config.run.dir), watched(config, mesh):
                _replay(config, mesh, saved, dump)
        finally:
            destroy_mesh()


def _replay(config: Config, mesh: Mesh, saved: Saved, dump: dict[str, Any]) -> None:
    if dump.get("begins") is not None and not shares_prompts(config, mesh):
        raise ConfigError(
            f"--replay: its samples share their prompts, and {mesh.layout} cannot; replay it at the recorded "
            f"layout: {saved.document['layout']}"
        )
    align = align_of(mesh, token_multiple(config.model.precision, config.model.fp8_recipe))
    if dump["align"] % align:
        raise ConfigError(
            f"--replay: its sequences are padded to {dump['align']} tokens, {mesh.layout} needs "
            f"{align}; replay it at the recorded layout: {saved.document['layout']}"
        )
    model = _build(config, mesh, dump["kind"])
    checkpoints = Checkpoints(
        saved.path.parent, mesh, keep=1, background=False, timeout=config.train.step_timeout
    )
    checkpoints.load(saved, [*model_pieces(model), *fp8_pieces(model)])
    batch = from_json(dump)
    with Inspector(model, batch, dump["samples"]) as inspector:
        objective = inspector.observed(_objective(config, mesh, dump["kind"]))
        batches, other = alone(batch, mesh), [_compared(config, mesh, dump["kind"], batch)]
        forward_backward(model, batches, objective, dump["temperature"], against=other * len(batches))
        findings = _gathered(mesh, inspector.findings())
    _report(mesh, saved, dump, findings)


def _build(config: Config, mesh: Mesh, kind: str) -> Model:
    if kind == "critic":
        return build_critic_of(config, mesh)
    return build_trained(config, mesh)


def _compared(config: Config, mesh: Mesh, kind: str, batch: PackedBatch) -> Against | None:
    """What a student was compared with in a micro-batch: its teacher says it again."""
    divergence = divergence_of(config.distill)
    if kind != "distill" or divergence is None:
        return None
    name = list(config.distill.teachers)[int(batch.fields["teacher"][0]) if len(batch.rows) else 0]
    only = config.distill.model_copy(update={"teachers": {name: config.distill.teachers[name]}})
    teachers = start_teachers(config.model_copy(update={"distill": only}), mesh)
    return teachers.states({name: [batch]}, divergence, Residency(teachers.waiting))[0]


def _objective(config: Config, mesh: Mesh, kind: str) -> Loss:
    if kind == "supervised":
        return NegativeLogLikelihood()
    if kind == "distill":
        return objective_of(divergence_of(config.distill))
    if kind == "preference":
        return SequenceObjective(loss_of(config), mesh.cp if mesh.layout.context > 1 else None)
    if kind == "reward_model":
        cp = mesh.cp if mesh.layout.context > 1 else None
        return SequenceObjective(ScoreLoss(config.reward_model.center_coef), cp, TOTAL)
    if kind == "critic":
        return ValueObjective(config.critic.value_clip or None, config.critic.coef)
    algorithm = configure(config.algorithm.name, config.algorithm.params, config.algorithm.loss)
    return PolicyObjective(algorithm, mesh.cp if mesh.layout.context > 1 else None)


def _gathered(mesh: Mesh, findings: list[NonFiniteTensor]) -> list[NonFiniteTensor]:
    return sorted(finding for its in gather_ranks(mesh, findings) for finding in its)


def _report(mesh: Mesh, saved: Saved, dump: dict[str, Any], findings: list[NonFiniteTensor]) -> None:
    """Say the first finding of every phase, then raise the first of all."""
    first = {finding.phase: finding for finding in reversed(findings)}
    if mesh.is_main:
        known = ", ".join(f"{key} {dump[key]}" for key in ("kind", "step", "micro_batch", "replica", "ranks"))
        lines = [known, f"samples {', '.join(dump['samples'])}", *(str(first[p]) for p in sorted(first))]
        for line in lines:
            print(printable(f"replay: {line}"), file=sys.stderr, flush=True)
        if not findings:
            print("replay: every value is finite; the fault does not repeat", file=sys.stderr, flush=True)
    if findings:
        raise NumericsError(f"{saved.path}: first non-finite value: {findings[0]}").on_every_rank()
