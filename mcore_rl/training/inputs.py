"""What a run reads besides its training prompts, models and held-out sets: a resume compares its content."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from mcore_rl.checkpoint import Saved
from mcore_rl.config import Config
from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.content import file_content, model_content

Inputs = Mapping[str, Mapping[str, str]]
"""key of the config -> part -> its digest"""
MODELS = ("model.path", "reward.model", "critic.path", "distill.teachers.")
"""what the keys of models begin with"""


def inputs_of(config: Config) -> Inputs:
    """The digests of what `config` names, for the main rank.

    Raises:
        ConfigError: a directory holds no model.
    """
    found = {"model.path": model_content(config.model.path, weights=not config.model.random_init)}
    if config.reward.model is not None:
        found["reward.model"] = model_content(config.reward.model, weights=True)
    if config.critic.path is not None:
        found["critic.path"] = model_content(config.critic.path, weights=False)  # those in training are saved
    for name, path in config.distill.teachers.items():
        found[f"distill.teachers.{name}"] = model_content(path, weights=True)
    for name, one in config.held_out.items():
        key = f"eval.sets.{name}.path" if name in config.eval.sets else "data.eval"
        with suppress(OSError):  # whoever reads the set says so
            found[key] = {"content": file_content(one.path)}
    return found


def check_inputs(saved: Saved, now: Inputs) -> None:
    """Whether the models are those that the saved run had: its reference and its rewards depend on them.

    Raises ConfigError, which names what is another one.
    """
    then = _of(saved)
    for key in filter(_is_model, then):
        parts = now.get(key, {})
        changed = [name for name, digest in then.get(key, {}).items() if parts.get(name, digest) != digest]
        if changed:
            raise ConfigError(
                f"{key}: {' and '.join(changed)} changed since {saved.path} was saved: the run would go on "
                "with another model than it began with. Resume with the directory as it was, or start a new "
                "run from the weights of the last step"
            )


def changed_sets(saved: Saved, now: Inputs) -> list[str]:
    """Keys of held-out sets whose files hold something else than in the saved run."""
    then = _of(saved)
    return [key for key in now if not _is_model(key) and then.get(key, now[key]) != now[key]]


def _is_model(key: str) -> bool:
    return key.startswith(MODELS)


def knows_inputs(saved: Saved) -> bool:
    """Whether the checkpoint says what the run read: earlier versions did not."""
    return bool(_of(saved))


def _of(saved: Saved) -> Inputs:
    found = saved.document.get("inputs")
    return found if isinstance(found, dict) else {}
