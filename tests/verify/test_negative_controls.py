"""Known ways to be wrong at a layout, planted one at a time: `verify layouts` must see each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mcore_rl.model import build, packed_layout, policy, step, weights_io
from mcore_rl.parallel.head import divergence, head
from mcore_rl.parallel.head import passes as head_passes
from mcore_rl.training import distill, model_passes, objective, sequence_objective
from mcore_rl.verify.layouts import rows
from mcore_rl.verify.layouts.command import verify_layouts
from mcore_rl.verify.layouts.compare import Errors
from tests.verify.conftest import SharedPools

Plant = Callable[[pytest.MonkeyPatch], None]


def nothing(patch: pytest.MonkeyPatch) -> None:
    """The control of the controls."""


def ratio_per_shard(patch: pytest.MonkeyPatch) -> None:
    """GSPO's mean log-ratio over this context-parallel rank's tokens instead of the whole sequence's."""
    original = objective.sequence_sums
    patch.setattr(objective, "sequence_sums", lambda *args: original(*args[:3], None))


def sums_not_reduced(patch: pytest.MonkeyPatch) -> None:
    """Tokens are counted over all context-parallel ranks, their log-ratios are not summed."""
    original = objective.sequence_sums

    def counts_only(values: Tensor, sequence: Tensor, n: int, group) -> Tensor:
        return torch.stack([original(values, sequence, n, None)[0], original(values, sequence, n, group)[1]])

    patch.setattr(objective, "sequence_sums", counts_only)


def mean_per_micro_batch(patch: pytest.MonkeyPatch) -> None:
    """The loss is a mean over the micro-batch's tokens, averaged over micro-batches and ranks."""

    def scaled(loss, batch, scale, output):
        count = torch.tensor(max(1, batch.rows.numel()))
        equal = replace(
            batch, fields={**batch.fields, "weight": torch.ones_like(batch.fields["weight"]) / count}
        )
        total, measure = loss(equal, output)
        return total, torch.tensor(1), [{name: value.detach().clone() for name, value in measure().items()}]

    patch.setattr(step, "_scaled_loss", scaled)
    patch.setattr(objective.PolicyObjective, "rowwise", lambda self, batch: False)


def doubled_tensor_parallel_gradient(patch: pytest.MonkeyPatch) -> None:
    """A collective whose backward pass sums the copies of a gradient that every rank already has."""

    def doubled(original, hidden: Tensor, weight: Tensor, call, *loss):
        hidden, group = hidden.view_as(hidden), call.shard.group
        if hidden.requires_grad and group is not None:
            hidden.register_hook(lambda gradient: gradient * group.size())
        return original(hidden, weight, call, *loss)

    for name in ("log_prob_entropy", "head_loss"):
        patch.setattr(policy, name, partial(doubled, getattr(policy, name)))


def unreduced_hidden_gradient(patch: pytest.MonkeyPatch) -> None:
    """Each tensor-parallel rank goes on with the gradient of its own part of the vocabulary."""
    original = head_passes.begin_reduction

    def alone(grad_rows: Tensor, tokens: int, call):
        return original(grad_rows, tokens, call._replace(shard=call.shard._replace(group=None)))

    patch.setattr(head, "begin_reduction", alone)


def unscaled_head(patch: pytest.MonkeyPatch) -> None:
    """Fused mode takes the gradient of its loss for 1: Megatron's factors never reach it."""
    original = step._scaled_head_loss
    patch.setattr(step, "_scaled_head_loss", lambda metrics, scale, output: original(metrics, 1, output))


def interleaving_trap(patch: pytest.MonkeyPatch) -> None:
    """Megatron's default p2p flags with virtual pipeline stages."""
    original = build.transformer_config

    def trapped(*args, **options):
        config = original(*args, **options)
        config.overlap_p2p_comm, config.batch_p2p_comm = False, True
        return config

    patch.setattr(build, "transformer_config", trapped)


def keys_in_plain_order(patch: pytest.MonkeyPatch) -> None:
    """Keys are looked up as if every rank held one contiguous part, while tokens are split in zig-zag."""

    def contiguous(cu_seqlens: Tensor, size: int, tokens: int) -> Tensor:
        token = torch.arange(tokens)
        sequence = torch.bucketize(token, cu_seqlens[1:].long(), right=True)
        start, end = cu_seqlens[sequence].long(), cu_seqlens[sequence + 1].long()
        share = (end - start) // size
        return (token - start) // share * (tokens // size) + start // size + (token - start) % share

    patch.setattr(packed_layout, "gathered_places", contiguous)


def unmarked_shards(patch: pytest.MonkeyPatch) -> None:
    """Megatron takes unmarked shards for duplicates: their gradients are missing from the norm."""
    original = weights_io.mark

    def unmark(parameter, entry) -> None:
        original(parameter, entry)
        vars(parameter).pop("tensor_model_parallel", None)

    patch.setattr(weights_io, "mark", unmark)


def unreduced_gradients(patch: pytest.MonkeyPatch) -> None:
    """The schedule is not told how to reduce gradients over data-parallel ranks."""
    patch.setattr(build, "finalize_model_grads", None)


def experts_of_nobody(patch: pytest.MonkeyPatch) -> None:
    """Experts are reduced like dense weights although tensor-parallel ranks send them different tokens."""
    original = weights_io.mark

    def as_dense(parameter, entry) -> None:
        original(parameter, entry)
        parameter.allreduce = True

    patch.setattr(weights_io, "mark", as_dense)


