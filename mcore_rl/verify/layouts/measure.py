"""What one layout computes on the recorded problem, gathered to full shapes; runs on every rank."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mcore_rl.data.balance import forward_flops
from mcore_rl.model import platform
from mcore_rl.model.build import Model, build_critic, build_policy
from mcore_rl.model.optimizer import Optimizer, build_optimizer, ddp_config
from mcore_rl.model.step import Loss, forward, forward_backward
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.parallel.head.divergence import Against
from mcore_rl.parallel.mesh import Mesh, build_mesh, destroy_mesh
from mcore_rl.training.batch import (
    Batching,
    align_of,
    build_batch,
    pack_mini_batch,
    pack_share,
    token_sequences,
)
from mcore_rl.training.critic import groups_of, pack_prompts
from mcore_rl.training.metrics import Gathered
from mcore_rl.training.objective import PolicyObjective, ValueObjective
from mcore_rl.training.shape import shape_of
from mcore_rl.training.teachers import Teachers
from mcore_rl.tuning import Tuning
from mcore_rl.types import PackedBatch, Sample
from mcore_rl.verify.layouts import problem
from mcore_rl.verify.layouts.case import LOSSES, Case
from mcore_rl.verify.layouts.rows import DIVERGENCES, record_distillation, record_rows
from mcore_rl.verify.layouts.rows import LOSSES as LOSSES_OF_ROWS
from mcore_rl.verify.layouts.whole import WHOLE, record_whole
from mcore_rl.weights.buckets import gather, plan_to_gather

SGD_STEPS = 3
ADAM_STEPS = 2
"""The second one's gradient needs the parameters that the first one updated, gathered again."""
CRITIC = "critic"
"""What an algorithm with a critic trains beside its policy: of PPO measured under this name, of others under
`critic of NAME`."""


@dataclass(frozen=True)
class Measured:
    """Results of one algorithm, or of the critic; equal at every layout up to rounding."""

    loss: float
    abs_loss: float
    """sum of |w * l|, the scale of the loss's error"""
    metrics: Mapping[str, Tensor]
    """what the logged metrics of the first step are made of: counts, sums, maxima, the gradient norm"""
    scores: Mapping[str, Tensor]
    """`log_prob` and `entropy`, or `value` -> [rows] of the starting weights"""
    gradients: Mapping[str, Tensor]
    """HF name -> gradient, full shape"""
    parameters: Mapping[str, Tensor]
    """HF name -> value after SGD_STEPS of plain SGD, full shape"""
    start: Mapping[str, Tensor]
    """HF name -> starting value, full shape; of the reference run alone"""
    exp_avg: Mapping[str, Tensor]
    """`<step>:<HF name>` -> first moment of the distributed optimizer's Adam after that step, full shape"""


@dataclass(frozen=True)
class _Subject:
    """A model to train and the loss to train it by."""

    build: Callable[..., Model]
    """build_policy or build_critic, all but `ddp` given"""
    loss: Loss
    micro_batches: Sequence[PackedBatch]
    """this rank's share of all that was recorded, as one mini-batch"""
    scores: Mapping[str, Tensor]
    overlap: bool
    is_reference: bool
    """what others are compared with: who measures their movement needs where it began"""
    against: Sequence[Against | None] = ()
    """what a student is compared with in each of the micro-batches"""
    lr: float = problem.SGD_LEARNING_RATE
    """of plain SGD"""


def measure(
    case: Case, algorithms: Sequence[str], log_probs: list[np.ndarray] | None, own_loss: str | None = None
):
    """({algorithm: Measured}, log-probs) on rank 0, None elsewhere. Collective over all running ranks.

    Args:
        log_probs: [N] arrays of the reference run's own log-probs, from which old ones are derived; rank 0's
            count. None (the reference run itself) takes this layout's.
        own_loss: `module:function` of a policy loss in the place of the algorithms'.

    Raises:
        NumericsError: the reference run's problem would not tell a wrong layout.
    """
    platform.install()
    torch.set_float32_matmul_precision("highest")  # TF32 would drown what is measured
    mesh = build_mesh(case.layout, timeout=120.0)
    try:
        with tempfile.TemporaryDirectory(prefix="mcore_rl_verify_") as scratch:
            model_dir = problem.write_model(Path(scratch) / "model", case.model)
            return _measure(case, mesh, algorithms, model_dir, log_probs, own_loss)
    finally:
        destroy_mesh()


