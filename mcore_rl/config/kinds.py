"""The keys that only some kinds of training read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from mcore_rl.config.rows import (
    DistillConfig,
    PreferenceConfig,
    RewardModelConfig,
    SupervisedConfig,
    SupervisedTarget,
)
from mcore_rl.config.sections import DataConfig, Kind
from mcore_rl.terminal import short

_OF_LOSSES: Mapping[str, tuple[str, ...]] = {
    "label_smoothing": ("dpo", "rdpo"),
    "average": ("ipo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""key of [preference] -> the losses that read it"""


def unused_of_kind(
    kind: Kind,
    target: SupervisedTarget,
    preference: PreferenceConfig,
    distill: DistillConfig,
    *,
    samples: bool,
) -> Iterator[tuple[str, str]]:
    """(key, why) for keys of rows that are trained as they are, where the kind of the run does not read them.

    Args:
        target: supervised.target.
        samples: there are held-out sets of prompts, which [data] says how to read.
    """
    why = f'run.kind is "{kind}"'
    on_policy = kind == "distill" and distill.on_policy
    if kind == "rl" or on_policy:
        sampled = f"{why}, and trains on what is sampled" if on_policy else why
        yield from ((f"supervised.{key}", sampled) for key in SupervisedConfig.model_fields)
        yield "data.validation", sampled
    elif kind not in ("sft", "distill"):
        yield "supervised.target", why
    yield from _unused_of_distillation(kind, distill)
    if kind != "preference":
        yield from ((f"preference.{key}", why) for key in PreferenceConfig.model_fields)
    else:
        for key, losses in _OF_LOSSES.items():
            if preference.loss not in losses:
                yield f"preference.{key}", f'preference.loss is "{preference.loss}"'
    if kind != "reward_model":
        yield from ((f"reward_model.{key}", why) for key in RewardModelConfig.model_fields)
    else:
        yield from ((key, f"{why}, and nothing is sampled") for key in ("data.eval", "eval.sets"))
    read = keys_of_answers(kind, preference)
    yield from ((f"data.{key}", why) for key in _ANSWERS if key not in read)
    if not samples:
        yield from _unused_of_prompts(kind, target, read)


def _unused_of_distillation(kind: Kind, distill: DistillConfig) -> Iterator[tuple[str, str]]:
    if kind != "distill":
        yield from ((f"distill.{key}", f'run.kind is "{kind}"') for key in DistillConfig.model_fields)
        yield "residency.teacher", f'run.kind is "{kind}"'
        return
    if distill.divergence != "jsd":
        yield "distill.beta", f'distill.divergence is "{distill.divergence}"'
    if len(distill.teachers) == 1:
        yield "distill.teacher_key", "there is one teacher"


def _unused_of_prompts(
    kind: Kind, target: SupervisedTarget, read: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Keys that only prompts with labels need, where rows have another form and none is sampled."""
    if kind in ("sft", "distill") and target != "label":
        reads = f'supervised.target is "{target}", which reads a conversation'
        yield from ((f"data.{key}", reads) for key in ("label_key", "last_assistant", "apply_chat_template"))
    if read:
        yield "data.last_assistant", f'run.kind is "{kind}", whose rows have their answers'
    if "chosen_key" in read:
        yield "data.label_key", f'run.kind is "{kind}", which reads pairs'


_ANSWERS = ("chosen_key", "rejected_key", "completion_key", "margin_key")


def keys_of_answers(kind: Kind, preference: PreferenceConfig) -> tuple[str, ...]:
    """The keys of [data] that name answers, of those that the kind reads."""
    if kind == "reward_model":
        return ("chosen_key", "rejected_key", "margin_key")
    if kind != "preference":
        return ()
    return ("completion_key",) if preference.loss == "kto" else ("chosen_key", "rejected_key")


def keys_of_one_name(kind: Kind, preference: PreferenceConfig, data: DataConfig) -> Iterator[str]:
    """`section.key: what, remedy` for two keys that would read the same field of a row as two things."""
    answers = keys_of_answers(kind, preference)
    if "completion_key" in answers:
        answers = (*answers, "label_key")
    named: dict[str, str] = {"prompt_key": data.prompt_key} if answers else {}
    for key in answers:
        name = getattr(data, key)
        for other, its in named.items():
            if name and name == its:
                yield f"data.{key}: {short(name)!r} is data.{other} as well; name the field that it is"
        named[key] = name


def wrong_of_kind(
    kind: Kind,
    preference: PreferenceConfig,
    distill: DistillConfig,
    supervised: SupervisedConfig,
    reference: str,
) -> Iterator[str]:
    """`section.key: what, remedy` for what cannot go together in training on rows as they are.

    Args:
        reference: residency.reference.
    """
    if kind == "preference" and preference.loss == "kto" and supervised.batch_size < 2:
        yield "supervised.batch_size: kto asks of a prompt with the answer of another row; set 2 or more"
    if reference == "kept" and kind == "rl":
        yield 'residency.reference: "kept" takes rows that are known before; set "swapped", or drop it'
    if reference == "kept" and kind == "preference" and preference.loss == "kto":
        yield (
            'residency.reference: kto asks of prompts with answers of other rows, which "kept" does not '
            'have; set "swapped", or drop it'
        )
    if kind == "distill":
        yield from _wrong_of_distillation(distill)


def _wrong_of_distillation(distill: DistillConfig) -> Iterator[str]:
    if not distill.teachers:
        yield 'distill.teachers: required; name a model directory, as in teachers = {large = "models/large"}'
    if len(distill.teachers) > 1 and not distill.teacher_key:
        yield (
            f"distill.teacher_key: required with {len(distill.teachers)} teachers; name the key of a row "
            "that says which of them is its own"
        )
    if distill.divergence == "sampled" and not distill.on_policy:
        yield (
            'distill.divergence: "sampled" is of tokens that the student drew; set distill.on_policy = '
            'true, or take "reverse"'
        )
