"""Which room of the package may import which: the direction of the arrows keeps the maths testable."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Mapping
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.sources import READERS, functions, modules, report

pytestmark = READERS

EVERYTHING = frozenset({""})
"""the empty prefix: every module of the package"""

BASE = frozenset({"errors", "types", "precision", "lora", "tuning", "strict_json"})
BASE |= {"terminal", "before_megatron", "imports", "weight_files", "functions", "kindred", "user_code"}
BASE |= {"spans", "screen", "small_server", "lookup"}
DISK = frozenset({"directories"})
"""for rooms that write files"""
FLOORS_BELOW = frozenset(
    {"algo", "parallel", "model", "weights", "rollout", "rewards", "data", "environments", "config"}
)
FLOORS_BELOW |= {"log", "checkpoint", "metric_names", "dumps", "trackers", "timeline"}
"""what training is made of"""
ALLOWED: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "metric_names": frozenset({"terminal"}),
    "types": frozenset({"errors"}),
    "precision": frozenset(),
    "lora": frozenset(),
    "tuning": frozenset(),
    "strict_json": frozenset(),
    "lookup": frozenset({"errors", "terminal"}),
    "spans": frozenset(),
    "small_server": frozenset(),
    "screen": frozenset({"spans", "terminal"}),
    "timeline": BASE | DISK,
    "terminal": frozenset(),
    "streams": frozenset({"errors"}),
    "weight_files": frozenset({"errors", "terminal"}),
    "functions": frozenset({"errors", "terminal", "user_code"}),
    "user_code": frozenset({"errors", "terminal"}),
    "before_megatron": frozenset(),
    "imports": frozenset(),
    "kindred": frozenset(),
    "directories": frozenset({"errors", "terminal"}),
    "algo": BASE,
    "parallel": BASE,
    "model": BASE | DISK | {"parallel"},
    "weights": BASE | DISK | {"parallel", "model", "rollout.adapters", "rollout.client", "rollout.fleet"},
    "rollout": BASE,
    "rewards": BASE,
    "data": BASE,
    "environments": BASE | DISK | {"data", "rewards.outcome", "rollout"},
    "config": BASE | {"algo"},
    "server": BASE | DISK | {"streams", "rollout.experts"},
    "log": BASE | DISK,
    "trackers": BASE,
    "dumps": BASE | DISK | {"rollout.columns", "rollout.reply"},
    "report": BASE | DISK | {"log", "metric_names", "dumps"},
    "checkpoint": BASE | DISK | {"parallel", "model"},
    "training": BASE | DISK | FLOORS_BELOW,
    "launch": BASE | DISK | FLOORS_BELOW | {"training"},
    "verify": EVERYTHING,
    "plan": EVERYTHING,
    "doctor": EVERYTHING,
    "convert": EVERYTHING,
    "evaluate": EVERYTHING,
    "talk": EVERYTHING,
    "demo": BASE | DISK | {"log", "config"},
    "commands": EVERYTHING,
    "__main__": EVERYTHING,
    "__init__": EVERYTHING,
}
"""room -> modules of the package that it may import (prefixes), besides itself"""

THIRD_PARTY: dict[str, frozenset[str]] = {
    "algo": frozenset({"torch", "jaxtyping"}),
    "parallel": frozenset(
        {"torch", "jaxtyping", "triton", "megatron.core.parallel_state", "megatron.core.tensor_parallel"}
    ),
}
"""rooms that may import only these from outside the standard library"""

FORBIDDEN: dict[str, frozenset[str]] = {
    "algo": frozenset({"torch.distributed", "megatron"}),
    "rollout": frozenset({"torch.distributed", "megatron"}),
    "rewards": frozenset({"torch.distributed", "megatron"}),
    "data": frozenset({"torch.distributed", "megatron"}),
}


def room_of(path: str) -> str:
    """`mcore_rl/algo/losses.py` -> `algo`, `mcore_rl/types.py` -> `types`."""
    return path.removeprefix("mcore_rl/").removesuffix(".py").split("/")[0]


def imports(path: str, tree: ast.AST) -> set[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, wherever in it; `from a import b` is `a.b`."""
    package = path.removesuffix(".py").split("/")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(node.lineno, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {(node.lineno, f"{module}.{alias.name}") for alias in node.names}
    return found


def within(name: str, prefixes: frozenset[str]) -> bool:
    return any(not prefix or name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def violations(path: str, tree: ast.AST) -> list[str]:
    room = room_of(path)
    if room not in ALLOWED:
        return [f"{path}: {room!r} is a new room: say in ALLOWED what it may import"]
    return [
        f"{path}:{line}: {room} must not import {name}"
        for line, name in sorted(imports(path, tree))
        if not legal(room, name)
    ]


def legal(room: str, name: str) -> bool:
    if name.startswith("mcore_rl."):
        return within(name.removeprefix("mcore_rl."), ALLOWED[room] | {room})
    if within(name, FORBIDDEN.get(room, frozenset())):
        return False
    standard = name.split(".")[0] in sys.stdlib_module_names
    return standard or room not in THIRD_PARTY or within(name, THIRD_PARTY[room])


READERS = frozenset(
    {"training", "launch", "evaluate", "plan", "doctor", "talk", "demo", "commands", "__init__"}
)
"""rooms that read the configuration; below them, functions take the numbers they need"""


def test_the_configuration_is_read_where_the_documents_say() -> None:
    found = {
        room_of(path)
        for path, tree in modules("mcore_rl").items()
        for _, name in imports(path, tree)
        if within(name, frozenset({"mcore_rl.config"}))
    }
    assert found - {"config"} == READERS


def test_imports_follow_the_arrows() -> None:
    report([problem for path, tree in modules("mcore_rl").items() for problem in violations(path, tree)])


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mcore_rl/algo/losses.py", "import torch.distributed as dist"),
        ("mcore_rl/algo/losses.py", "def f():\n    from torch import distributed"),
        ("mcore_rl/algo/losses.py", "import numpy"),
        ("mcore_rl/algo/losses.py", "from mcore_rl.parallel import mesh"),
        ("mcore_rl/algo/losses.py", "from ..parallel.mesh import Mesh"),
        ("mcore_rl/parallel/head/head.py", "from mcore_rl import model"),
        ("mcore_rl/parallel/head/head.py", "from megatron.core.models.gpt import GPTModel"),
        ("mcore_rl/rollout/client.py", "from mcore_rl.model.build import build_policy"),
        ("mcore_rl/model/step.py", "from mcore_rl.config import Config"),
        ("mcore_rl/weights/disk.py", "from mcore_rl.rollout.sampler import sample_groups"),
        ("mcore_rl/newcomer.py", ""),
    ],
)
def test_the_gate_sees_a_wrong_arrow(path: str, source: str) -> None:
    assert len(violations(path, ast.parse(source))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mcore_rl/algo/losses.py", "import math, torch\nfrom torch import Tensor\nfrom . import rows"),
        ("mcore_rl/parallel/mesh.py", "from megatron.core import parallel_state"),
        ("mcore_rl/weights/disk.py", "from mcore_rl.rollout.client import RolloutClient"),
        ("mcore_rl/training/loop.py", "from mcore_rl.config import Config"),
    ],
)
def test_the_gate_lets_the_right_arrows_pass(path: str, source: str) -> None:
    assert violations(path, ast.parse(source)) == []