def _measure(case: Case, mesh: Mesh, algorithms: Sequence[str], model_dir: Path, log_probs, own_loss):
    shape = replace(_shape(model_dir, mesh, own_loss), share_prompts=case.share_prompts)
    settings = {"mesh": mesh, "random_seed": problem.SEED, "tuning": Tuning(recompute=case.recompute)}
    policy = partial(build_policy, model_dir, **settings)
    critic = partial(build_critic, model_dir, **settings)
    samples = build_batch(problem.recorded_groups()).samples
    log_prob, entropy = score(policy(ddp=None), samples, shape, kinds=2)
    lengths = [sample.trained_tokens for sample in samples]
    box = [[values.numpy() for values in log_prob.split(lengths)] if log_probs is None else log_probs]
    dist.broadcast_object_list(box, src=0, group=mesh.world)
    subject_of = partial(_Subject, overlap=case.overlap, is_reference=log_probs is None)
    results = {}
    for name in algorithms:
        if name in LOSSES_OF_ROWS:
            rows = record_rows(name, shape, mesh)
            build = critic if name == "reward_model" else policy
            results[name] = _train(mesh, subject_of(build, rows.loss, rows.batches, {}))
            continue
        if name in DIVERGENCES:
            rows = record_distillation(name, teachers(case, mesh, model_dir.parent), shape, mesh)
            subject = subject_of(policy, rows.loss, rows.batches, {}, against=rows.against)
            results[name] = _train(mesh, subject)
            continue
        if name == WHOLE:
            recorded = record_whole(policy, critic, mesh, shape)
        else:
            recorded = problem.record(name, box[0], own_loss)
        if log_probs is None and name != WHOLE:  # which begins on policy
            problem.check(recorded, box[0])
        scores = {"log_prob": log_prob, "entropy": entropy}
        loss = PolicyObjective(recorded.algorithm, mesh.cp if mesh.layout.context > 1 else None)
        batches = _packed(recorded, shape, mesh)
        lr = problem.STEEP.get(name, problem.SGD_LEARNING_RATE)
        results[name] = _train(mesh, subject_of(policy, loss, batches, scores, lr=lr))
        if recorded.algorithm.needs_critic:
            scores = {"value": score(critic(ddp=None), samples, shape, kinds=1)[0]}
            value_loss = ValueObjective(problem.VALUE_CLIP)
            if recorded.algorithm.values_prompts:
                groups = groups_of(recorded.batch)
                its = {key: recorded.fields[key] for key in ("old_value", "return")}
                batches = pack_prompts(recorded.batch, groups, shape, mesh, its)
            results[critic_of(name)] = _train(mesh, subject_of(critic, value_loss, batches, scores))
    return (results, box[0]) if mesh.is_main else None


def critic_of(name: str) -> str:
    """What the critic of the algorithm `name` is measured under."""
    return CRITIC if name == "ppo" else f"{CRITIC} of {name}"


def teachers(case: Case, mesh: Mesh, scratch: Path) -> Teachers:
    """Two random teachers that are wider than the student; row by row, the metadata name one of them."""
    wider = problem.write_model(scratch / "teacher", case.model, teacher=True)
    models = {
        name: build_policy(wider, mesh, random_seed=problem.SEED + number)
        for number, name in enumerate(("a", "b"), 1)
    }
    return Teachers(models, "teacher")


def _packed(recorded: problem.Recorded, shape: Batching, mesh: Mesh) -> list[PackedBatch]:
    batch = recorded.batch
    everyone = np.arange(len(batch.samples))
    return pack_mini_batch(batch, everyone, recorded.algorithm, shape, mesh, recorded.fields)


def score(model: Model, samples: Sequence[Sample], shape: Batching, *, kinds: int) -> Tensor:
    """[kinds, rows] log-probs and entropies (2), or values (1), of all samples; the same on every rank."""
    sequences = token_sequences(samples)
    bounds = np.cumsum([0, *(sequence.scored for sequence in sequences)])
    numbers = [np.arange(start, stop) for start, stop in pairwise(bounds)]
    batches = pack_share(sequences, {"number": numbers}, shape, model.mesh)
    scores = torch.zeros(kinds, int(bounds[-1]))
    for batch, output in forward(model, batches, problem.TEMPERATURE):
        if model.mesh.owns_metrics:
            values = torch.stack(tuple(output)) if isinstance(output, tuple) else output[None]
            scores[:, batch.fields["number"].cpu()] = values.cpu()
    dist.all_reduce(scores, group=model.mesh.world)  # every row was written by one rank, the others add 0
    return scores


