"""What a run would stop at, seen in a fraction of a second: before torch is imported, and ranks are started.

The user's modules are read and not run: to import one may take any time, and may do anything. What this does
not see is seen later, by what reads it wholly.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from mcore_rl.config import Config
from mcore_rl.data.locate import Located, locate
from mcore_rl.data.opening import open_table
from mcore_rl.errors import ConfigError, DataError
from mcore_rl.functions import lacks, wrong_form
from mcore_rl.launch.parts import check_weights, weighed
from mcore_rl.lookup import MISSING, look_up, missing

MOST_RANKS = 8
"""of a run that is looked at"""
MOST_ROWS = 500
"""of each file of prompts that are looked at"""
_MOST_BYTES = 64 << 20
"""a larger file is opened by the ranks alone"""
_MOST_FILES = 8


def first_look(config: Config) -> None:
    """Look at the paths, the first rows and the functions that a configuration names.

    One that asks for more ranks than a machine without GPUs runs is told first what it needs: its files may
    be on a cluster.

    Raises:
        ConfigError, DataError: a model or file is not there, a row is malformed, or a function is not in its
            module, or takes something else than what it is given.
    """
    p = config.parallel
    if p.tensor * p.pipeline * p.context * (p.data or 1) > MOST_RANKS:
        return
    _look_at_model(config)
    for path in config.data.train:
        _look_at_rows(config, path)
    for key, name in _named_functions(config):
        _look_for_module(key, name)
    for key, name, argument, keywords in _functions(config):
        _look_at_function(key, name, argument, keywords=keywords)
    for name, weights in weighed(config):
        file = _file_of(name.partition(":")[0])
        if file is not None and (tree := _parsed(file)) is not None:
            check_weights(name, tree, weights, str(file))
    for key, path in _held_out(config):
        _files_of(key, path)


def _look_at_model(config: Config) -> None:
    file = config.model.path / "config.json"
    if not file.exists():
        raise ConfigError(f"{file}: not found; give the path of a Hugging Face model directory")


def _held_out(config: Config) -> Iterator[tuple[str, Path]]:
    """(key, path) of rows that are evaluated, or that a loss is measured on."""
    named = {"data.eval": config.data.eval, "data.validation": config.data.validation}
    named |= {f"eval.sets.{name}.path": one.path for name, one in config.eval.sets.items()}
    yield from ((key, path) for key, path in named.items() if path is not None)


def _files_of(key: str, path: Path) -> Located:
    """Where the rows of `path` are. Raises ConfigError, DataError where a file is not there."""
    try:
        located = locate(path)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    for file in located.files[:_MOST_FILES]:
        if not file.exists():
            raise ConfigError(f"{key}: {file}: No such file or directory; check the path")
    return located


def _look_at_rows(config: Config, path: Path) -> None:
    located = _files_of("data.train", path)
    for file in located.files[:_MOST_FILES]:
        plain = file.is_file() and not file.name.endswith((".parquet", ".gz"))
        if not plain or file.stat().st_size > _MOST_BYTES or located.rows != slice(None):
            continue
        table = open_table(file)
        for row in range(min(len(table), MOST_ROWS)):
            record = table.record(row)
            for key in _required(config):
                if look_up(record, key) is MISSING:
                    raise missing(table.place(row), key, record, "add it, or name the key in [data]")


def _required(config: Config) -> Iterator[str]:
    """Keys without which no prompt is read; what rows of other kinds need is for their own reader."""
    data = config.data
    if config.run.kind == "rl":
        yield data.prompt_key
        if data.label_key and data.last_assistant == "refuse" and config.reward.model is None:
            yield data.label_key


def _named_functions(config: Config) -> Iterator[tuple[str, str]]:
    """(key, `module:function`) of everything of the user's own that this run imports."""
    reward, tables = config.reward, config.reward.functions
    kept = {"reward.function": reward.function if reward.model is None and not tables else None}
    kept |= {f"reward.functions.{name}.function": table.function for name, table in tables.items()}
    kept |= {"data.curriculum": config.data.curriculum, "algorithm.loss": config.algorithm.loss}
    kept |= {"environment.function": config.environment.function}
    named = kept if config.run.kind == "rl" else {}
    named |= {f"eval.sets.{name}.reward": one.reward for name, one in config.eval.sets.items()}
    yield from ((key, name) for key, name in named.items() if name)


def _look_for_module(key: str, name: str) -> None:
    """Raises ConfigError for a module that is nowhere; what is asked of the packages around it runs none."""
    module = name.partition(":")[0]
    parts = module.split(".")
    places: Sequence[str] = [*sys.path, os.getcwd()]
    for depth in range(1, len(parts) + 1):
        part = ".".join(parts[:depth])
        # by its own name in its package's places: of a whole name, PathFinder wants the package imported
        spec = PathFinder.find_spec(parts[depth - 1], places) or (find_spec(part) if depth == 1 else None)
        if spec is None:
            raise ConfigError(
                f"{key}: there is no module {part} in {os.getcwd()} or on PYTHONPATH; put its directory on "
                "PYTHONPATH, or check the name"
            )
        if spec.submodule_search_locations is None or _extends_itself(spec.origin):
            return
        places = [*spec.submodule_search_locations]


def _extends_itself(file: str | None) -> bool:
    """Whether a package says itself where its modules are."""
    try:
        return file is not None and b"__path__" in Path(file).read_bytes()
    except OSError:
        return True


def _functions(config: Config) -> Iterator[tuple[str, str, str, bool]]:
    """(key, `module:function`, its argument, whether it has keyword-only ones) of what takes one."""
    if config.run.kind != "rl":
        return
    if config.reward.model is None and not config.reward.functions:
        yield "reward.function", config.reward.function, "the sample", False
    if config.data.curriculum is not None:
        yield "data.curriculum", config.data.curriculum, "the candidate", False
    if config.algorithm.loss is not None:
        yield "algorithm.loss", config.algorithm.loss, "the rows", True


def _look_at_function(key: str, name: str, argument: str, *, keywords: bool) -> None:
    module, _, wanted = name.partition(":")
    file = _file_of(module)
    if file is None:
        return
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise ConfigError(
            f"{key}: cannot import {module}: {file}:{line or 1}: {error}; fix the module"
        ) from None
    except OSError:
        return
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    found = [node for node in defined if node.name == wanted and not node.decorator_list]
    if found and not _takes_one(found[-1].args, keywords=keywords):
        raise wrong_form(key, name, argument, f" ({file}:{found[-1].lineno})")
    names = _names(tree)
    if not found and names is not None and wanted not in names:
        raise lacks(key, name, names, file)


def _parsed(file: Path) -> ast.Module | None:
    """What a module says; None where whoever imports it will say why it cannot be read."""
    try:
        return ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError):
        return None


def _file_of(module: str) -> Path | None:
    """The file of a module that is one of the user's; None where it may be anywhere else."""
    for place in (*sys.path, os.getcwd()):
        path = Path(place or ".").joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def _takes_one(arguments: ast.arguments, *, keywords: bool) -> bool:
    every = [*arguments.posonlyargs, *arguments.args]
    needed = len(every) - len(arguments.defaults)
    only = sum(default is None for default in arguments.kw_defaults)
    return needed <= 1 and bool(every or arguments.vararg) and (keywords or not only)


def _names(tree: ast.Module) -> set[str] | None:
    """Every name that the module may bind; None where that cannot be read off it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.Name):
            found.add(node.id)
    return None if found & {"*", "__getattr__", "globals", "vars", "setattr", "exec"} else found
