"""Code that lies beside a model is never run: not by the trainer, not by a server, not by a conversion."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedTokenizerFast, dynamic_module_utils

from mcore_rl.errors import McoreRLError
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.server.tokenizer import load_tokenizer as servers_tokenizer
from mcore_rl.server.weights import load_model
from mcore_rl.training.setup import load_tokenizer
from tests.rollout.support import build_model, save_model
from tests.sources import READERS, modules

CLASSES = {
    "config.json": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"},
    "tokenizer_config.json": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
}


@pytest.fixture
def model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A model whose files ask for a class beside them, whose module leaves a file when it is imported."""
    directory = save_model(tmp_path / "model", build_model(0))
    tokenizer.save_pretrained(directory)
    (directory / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(directory / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig\nclass Evil(LlamaConfig):\n    pass\n"
    )
    for name, classes in CLASSES.items():
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps(content | {"auto_map": classes}))
    return directory


@pytest.mark.parametrize(
    "load", [load_tokenizer, servers_tokenizer, lambda model: load_model(model, "cpu"), read_architecture]
)
def test_code_beside_a_model_is_not_run(model: Path, load: Callable[[Path], Any]) -> None:
    """Whether it is refused, or the part of it that needs no code is used."""
    with suppress(McoreRLError):
        load(model)
    assert not (model / "ran").exists()


RUNS = frozenset({"eval", "exec", "__import__", "os.system", "os.popen", "marshal.loads"})
"""what runs the text or bytes that it is given"""
ALLOWING = frozenset({"weights_only", "shell", "trust_remote_code"})
OUR_OWN = frozenset({"rewards/worker.py", "parallel/pool.py", "parallel/control.py"})
"""read pickles, from a pipe to a process of the same run or a collective of its ranks"""


def runners(tree: ast.AST) -> list[str]:
    """The calls that could run what was read."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            said = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg in ALLOWING}
            unsafe = name == "torch.load" and said.get("weights_only") != "True"
            if name in RUNS or name.startswith("pickle.load") or unsafe or said.get("shell") == "True":
                found.append(name)
            if said.get("trust_remote_code", "False") != "False":
                found.append("trust_remote_code")
    return found


@READERS
def test_nothing_is_run_that_was_read() -> None:
    trees = modules("mcore_rl")
    found = {path.removeprefix("mcore_rl/"): runners(tree) for path, tree in trees.items()}
    assert {file: names for file, names in found.items() if names and file not in OUR_OWN} == {}
    assert {name for file in OUR_OWN for name in found[file]} == {"pickle.loads"}


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "torch.load(path)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=trusted)",
        "pickle.load(file)",
    ],
)
def test_a_line_that_would_run_it_is_seen(line: str) -> None:
    assert runners(ast.parse(line))


def test_it_would_be_seen(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    AutoConfig.from_pretrained(model, trust_remote_code=True)
    assert (model / "ran").exists()
