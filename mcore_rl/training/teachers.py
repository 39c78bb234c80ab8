"""The frozen teachers of distillation: what they say of packed micro-batches, at the student's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from mcore_rl.config import Config
from mcore_rl.data.examples import Example
from mcore_rl.errors import ConfigError
from mcore_rl.model.build import Model, build_policy
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.layouts import check_layout_of
from mcore_rl.model.policy import PolicyModel
from mcore_rl.model.residency import Offloaded, Residency, ResidentPart, weights_of
from mcore_rl.model.step import forward
from mcore_rl.parallel.head.divergence import Against, Divergence, Teacher
from mcore_rl.parallel.layout import Layout
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.precision import Fp8
from mcore_rl.terminal import joined, quoted
from mcore_rl.training.batch import Batching
from mcore_rl.training.layout import fp8_of
from mcore_rl.training.model_passes import log_probs
from mcore_rl.training.session import sequences_of
from mcore_rl.training.setup import load_tokenizer
from mcore_rl.types import PackedBatch


@dataclass(frozen=True)
class Teachers:
    """The frozen models that a student is compared with, each by its name; every method is collective."""

    models: Mapping[str, Model]
    key: str
    """of a row, which names its teacher; empty where there is one"""
    waiting: Mapping[str, ResidentPart] = field(default_factory=dict)
    """what of them waits in host memory"""

    @property
    def frozen(self) -> dict[str, Model]:
        """Prefix in checkpoints -> model."""
        return {f"teacher.{name}.": model for name, model in self.models.items()}

    def of_row(self, row: Example) -> str:
        """The name of a row's teacher."""
        return row.metadata[self.key] if self.key else next(iter(self.models))

    def split(self, rows: Sequence[Example]) -> dict[str, list[int]]:
        """Name -> numbers of its rows, of the teachers that have any, in the order of the config."""
        names = [self.of_row(row) for row in rows]
        found = {name: [i for i, own in enumerate(names) if own == name] for name in self.models}
        return {name: numbers for name, numbers in found.items() if numbers}

    def states(
        self,
        batches: Mapping[str, Sequence[PackedBatch]],
        divergence: Divergence,
        residency: Residency,
    ) -> list[Against | None]:
        """What every micro-batch is compared with, in order; None off the last pipeline stage.

        Args:
            batches: name -> the micro-batches whose rows are compared with that teacher.
        """
        with residency.during("teacher"):
            return [
                one for name, its in batches.items() for one in against(self.models[name], its, divergence)
            ]

    def log_probs(
        self, rows: Sequence[Example], shape: Batching, temperature: float, residency: Residency
    ) -> list[np.ndarray]:
        """float32 log-probs [n] of the trained tokens of every row's sequence, by its own teacher."""
        found: dict[int, np.ndarray] = {}
        with residency.during("teacher"):
            for name, numbers in self.split(rows).items():
                sequences = sequences_of([rows[i] for i in numbers])
                scored = log_probs(self.models[name], sequences, shape, temperature)
                found |= dict(zip(numbers, scored, strict=True))
        return [found[i] for i in range(len(rows))]


def against(model: Model, batches: Sequence[PackedBatch], divergence: Divergence) -> list[Against | None]:
    """What a teacher says of each micro-batch, to compare with; None off the last stage. Collective."""
    found = forward(model, batches, 1.0, states=True)
    if not model.mesh.is_last_stage:
        return [None] * len(batches)
    weight, scales = head_of(model), model.arch.scales
    return [
        Against(Teacher(states.to(weight.dtype), weight, scales.logits_cap, scales.logits), divergence)
        for _, states in found
    ]


def head_of(model: Model) -> Tensor:
    """[V_local, H] the output layer of a policy, on the last pipeline stage."""
    last = model.unwrapped[-1]
    assert isinstance(last, PolicyModel)
    return last.lm_head.detach()


def start_teachers(config: Config, mesh: Mesh) -> Teachers:
    """The teachers at the student's layout, where residency.teacher has them; collective.

    Raises:
        ConfigError, LayoutError: as `check_teachers` and build_policy.
    """
    m = config.model
    fp8 = Fp8(m.fp8_recipe, param_gather=False, first_last_bf16=fp8_of(config).first_last_bf16)
    models = {
        name: build_policy(path, mesh, precision=m.precision, fp8=fp8)
        for name, path in config.distill.teachers.items()
    }
    key = config.distill.teacher_key
    if config.residency.teacher == "resident":
        return Teachers(models, key)
    offloaded = Offloaded(partial(_waiting_weights, list(models.values())), constant=True)
    return Teachers(models, key, {"teacher": offloaded})


def _waiting_weights(models: Sequence[Model]) -> list[Tensor]:
    """The weights that only a teacher's own pass reads: all but the output layers."""
    found: list[Tensor] = []
    for model in models:
        kept = head_of(model).untyped_storage()._cdata if model.mesh.is_last_stage else None
        found += [one for one in weights_of(model) if one.untyped_storage()._cdata != kept]
    return found


def check_teachers(config: Config, layout: Layout) -> None:
    """Refuse teachers that no student of this vocabulary, at this layout, can be compared with.

    Raises:
        ConfigError: a teacher is no supported model, or has another vocabulary; says what differs.
        LayoutError: a teacher does not divide by the layout.
    """
    for name, path in config.distill.teachers.items():
        where = f"distill.teachers.{name}"
        check_layout_of(read_architecture(path), layout, where)
        _check_same_vocabulary(where, config.model.path, path)


def _check_same_vocabulary(where: str, student: Path, teacher: Path) -> None:
    rows = [read_architecture(path).vocab for path in (student, teacher)]
    ours, theirs = (load_tokenizer(path).get_vocab() for path in (student, teacher))
    names = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    remedy = "a teacher speaks of the same tokens as its student; use one of its family, or train with sft"
    if names:
        some = joined(quoted(token) for token in names[:3])
        raise ConfigError(
            f"{where}: {teacher} and model.path have different tokenizers ({len(names)} tokens, such as "
            f"{some}); {remedy}"
        )
    if rows[0] != rows[1]:
        raise ConfigError(
            f"{where}: {teacher} has vocab_size {rows[1]} in config.json and model.path {rows[0]}; {remedy}"
        )
