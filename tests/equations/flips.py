"""Planted errors: copies of a syntax tree in which one sign is turned round.

A test of a formula is worth something if it fails on each of these copies of the lab's derivation.
"""

import ast
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from derivations import definitions, names_of


def signs(tree: ast.AST) -> Iterator[ast.BinOp | ast.UnaryOp]:
    """The additions, subtractions and minus signs of a syntax tree, always in one order."""
    for node in ast.walk(tree):
        binary = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)
        if binary or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)):
            yield node


def with_one_sign_turned(tree: ast.AST) -> Iterator[ast.AST]:
    """Every copy of a syntax tree in which one sign is the other one, in the order of `signs`."""
    for at, _ in enumerate(signs(tree)):
        wrong = copy.deepcopy(tree)
        node = next(itertools.islice(signs(wrong), at, None))
        turned = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.USub: ast.UAdd}
        node.op = turned[type(node.op)]()
        yield wrong


def assert_seen(
    check: Callable[[Callable[[str], Any]], object],
    lab: str,
    name: str,
    errors: type[Exception] | tuple[type[Exception], ...] = AssertionError,
    **more: Any,
) -> None:
    """The check passes no copy of the lab's definition `name` in which one sign is turned round."""
    nodes = definitions(lab)
    wrong = list(with_one_sign_turned(nodes[name]))
    assert wrong
    for tree in wrong:
        with np.errstate(all="ignore"), pytest.raises(errors):
            check(names_of((nodes | {name: tree}).values(), **more))
