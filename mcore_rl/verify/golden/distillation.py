"""Golden cases of a student's divergence from its teacher: distillation.npz.

Legend: N positions, V vocabulary, D and D' hidden sizes of student and teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from mcore_rl.algo.distillation import ForwardKL, JensenShannon, ReverseKL
from mcore_rl.parallel.head import Call
from mcore_rl.parallel.head.divergence import Divergence, Teacher, divergence_loss
from mcore_rl.verify.golden.inputs import GoldenInputs, Outputs
from mcore_rl.verify.golden.samples import Case

INPUTS = frozenset({"Hs", "Ws", "Ht", "Wt", "weight", "temperature"})


def _outputs(p: GoldenInputs, divergence: Divergence) -> Outputs:
    """per_token [N], loss, dW [V, D] and dH [N, D] of sum(weight x divergence)."""
    hidden, whole, of_teacher, teacher_weight, weight = (
        p.tensor(name, "distillation") for name in ("Hs", "Ws", "Ht", "Wt", "weight")
    )
    hidden, shard = hidden.requires_grad_(), p.shard(whole).requires_grad_()
    targets = torch.zeros(len(hidden), dtype=torch.int64)
    temperature = p.scalar("temperature", "distillation")
    call = Call.of(shard, targets, temperature, group=p.group, vocab_size=len(whole))
    seen = torch.zeros_like(weight)

    def loss(rows: slice, value: Tensor) -> Tensor:
        seen[rows] = value.detach()
        return (weight[rows] * value).sum()

    teacher = Teacher(of_teacher, p.shard(teacher_weight))
    total = divergence_loss(hidden, shard, teacher, call, divergence, loss)
    d_hidden, d_shard = torch.autograd.grad(total, (hidden, shard))
    return {
        "per_token": seen,
        "loss": (weight * seen).sum(),
        "dW": p.gather(d_shard)[: len(whole)],
        "dH": d_hidden,
    }


CASES: Mapping[str, Case] = {
    "forward_kl": partial(_outputs, divergence=ForwardKL()),
    "reverse_kl": partial(_outputs, divergence=ReverseKL()),
    "jsd_#": lambda p, beta: _outputs(p, JensenShannon(beta)),
}