def pair_sums_per_shard(patch: pytest.MonkeyPatch) -> None:
    """A pair is judged by this context-parallel rank's tokens alone."""
    original = sequence_objective.sequence_sums
    patch.setattr(sequence_objective, "sequence_sums", lambda *args: original(*args[:3], None))


def pairs_taken_apart(patch: pytest.MonkeyPatch) -> None:
    """The answers of a pair go to whatever micro-batch has room, and neighbours are taken for pairs."""
    original = rows.pack_share
    patch.setattr(rows, "pack_share", lambda *args, **options: original(*args))


def scores_of_one_replica(patch: pytest.MonkeyPatch) -> None:
    """A replica knows what it scored itself, and takes 0 for the rest."""
    patch.setattr(model_passes, "dist", SimpleNamespace(all_reduce=lambda *args, **options: None))


def divergence_per_shard(patch: pytest.MonkeyPatch) -> None:
    """Each tensor-parallel rank compares the models over its own part of the vocabulary."""
    patch.setattr(divergence, "gather_statistics", lambda stats, group: stats[None])


def teacher_of_the_micro_batch(patch: pytest.MonkeyPatch) -> None:
    """Rows of all teachers are packed wherever there is room, and micro-batches take teachers by turns."""

    def by_turns(teachers, rows, shape, mesh):
        packed = distill.pack_share(distill.sequences_of(rows), distill.fields_of(rows), shape, mesh)
        names = list(teachers.models)
        return {name: packed[number :: len(names)] for number, name in enumerate(names)}

    patch.setattr(distill, "by_teacher", by_turns)


def prompt_of_another_sample(patch: pytest.MonkeyPatch) -> None:
    """Samples without a prompt of their own see the first tokens of the micro-batch."""
    original = packed_layout.SharedPrompts
    patch.setattr(
        packed_layout, "SharedPrompts", lambda begins, before: original(torch.zeros_like(begins), before)
    )


FAULTS: dict[str, tuple[Plant, str, str, str]] = {
    "ratio_per_shard": (ratio_per_shard, "cp2", "gspo", "gradient"),
    "sums_not_reduced": (sums_not_reduced, "cp2", "gspo", "gradient"),
    "mean_per_micro_batch": (mean_per_micro_batch, "dp2", "liteppo", "gradient"),
    "doubled_tensor_parallel_gradient": (doubled_tensor_parallel_gradient, "tp2", "grpo", "gradient"),
    "unreduced_hidden_gradient": (unreduced_hidden_gradient, "tp2", "gspo", "gradient"),
    "unscaled_head": (unscaled_head, "cp2", "grpo", "gradient"),
    "keys_in_plain_order": (keys_in_plain_order, "cp2", "grpo", "log_prob"),
    "unmarked_shards": (unmarked_shards, "tp2", "grpo", "metric"),
    "unreduced_gradients": (unreduced_gradients, "dp2", "grpo", "gradient"),
    "pair_sums_per_shard": (pair_sums_per_shard, "cp2", "dpo", "gradient"),
    "pairs_taken_apart": (pairs_taken_apart, "dp2", "dpo", "gradient"),
    "scores_of_one_replica": (scores_of_one_replica, "dp2", "ppo-whole", "gradient"),
    "divergence_per_shard": (divergence_per_shard, "tp2", "forward_kl", "gradient"),
    "teacher_of_the_micro_batch": (teacher_of_the_micro_batch, "dp2", "reverse_kl", "gradient"),
    "prompt_of_another_sample": (prompt_of_another_sample, "tp1:shared", "grpo", "log_prob"),
    "experts_of_nobody": (experts_of_nobody, "tp2+sp:moe", "grpo", "gradient"),
}
"""fault -> (how to plant it, a layout at which it acts, an algorithm, a quantity that shows it)

At dp2 Megatron's factors cancel: two micro-batches, two replicas.
"""


def planted(plant: Plant, fn, *args):
    """`fn(*args)` in a rank with the fault planted."""
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        return fn(*args)


class Sabotaged:
    """Worlds in which every rank has the fault, the single one of the reference too."""

    largest = None
    is_main = True

    def __init__(self, worlds: SharedPools, plant: Plant) -> None:
        self.worlds, self.plant = worlds, plant

    def run(self, size: int, fn, *args):
        return self.worlds.run(size, planted, self.plant, fn, *args)


def verified(worlds: SharedPools, plant: Plant, layout: str, algorithm: str) -> Errors:
    found = verify_layouts((layout,), (algorithm,), Sabotaged(worlds, plant))
    return next(errors for errors in found if errors.algorithm == algorithm)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.slow
def test_a_planted_fault_is_seen(worlds: SharedPools, fault: str) -> None:
    plant, layout, algorithm, quantity = FAULTS[fault]
    assert quantity in verified(worlds, plant, layout, algorithm).exceeded


@pytest.mark.slow
def test_without_a_fault_a_layout_passes(worlds: SharedPools) -> None:
    """The one of them that tests/verify/test_layouts.py does not have."""
    others = {"pp2+vpp2", *(layout for _, layout, _, _ in FAULTS.values())} - {"tp2+sp:moe"}
    assert others == {"tp1:shared", "tp2", "dp2", "cp2", "pp2+vpp2"}
    assert verified(worlds, nothing, "tp2+sp:moe", "grpo").exceeded == []


def test_the_interleaving_trap_is_seen(worlds: SharedPools) -> None:
    """Stages mix up micro-batches: wrong numbers, or tensors that do not fit where lengths differ."""
    try:
        seen = verified(worlds, interleaving_trap, "pp2+vpp2", "grpo").exceeded
    except RuntimeError as error:
        seen = [str(error)] if "must match the size" in str(error) else []
    assert seen
