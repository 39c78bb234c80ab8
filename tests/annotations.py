"""Annotations checked at run time, in whichever process calls `check_annotations`."""

from __future__ import annotations

import ast

from jaxtyping import install_import_hook
from jaxtyping._import_hook import JaxtypingTransformer

PACKAGES = ["mcore_rl.algo", "mcore_rl.parallel"]
"""as in pyproject.toml's --jaxtyping-packages, which reaches only the process of pytest itself"""


def check_annotations() -> None:
    """Every call into the checked packages is checked against its annotations, shapes included."""
    install_import_hook(PACKAGES, "beartype.beartype")


def leave_inner_functions() -> None:
    """Functions within functions are not checked.

    They would be wrapped anew at every call of the outer one, which took a quarter of the time of a rank.
    """
    visit = JaxtypingTransformer.visit_FunctionDef

    def visit_outer(self: JaxtypingTransformer, node: ast.FunctionDef) -> ast.FunctionDef:
        if any(isinstance(parent, ast.FunctionDef) for parent in self._parents):
            return node
        return visit(self, node)

    JaxtypingTransformer.visit_FunctionDef = visit_outer


leave_inner_functions()