def circle(files: Mapping[str, ast.AST]) -> list[str]:
    """Modules that import each other in a circle, imports under TYPE_CHECKING or in functions included."""
    trees = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in files}
    arrows = {
        module: {_module_of(name, trees) for _, name in imports(path, files[path])} - {module, ""}
        for module, path in trees.items()
    }
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _module_of(name: str, modules: Collection[str]) -> str:
    """The module that `from module import name` loads; "" for none of these."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def test_no_files_import_each_other_in_a_circle() -> None:
    report([" -> ".join(found)] if (found := circle(modules("mcore_rl"))) else [])


@pytest.mark.parametrize(
    "source",
    [
        "from mcore_rl.training.loop import train",
        "def late():\n    from mcore_rl.training import loop",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mcore_rl.training.loop import train",
    ],
)
def test_the_gate_sees_a_planted_circle(source: str) -> None:
    files = modules("mcore_rl")
    batch = files["mcore_rl/training/batch.py"]
    files["mcore_rl/training/batch.py"] = ast.Module([*batch.body, *ast.parse(source).body], [])
    assert {"mcore_rl.training.batch", "mcore_rl.training.loop"} <= {*circle(files)}


WHOLE = frozenset({"Run", "Learner", "Trainer"})
AT_MOST = 10


def taking_the_whole(files: Mapping[str, ast.AST]) -> list[str]:
    """Functions and methods of training/ with a parameter of type Run, Learner or Trainer."""
    return [
        f"{path}:{function.lineno}: {function.name}"
        for path, tree in files.items()
        for function in functions(tree)
        for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        if isinstance(argument.annotation, ast.Name) and argument.annotation.id in WHOLE
    ]


def test_few_functions_take_the_whole_run_or_trainer() -> None:
    found = taking_the_whole(modules("mcore_rl/training"))
    report(found if len(found) > AT_MOST else [])


def test_the_gate_sees_a_function_that_takes_the_whole_run() -> None:
    source = """
class A:
    def f(self, *, run: Run): ...
def g(trainer: Trainer, mesh: Mesh): ...
def h(mesh: Mesh): ...
"""
    assert {line.split()[-1] for line in taking_the_whole({"x.py": ast.parse(source)})} == {"f", "g"}
