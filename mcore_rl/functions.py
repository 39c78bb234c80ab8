"""Functions of the user's own, which a configuration names as `module:function`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mcore_rl.errors import AskedToLeave, ConfigError
from mcore_rl.terminal import quoted
from mcore_rl.user_code import place, said

_FORMS = {
    "the sample": (
        "def {name}(sample):",
        "    # sample.text is the response, sample.prompt.label_text the reference answer",
        "    return float(sample.text.strip() == sample.prompt.label_text)",
    ),
    "answer": (
        "def {name}(sample):",
        "    # what the response votes for, or None",
        "    return sample.text.strip() or None",
    ),
    "the candidate": (
        "def {name}(candidate):",
        "    # the chance, from 0 to 1, that candidate.prompt is sampled now",
        "    return 0.1 if candidate.rewards and candidate.rewards[-1] == 1 else 1.0",
    ),
    "the rows": (
        "def {name}(rows, *, scale: float = 1.0):  # after the *, algorithm.params",
        "    from mcore_rl import TokenLoss",
        "    return TokenLoss(-scale * rows.advantage * rows.log_prob)",
    ),
}
"""what a function is given -> one, as an error shows it"""


def wrong_form(key: str, name: str, argument: str, place: str = "") -> ConfigError:
    """The error of a function that does not take one argument, with one that does; `place`: where it is."""
    form = _FORMS["answer" if key.endswith(".answer") else argument]
    lines = [f"    {line}".format(name=name.partition(":")[2]) for line in form]
    what = f"{key}: {name} must be a function of one argument, {argument}{place}"
    return ConfigError("\n".join([f"{what}; write one such as", *lines]))


def load_function(key: str, name: str, argument: str, *, keywords: bool = False) -> Callable[..., Any]:
    """Import the function that `name` (`module:function`) means; `key` is the configuration's key for it.

    The module's directory is on PYTHONPATH or is the current one. Raises ConfigError where the function does
    not exist, its import fails (or ends with sys.exit), or it cannot be called with one positional argument,
    the `argument`; with `keywords`, the caller gives it keyword-only ones besides.
    """
    function = find_function(key, name)
    if not callable(function) or not _takes_one(function, keywords):
        raise wrong_form(key, name, argument)
    return function


def find_function(key: str, name: str) -> Any:
    """What `name` means, whatever it is; see load_function. Raises ConfigError where there is nothing."""
    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute):
        raise ConfigError(
            f"{key}: {quoted(name)} is not of the form `module:function`; of reward() in my_rewards.py it is "
            "`my_rewards:reward`"
        )
    if os.getcwd() not in sys.path:  # the `mcore-rl` script, unlike `python -m`, does not put it there
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, attribute, None)  # a module may have a __getattr__ of its own
    except AskedToLeave:
        raise
    except BaseException as error:  # SystemExit too, of a script without a __main__ guard
        raise ConfigError(
            f"{key}: cannot import {module_name} ({type(error).__name__}: {said(error)}{place(error)}); "
            "fix the module, or put its directory on PYTHONPATH"
        ) from error
    if function is None:
        raise lacks(key, name, dir(module), getattr(module, "__file__", None))
    return function


def lacks(key: str, name: str, names: Iterable[str], file: str | os.PathLike[str] | None) -> ConfigError:
    """The error of a module without the attribute; `file`: the module's, None where it is built in."""
    module, _, attribute = name.partition(":")
    close = get_close_matches(attribute, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "check the name"
    own = Path(*module.split(".")).with_suffix(".py")
    if own.is_file() and (file is None or os.path.realpath(own) != os.path.realpath(file)):
        hint = f"{own} of the current directory has another module's name, which comes first: rename it"
    return ConfigError(f"{key}: {module} ({file or 'built in'}) has no {attribute}; {hint}")


def _takes_one(function: Callable[..., Any], keywords: bool) -> bool:
    try:
        signature = inspect.signature(function)
        only = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        signature.bind(None, **dict.fromkeys(only if keywords else ()))
    except TypeError:
        return False
    except ValueError:  # built-ins without a signature: the first call will tell
        return True
    return True
