"""Whether a run can train on a dump: same tokens, same temperature, weights that are young enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mcore_rl.config import Config
from mcore_rl.data.packing import padded
from mcore_rl.dumps.rollouts import RolloutDump
from mcore_rl.errors import ConfigError, DataError
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.rollout.experts import check_experts
from mcore_rl.terminal import quoted
from mcore_rl.training.batch import Batching
from mcore_rl.training.data import fewest_positions
from mcore_rl.training.keep_rollouts import words_of
from mcore_rl.types import ExpertLayers, Sample, Segment


@dataclass(frozen=True)
class Trainable:
    """What a run can train on."""

    vocabulary: int
    """rows of the policy"""
    positions: tuple[int, str] | None
    """tokens of the longest sequence, if a model has a limit, and which model that is"""
    shape: Batching
    """how samples become micro-batches"""
    temperature: float
    max_staleness: int
    experts: ExpertLayers | None
    """of the policy, where its routing is replayed"""
    piece: Callable[[int], str]
    """the text of a token id"""

    @classmethod
    def of(
        cls, config: Config, tokenizer: PreTrainedTokenizerBase, shape: Batching, experts: ExpertLayers | None
    ) -> Trainable:
        """Those of the run of a config."""
        return cls(
            vocabulary=read_architecture(config.model.path).vocab,
            positions=fewest_positions(config),
            shape=shape,
            temperature=config.rollout.temperature,
            max_staleness=config.rollout.max_staleness,
            experts=experts,
            piece=words_of(tokenizer).piece,
        )


def check_dump(dump: RolloutDump, fit: Trainable, path: Path) -> None:
    """Raises DataError for a dump of another model, ConfigError where this run's config is in its way."""
    samples = [s for group in dump.groups for s in group.samples if not s.void]
    if not samples:
        raise DataError(f"{path}: holds no sample that could be trained; move it away, or sample it anew")
    if dump.temperature != fit.temperature:
        raise ConfigError(
            f"{path}: was sampled at temperature {dump.temperature:g}, at which its log-probs are; set "
            f"rollout.temperature = {dump.temperature:g}"
        )
    _check_tokens(dump, fit, path)
    _check_ages(samples, dump.step, fit, path)
    for sample in samples:
        for segment in sample.segments:
            _check_segment(segment, fit, f"{path}: sample {quoted(sample.id)}")


def _check_tokens(dump: RolloutDump, fit: Trainable, path: Path) -> None:
    """The ids mean here what they meant where they were sampled."""
    remedy = "train with the model.path that it was sampled from, or another of its family"
    for id, text in dump.pieces.items():
        if not 0 <= id < fit.vocabulary:
            raise DataError(f"{path}: token {id} is none of the model's {fit.vocabulary}; {remedy}")
        if fit.piece(id) != text:
            raise DataError(
                f"{path}: token {id} was {quoted(text)} to the tokenizer that it was sampled with, and is "
                f"{quoted(fit.piece(id))} to this one; {remedy}"
            )


def _check_ages(samples: list[Sample], step: int, fit: Trainable, path: Path) -> None:
    versions = {int(v.version) for s in samples for segment in s.segments for v in segment.versions}
    if versions and max(versions) > step - 1:
        raise DataError(
            f"{path}: has tokens of weight version {max(versions)}, which step {step} came before; sample it "
            "anew"
        )
    oldest = step - 1 - min(versions, default=step - 1)
    if oldest > fit.max_staleness:
        raise ConfigError(
            f"{path}: was sampled from weights {oldest} versions older than those that train on it; set "
            f"rollout.max_staleness = {oldest} with a correction (algorithm.params.correction), or train "
            "fewer steps of it"
        )


def _check_segment(segment: Segment, fit: Trainable, where: str) -> None:
    length = len(segment.context) + len(segment.token_ids)
    if fit.positions is not None and length > fit.positions[0]:
        positions, whose = fit.positions
        raise DataError(f"{where}: {length} tokens, {whose} has {positions} positions; sample it anew")
    packed, budget = int(padded(length, fit.shape.align)), fit.shape.tokens_per_micro_batch
    if packed > budget:
        raise ConfigError(
            f"{where}: {length} tokens, {packed} with their padding, do not fit into a micro-batch; set "
            f"train.tokens_per_micro_batch = {packed}, not {budget}"
        )
    if fit.experts is None:
        return
    if segment.experts is None:
        raise ConfigError(
            f"{where}: was sampled without its experts; set rollout.routing_replay = false, or sample it anew"
        )
    try:
        check_experts(segment.experts, fit.experts)
    except ValueError as error:
        raise DataError(f"{where}: {error}; sample it anew") from error