def _train(mesh: Mesh, subject: _Subject) -> Measured:
    """Plain SGD for gradients and parameters, then the distributed optimizer from the same start."""
    model = subject.build(ddp=ddp_config(distributed=False, overlap=subject.overlap))
    optimizer = build_optimizer(model, lr=subject.lr, kind="sgd", clip_grad=0.0, distributed=False)
    parameters = global_parameters(model.unwrapped)
    micro_batches = subject.micro_batches
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    first = _pass(model, optimizer, subject, micro_batches)
    gradients = {name: vars(parameter)["main_grad"].clone() for name, parameter in parameters.items()}
    norm = optimizer.step()
    for _ in range(SGD_STEPS - 1):
        _pass(model, optimizer, subject, micro_batches)
        optimizer.step()
    totals = Gathered(first).reduce(mesh)
    by_name = {key.name: total for key, total in totals.items()}
    loss = next(by_name[name] for name in LOSSES if name in by_name)
    kinds = {"gradients": gradients, "parameters": parameters}
    whole = gathered(model, {**kinds, "start": start} if subject.is_reference else kinds)
    return Measured(
        loss=loss.item(),
        abs_loss=by_name.get("loss/scale", loss).abs().item(),
        metrics=by_name | {"grad_norm": torch.tensor(norm)},
        scores=subject.scores,
        **{"start": {}, **whole},
        exp_avg=_first_moments(subject),
    )


def _first_moments(subject: _Subject) -> dict[str, Tensor]:
    model = subject.build(ddp=ddp_config(distributed=True, overlap=subject.overlap))
    optimizer = build_optimizer(
        model, lr=problem.ADAM_LEARNING_RATE, eps=problem.ADAM_EPS, clip_grad=0.0, distributed=True
    )
    moments: dict[str, dict[str, Tensor]] = {}
    for step in range(ADAM_STEPS):
        _pass(model, optimizer, subject, subject.micro_batches)
        optimizer.step()
        moments[f"{step + 1}"] = _whole_states(optimizer, global_parameters(model.unwrapped), "exp_avg")
    whole = gathered(model, moments)
    return {f"{step}:{name}": moment for step, its in whole.items() for name, moment in its.items()}


def _pass(model: Model, optimizer: Optimizer, subject: _Subject, micro_batches: Sequence[PackedBatch]):
    optimizer.zero_grad()
    temperature = problem.TEMPERATURE
    return forward_backward(model, micro_batches, subject.loss, temperature, against=subject.against)


def _whole_states(
    optimizer: Optimizer, parameters: Mapping[str, torch.nn.Parameter], state: str
) -> dict[str, Tensor]:
    """A state of each parameter, whose shards Megatron's distributed optimizer spreads over its ranks."""
    found: dict[str, Tensor] = {}
    for part in getattr(optimizer.megatron, "chained_optimizers", [optimizer.megatron]):
        own = {id(parameter) for buffer in part.buffers for parameter in buffer.params}
        its = {name: parameter for name, parameter in parameters.items() if id(parameter) in own}
        wholes = {name: torch.zeros(p.numel(), device=p.device) for name, p in its.items()}
        for name, parameter in its.items():
            if parameter in part.model_param_gbuf_map:  # this rank owns some of it
                owned = part._get_model_param_range_map(parameter)["param"]
                values = part._get_main_param_and_optimizer_states(parameter)[state]
                wholes[name][owned.start : owned.end] = values
        if not its:
            continue
        flat = torch.cat([*wholes.values()])
        dist.all_reduce(flat, group=part.data_parallel_group)
        sizes = [whole.numel() for whole in wholes.values()]
        parts = zip(its.items(), flat.split(sizes), strict=True)
        found |= {name: whole.view_as(parameter) for (name, parameter), whole in parts}
    return {name: found[name] for name in parameters}


def _shape(model_dir: Path, mesh: Mesh, own_loss: str | None) -> Batching:
    """A loss of the user's own may be steep: it has small micro-batches, whose sums are rounded less."""
    numbers = shape_of(model_dir)
    tokens = problem.TOKENS_PER_MICRO_BATCH
    return Batching(
        mini_batches=1,
        tokens_per_micro_batch=tokens if own_loss else problem.filled(tokens, mesh.layout),
        max_new_tokens=problem.MAX_NEW_TOKENS,
        cost=lambda lengths: forward_flops(lengths, numbers),
        align=align_of(mesh),
    )


def gathered(model: Model, kinds: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Per-rank tensors of several kinds by global Megatron name -> kind -> {HF name: full tensor} on rank 0.

    All kinds have the names, shapes and types of the first. Elsewhere the kinds are empty.
    """
    plan = plan_to_gather(next(iter(kinds.values())), model.mapping, model.mesh)
    mine = {kind: gather(its, model.mapping, model.mesh, plan) for kind, its in kinds.items()}
    shares = [mine] * model.mesh.layout.world_size
    dist.gather_object(mine, shares if model.mesh.is_main else None, group=model.mesh.world)
    whole: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for share in shares if model.mesh.is_main else ():
        for kind, tensors in share.items():
            whole[kind] |= tensors
    return whole
