"""Annotations checked at run time, in whichever process calls `check_annotations`."""

from __future__ import annotations

import ast
from typing import Any

from jaxtyping import install_import_hook
from jaxtyping._import_hook import JaxtypingTransformer

PACKAGES = ["mcore_rl.algo", "mcore_rl.parallel"]
"""as in pyproject.toml's --jaxtyping-packages, which reaches only the process of pytest itself"""


def check_annotations() -> None:
    """Every call into the checked packages is checked against its annotations, shapes included."""
    install_import_hook(PACKAGES, "beartype.beartype")


def check_with_what_it_takes() -> None:
    """Of arrays the shapes are checked, of all else the type alone; functions within functions are not.

    Shapes are compared among all arguments and the answer, for which every call is bound to its signature:
    most calls are of functions without an array. Inner functions would be wrapped anew at every call of the
    outer one. Either took a good part of the time of a rank.
    """
    visit = JaxtypingTransformer.visit_FunctionDef

    def visit_outer(self: JaxtypingTransformer, node: ast.FunctionDef) -> Any:
        if any(isinstance(parent, ast.FunctionDef) for parent in self._parents):
            return node
        own = len(node.decorator_list)
        visited = visit(self, node)
        if len(visited.decorator_list) > own and not has_arrays(node):
            jaxtyped = visited.decorator_list[-1]
            typechecker = jaxtyped.keywords[0].value  # beartype
            visited.decorator_list[-1] = ast.copy_location(typechecker, jaxtyped)
        return visited

    JaxtypingTransformer.visit_FunctionDef = visit_outer


def has_arrays(node: ast.FunctionDef) -> bool:
    """Whether a shape, `Float[Tensor, "rows"]`, is somewhere in what the function takes, gives or does."""
    return any(
        isinstance(part, ast.Subscript)
        and isinstance(part.slice, ast.Tuple)
        and any(isinstance(one, ast.Constant) and isinstance(one.value, str) for one in part.slice.elts)
        for part in ast.walk(node)
    )


check_with_what_it_takes()
