"""Every key of the configuration is read by something that is not the configuration."""

from __future__ import annotations

import ast

from mcore_rl.config import Config
from mcore_rl.config.sections import EvalSetConfig, Section
from tests.sources import READERS, modules

pytestmark = READERS

READ_BY_THE_CONFIG = {"rollout.server"}
"""which kind of server it is, `config.programs` says"""


def attributes_read() -> set[str]:
    """Names of all attributes that the library reads outside of mcore_rl/config."""
    trees = [tree for path, tree in modules("mcore_rl").items() if path.split("/")[-2] != "config"]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def keys() -> dict[str, str]:
    """Dotted key -> its own name, of every section and of a held-out set."""
    sections = {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    sections["eval.sets.NAME"] = EvalSetConfig
    return {f"{name}.{key}": key for name, its in sections.items() for key in its.model_fields}


def test_every_key_is_read() -> None:
    read = attributes_read()
    assert len(keys()) > 90
    assert "no_such_key" not in read, "the control"
    unread = {dotted for dotted, key in keys().items() if key not in read}
    assert unread <= READ_BY_THE_CONFIG
