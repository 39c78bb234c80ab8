"""The keys that only some kinds of training read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mcore_rl.config.rows import PreferenceConfig, RewardModelConfig, SupervisedConfig, SupervisedTarget
from mcore_rl.config.sections import Kind

_OF_LOSSES: Mapping[str, tuple[str, ...]] = {
    "label_smoothing": ("dpo", "rdpo"),
    "average": ("ipo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""key of [preference] -> the losses that read it"""


def unused_of_kind(
    kind: Kind, target: SupervisedTarget, preference: PreferenceConfig
) -> Iterator[tuple[str, str]]:
    """(key, why) for keys of rows that are trained as they are, where the kind of the run does not read them.

    Args:
        target: supervised.target.
    """
    why = f'run.kind is "{kind}"'
    if kind == "rl":
        yield from ((f"supervised.{key}", why) for key in SupervisedConfig.model_fields)
        yield "data.validation", why
    elif kind != "sft":
        yield "supervised.target", why
    if kind == "sft" and target != "label":
        reads = f'supervised.target is "{target}", which reads a conversation'
        yield from ((f"data.{key}", reads) for key in ("label_key", "last_assistant", "apply_chat_template"))
    if kind != "preference":
        yield from ((f"preference.{key}", why) for key in PreferenceConfig.model_fields)
    else:
        yield "data.last_assistant", why
        for key, losses in _OF_LOSSES.items():
            if preference.loss not in losses:
                yield f"preference.{key}", f'preference.loss is "{preference.loss}"'
    if kind != "reward_model":
        yield from ((f"reward_model.{key}", why) for key in RewardModelConfig.model_fields)
    else:
        yield from ((key, why) for key in ("data.last_assistant", "data.eval", "eval.sets"))
    read = keys_of_answers(kind, preference)
    yield from ((f"data.{key}", why) for key in _ANSWERS if key not in read)
    if "chosen_key" in read:
        yield "data.label_key", f"{why}, which reads pairs"


_ANSWERS = ("chosen_key", "rejected_key", "completion_key", "margin_key")


def keys_of_answers(kind: Kind, preference: PreferenceConfig) -> tuple[str, ...]:
    """The keys of [data] that name answers, of those that the kind reads."""
    if kind == "reward_model":
        return ("chosen_key", "rejected_key", "margin_key")
    if kind != "preference":
        return ()
    return ("completion_key",) if preference.loss == "kto" else ("chosen_key", "rejected_key")


def wrong_of_kind(kind: Kind, preference: PreferenceConfig, reference: str) -> Iterator[str]:
    """`section.key: what, remedy` for what cannot go together in training on rows as they are.

    Args:
        reference: residency.reference.
    """
    if reference == "kept" and kind == "rl":
        yield 'residency.reference: "kept" takes rows that are known before; set "swapped", or drop it'
    if reference == "kept" and kind == "preference" and preference.loss == "kto":
        yield (
            'residency.reference: kto asks of prompts with answers of other rows, which "kept" does not '
            'have; set "swapped", or drop it'
        )
